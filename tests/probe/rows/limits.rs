// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows about the largest number of maps and the sizes of windows.

use nix::sys::signal::Signal;

use super::PAGE;
use crate::backend::{Answer, Options};
use crate::harness::Harness;
use crate::qemu::Res;
use crate::table::{Expected, Found, Row};
use crate::wire::Range;

/// Above QEMU's limit, VHOST_USER_MAX_RAM_SLOTS (512), without counting RAM's regions.
const TOO_MANY_MAPS: u64 = 520;
/// Number of maps that the device without CONFIGURE_MEM_SLOTS makes before the other one is
/// started.
const CHEAP_MAPS: u64 = 506;
const MIB: u64 = 1 << 20;

pub const ROWS: &[Row] = &[
    Row {
        name: "Q2",
        done: "520 maps of 4 KiB, CONFIGURE_MEM_SLOTS negotiated",
        expected: Expected::Dies(Signal::SIGABRT, "nregions <= VHOST_USER_MAX_RAM_SLOTS"),
        gain: "a window of any size, and no budget for it that all devices of a VM share",
        probe: many_maps,
    },
    Row {
        name: "Q15",
        done: "GET_SHMEM_CONFIG answered with one region of 48 MiB",
        expected: Expected::Dies(Signal::SIGABRT, "pci_register_bar"),
        gain: "windows of any size without a second region that fills them up",
        probe: |harness| window(harness, &[48 * MIB]),
    },
    Row {
        name: "Q15",
        done: "GET_SHMEM_CONFIG answered with regions of 48 MiB and 16 MiB",
        expected: Expected::Seen("QEMU starts"),
        gain: "none: it would be a loss",
        probe: |harness| window(harness, &[48 * MIB, 16 * MIB]),
    },
    Row {
        name: "Q18",
        done: "520 maps of 4 KiB, CONFIGURE_MEM_SLOTS not negotiated by any device",
        expected: Expected::Accepted,
        gain: "none: it would be a loss",
        probe: many_maps_without_slots,
    },
];

fn many_maps_without_slots(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", TOO_MANY_MAPS * PAGE)?;
    for index in 0..TOO_MANY_MAPS {
        harness.doing(&format!("at map {}", index + 1));
        let range = Range { fd_offset: index * PAGE, ..Range::new(index * PAGE, PAGE) };
        let answer = backend.map(range, &file)?;
        if answer == Answer::Refused {
            return harness.found(answer);
        }
    }
    Ok(Found::Accepted)
}

fn many_maps(harness: &mut Harness) -> Res<Found> {
    harness.boot(&[Options::new(false), Options::new(true)])?;
    let file = harness.file("file", TOO_MANY_MAPS * PAGE)?;
    harness.start(0)?;
    for index in 0..TOO_MANY_MAPS {
        // Each map takes long once a device with CONFIGURE_MEM_SLOTS is started: with all maps made
        // then, this row would take 27 s.
        let mapper = usize::from(index >= CHEAP_MAPS);
        if index == CHEAP_MAPS {
            harness.doing("at the start of the second device");
            harness.start(1)?;
        }
        harness.doing(&format!("at map {}", index + 1));
        let range = Range { fd_offset: index * PAGE, ..Range::new(index * PAGE, PAGE) };
        let answer = harness.backend(mapper).map(range, &file)?;
        if answer == Answer::Refused {
            return harness.found(answer);
        }
    }
    Ok(Found::Accepted)
}

fn window(harness: &mut Harness, sizes: &[u64]) -> Res<Found> {
    harness.boot(&[Options { windows: sizes.to_vec(), ..Options::new(false) }])?;
    Ok(Found::Seen("QEMU starts".into()))
}
