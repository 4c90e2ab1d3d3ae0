// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows about two devices in one VM, and about limits that a device puts on its VM.

use serde_json::json;

use super::RANGE;
use crate::backend::{Answer, Options};
use crate::harness::Harness;
use crate::qemu::{ProbeError, Res};
use crate::table::{Expected, Found, Row};
use crate::wire::Range;

/// Number of maps: as many as fit in a virtio-fs window of 64 MiB.
const MAPS: u64 = 32;

const OTHER_STALE: &str =
    "all maps are done; the memory table of the other device goes stale, QEMU prints errors";
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
        gain: "pmem and fs in one VM without options and without QEMU's error messages",
        probe: |harness| beside(harness, false),
    },
    Row {
        name: "Q14",
        done: "32 maps of one device, beside one that has CONFIGURE_MEM_SLOTS, too",
        expected: Expected::Seen(BOTH_UPDATED),
        gain: "less work at each map",
        probe: |harness| beside(harness, true),
    },
];

fn migrate(harness: &mut Harness) -> Res<Found> {
    harness.started(false)?;
    let uri = format!("file:{}", harness.path("state").display());
    match harness.qemu()?.qmp("migrate", json!({ "uri": uri })) {
        Err(ProbeError::Other(text)) => Ok(Found::Refused(text)),
        other => other.map(|_| Found::Accepted),
    }
}

/// Device 0 makes many maps, device 1 none. Counts the memory updates that each back-end gets.
fn beside(harness: &mut Harness, other_has_slots: bool) -> Res<Found> {
    harness.boot(&[Options::new(true), Options::new(other_has_slots)])?;
    harness.start(0)?;
    harness.start(1)?;
    let file = harness.file("file", RANGE)?;
    let updates = |harness: &Harness| [0, 1].map(|device| harness.backend(device).memory_updates());
    let before = updates(harness);
    for index in 0..MAPS {
        if harness.backend(0).map(Range::new(index * RANGE, RANGE), &file)? == Answer::Refused {
            return Err(ProbeError::Other(format!("map {index} is refused")));
        }
    }
    harness.ping()?;
    let after = updates(harness);
    let [mapper, other] = [0, 1].map(|device| after[device] - before[device]);
    let error = harness.qemu()?.lines().pop();
    let words = match (other == mapper, &error) {
        (true, None) => BOTH_UPDATED,
        (false, Some(_)) => OTHER_STALE,
        (true, Some(_)) => "all maps are done; both memory tables are kept, QEMU prints errors",
        (false, None) => {
            "all maps are done; the memory table of the other device goes stale, QEMU is quiet"
        }
    };
    Ok(Found::Seen(format!("{words} ({mapper} and {other} updates)")))
}
