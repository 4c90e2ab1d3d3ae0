// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two devices in one VM, and what a device costs the VM.

use serde_json::json;

use super::RANGE;
use crate::backend::{Answer, Options};
use crate::lab::Lab;
use crate::qemu::{Res, Trouble};
use crate::table::{Expected, Found, Row};
use crate::wire::Range;

/// As many as a virtio-fs window of 64 MiB has.
const MAPS: u64 = 32;

const OTHER_STALE: &str =
    "all maps are done; the other's memory table goes stale, QEMU prints errors";
const BOTH_UPDATED: &str = "all maps are done; both memory tables are kept, QEMU is quiet";

pub const ROWS: &[Row] = &[
    Row {
        name: "Q11",
        done: "QMP migrate",
        expected: Expected::Refused("State blocked by non-migratable device"),
        gain: "VMs with such a device can be migrated, and saved",
        probe: migrate,
    },
    Row {
        name: "Q14",
        done: "32 maps of one device, beside one that has no CONFIGURE_MEM_SLOTS",
        expected: Expected::Seen(OTHER_STALE),
        gain: "pmem and fs in one VM with no switch and no noise",
        probe: |lab| beside(lab, false),
    },
    Row {
        name: "Q14",
        done: "the same, both with CONFIGURE_MEM_SLOTS",
        expected: Expected::Seen(BOTH_UPDATED),
        gain: "less work at each map",
        probe: |lab| beside(lab, true),
    },
];

fn migrate(lab: &mut Lab) -> Res<Found> {
    lab.started(false)?;
    let uri = format!("file:{}", lab.path("state").display());
    match lab.qemu()?.qmp("migrate", json!({ "uri": uri })) {
        Err(Trouble::Other(text)) => Ok(Found::Refused(text)),
        other => other.map(|_| Found::Accepted),
    }
}

/// Device 0 has many maps, device 1 has none: what does it see of them?
fn beside(lab: &mut Lab, other_has_slots: bool) -> Res<Found> {
    lab.boot(&[Options::new(true), Options::new(other_has_slots)])?;
    lab.start(0)?;
    lab.start(1)?;
    let file = lab.file("file", RANGE)?;
    let updates = |lab: &Lab| [0, 1].map(|device| lab.backend(device).memory_updates());
    let before = updates(lab);
    for index in 0..MAPS {
        if lab.backend(0).map(Range::new(index * RANGE, RANGE), &file)? == Answer::Refused {
            return Err(Trouble::Other(format!("map {index} is refused")));
        }
    }
    lab.ping()?;
    let after = updates(lab);
    let [mapper, other] = [0, 1].map(|device| after[device] - before[device]);
    let error = lab.qemu()?.lines().pop();
    let words = match (other == mapper, &error) {
        (true, None) => BOTH_UPDATED,
        (false, Some(_)) => OTHER_STALE,
        (true, Some(_)) => "all maps are done; both memory tables are kept, QEMU prints errors",
        (false, None) => "all maps are done; the other's memory table goes stale, unsaid",
    };
    Ok(Found::Seen(format!("{words} ({mapper} and {other} updates)")))
}
