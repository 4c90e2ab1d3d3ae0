// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows about start, stop, pause, reset, reboot, and the end of a back-end.

use std::fs::File;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use super::{PAGE, RANGE};
use crate::backend::{Answer, Backend, Options, send_map};
use crate::harness::{Device, Harness};
use crate::qemu::{ProbeError, Res};
use crate::table::{Expected, Found, Row};
use crate::wire::{Range, front_end};

/// Number of maps; SET_MEM_TABLE has room for 8 regions only.
const MANY: u64 = 10;

const STARTS: &str = "the device starts, and the map is there";
const KEEPS: &str = "the device starts, and the maps are there";
const KEPT_WITHOUT_UPDATE: &str = "the map is kept, and no memory update comes";
const KEPT_WITH_UPDATE: &str = "the map is kept, and a memory update comes";
const NO_GAIN: &str = "none: it would be a loss";

pub const ROWS: &[Row] = &[
    Row {
        name: "Q1",
        done: "a map before the driver is ready",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "a back-end that maps too early costs no VM",
        probe: map_before_start,
    },
    Row {
        name: "Q1",
        done: "a map after a virtio reset",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "a back-end that maps too late costs no VM",
        probe: map_after_reset,
    },
    Row {
        name: "Q1",
        done: "a map while the VM is paused",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "a back-end that maps too late costs no VM",
        probe: map_in_pause,
    },
    Row {
        name: "Q9",
        done: "the back-end disconnects, the guest goes on using the window",
        expected: Expected::Seen("the guest reads and writes the file"),
        gain: NO_GAIN,
        probe: back_end_vanishes,
    },
    Row {
        name: "Q9",
        done: "a new back-end connects to a server=on chardev",
        expected: Expected::Dies(Signal::SIGABRT, "vhost_dev_start: Assertion `hdev->vhost_ops'"),
        gain: "the daemon can be restarted, and updated, under a running VM",
        probe: back_end_returns,
    },
    Row {
        name: "Q9",
        done: "a chardev with reconnect-ms",
        expected: Expected::Ends("vhost_backend_init failed: Protocol error"),
        gain: "the daemon can be restarted, and updated, under a running VM",
        probe: reconnect,
    },
    Row {
        name: "Q10",
        done: "a virtio reset with a live map, RESET_DEVICE offered",
        expected: Expected::Seen("the map is gone, RESET_DEVICE did not come"),
        gain: "none, if the map is still dropped",
        probe: reset_drops_maps,
    },
    Row {
        name: "Q10",
        done: "pause, continue, and the same map again",
        expected: Expected::Refused("VIRTIO Shared Memory mapping overlap"),
        gain: NO_GAIN,
        probe: map_again_after_pause,
    },
    Row {
        name: "Q12",
        done: "a virtio reset with a live map, CONFIGURE_MEM_SLOTS negotiated, and a start",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "--mem-slots on is safe in every VM; no -action reboot=shutdown",
        probe: |harness| reset_with_map(harness, true),
    },
    Row {
        name: "Q12",
        done: "a machine reset with a live map, CONFIGURE_MEM_SLOTS negotiated, and a start",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "--mem-slots on is safe in every VM; no -action reboot=shutdown",
        probe: reboot_with_map,
    },
    Row {
        name: "Q12",
        done: "a virtio reset with a live map, CONFIGURE_MEM_SLOTS not negotiated, and a start",
        expected: Expected::Seen(STARTS),
        gain: NO_GAIN,
        probe: |harness| reset_with_map(harness, false),
    },
    Row {
        name: "Q12",
        done: "a virtio reset after an unmap, CONFIGURE_MEM_SLOTS negotiated, and a start",
        expected: Expected::Seen(STARTS),
        gain: NO_GAIN,
        probe: reset_after_unmap,
    },
    Row {
        name: "Q13",
        done: "pause and continue with 10 maps, CONFIGURE_MEM_SLOTS not negotiated",
        expected: Expected::Seen("the device stays dead: Error starting vhost-user-base: 105"),
        gain: "--mem-slots off for virtio-fs too, and more devices in a VM",
        probe: |harness| pause_with_maps(harness, false),
    },
    Row {
        name: "Q13",
        done: "pause and continue with 10 maps, CONFIGURE_MEM_SLOTS negotiated",
        expected: Expected::Seen(KEEPS),
        gain: NO_GAIN,
        probe: |harness| pause_with_maps(harness, true),
    },
    Row {
        name: "Q16",
        done: "a map that is sent at the first message of a stop",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "no moment of a VM's life in which a map can kill it",
        probe: map_crosses_stop,
    },
    Row {
        name: "Q17",
        done: "pause and continue with a map, CONFIGURE_MEM_SLOTS negotiated",
        expected: Expected::Seen(KEPT_WITHOUT_UPDATE),
        gain: "none: a back-end must not wait for what does not come",
        probe: |harness| update_at_pause(harness, true),
    },
    Row {
        name: "Q17",
        done: "pause and continue with a map, CONFIGURE_MEM_SLOTS not negotiated",
        expected: Expected::Seen(KEPT_WITH_UPDATE),
        gain: NO_GAIN,
        probe: |harness| update_at_pause(harness, false),
    },
];

fn map_before_start(harness: &mut Harness) -> Res<Found> {
    harness.boot(&[Options::new(false)])?;
    let file = harness.file("file", RANGE)?;
    harness.doing("at the map");
    let answer = harness.backend(0).map(Range::new(0, RANGE), &file)?;
    harness.found(answer)
}

fn map_after_reset(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    harness.reset(0)?;
    harness.doing("at the map");
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    harness.found(answer)
}

fn map_in_pause(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    harness.qemu()?.qmp("stop", json!({}))?;
    harness.doing("at the map");
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    harness.found(answer)
}

fn map_crosses_stop(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    backend.set_hook(front_end::SET_VRING_ENABLE, move |channel| {
        let _ = send_map(channel, Range::new(0, RANGE), &file, false);
    });
    harness.doing("after the stop");
    harness.reset(0)?;
    // Each answer shows that QEMU's main loop has run, in which it also reads the channel.
    for _ in 0..3 {
        harness.ping()?;
    }
    Ok(Found::Seen("QEMU lives".into()))
}

/// Maps `count` pages of the file, each at the start of a 2 MiB range of the window.
fn map_ranges(backend: &Backend, file: &File, count: u64) -> Res<()> {
    for index in 0..count {
        let range = Range { fd_offset: index * PAGE, ..Range::new(index * RANGE, PAGE) };
        if backend.map(range, file)? == Answer::Refused {
            return Err(ProbeError::Other(format!("map {index} is refused")));
        }
    }
    Ok(())
}

fn back_end_vanishes(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    backend.vanish();
    harness.ping()?;
    harness.doing("at a load");
    let loaded = harness.load(0, 0)?;
    harness.store(0, 1, b'w')?;
    let text = std::fs::read(harness.path("file"))?;
    Ok(Found::Seen(match (loaded, &text[..2]) {
        (b'p', b"pw") => "the guest reads and writes the file".into(),
        _ => "the window is gone".into(),
    }))
}

/// Connects as soon as QEMU listens; an error if QEMU has ended.
fn connect(harness: &mut Harness) -> Res<Backend> {
    loop {
        match Backend::connect(&harness.path("vhost-0"), Options::new(false)) {
            Err(_) if !harness.qemu()?.is_gone() => std::thread::sleep(Duration::from_millis(2)),
            other => return Ok(other?),
        }
    }
}

fn back_end_returns(harness: &mut Harness) -> Res<Found> {
    let path = harness.path("vhost-0").display().to_string();
    harness.launch(&[format!("path={path},server=on")])?;
    let backend = connect(harness)?;
    harness.devices.push(Device::new(backend.clone()));
    harness.greet()?;
    harness.start(0)?;
    backend.vanish();
    harness.ping()?;
    harness.doing("when a new back-end connects");
    let second = connect(harness)?;
    // The last message of a start; if QEMU crashes, the wait ends without it.
    second.wait_for(front_end::SET_VRING_ENABLE);
    harness.ping()?;
    Ok(Found::Seen("QEMU goes on with the new back-end".into()))
}

fn reconnect(harness: &mut Harness) -> Res<Found> {
    let path = harness.path("vhost-0");
    let backend = Backend::listen(&path, Options::new(false))?;
    harness.devices.push(Device::new(backend));
    harness.launch(&[format!("path={},reconnect-ms=100", path.display())])?;
    harness.greet()?;
    Ok(Found::Seen("QEMU starts".into()))
}

fn reset_drops_maps(harness: &mut Harness) -> Res<Found> {
    harness.boot(&[Options { reset_device: true, ..Options::new(false) }])?;
    harness.start(0)?;
    let backend = harness.backend(0);
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    harness.doing("at the reset");
    harness.reset(0)?;
    harness.start(0)?;
    let map = if harness.load(0, 0)? == b'p' { "still there" } else { "gone" };
    let came = match backend.count(front_end::RESET_DEVICE) {
        0 => "did not come",
        _ => "came",
    };
    Ok(Found::Seen(format!("the map is {map}, RESET_DEVICE {came}")))
}

fn map_again_after_pause(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    harness.doing("at the pause");
    harness.pause()?;
    let answer = backend.map(Range::new(0, PAGE), &file)?;
    harness.found(answer)
}

/// Starts the device again, makes a map and loads from it.
fn use_again(harness: &mut Harness, file: &File) -> Res<Found> {
    let path = harness.path("file");
    harness.qemu()?.wait_unmapped(&path)?;
    harness.doing("at the next start");
    harness.start(0)?;
    harness.doing("at the next map");
    map_ranges(&harness.backend(0), file, 1)?;
    Ok(Found::Seen(match harness.load(0, 0)? {
        b'p' => STARTS.into(),
        _ => "the device starts, and the map shows something else".into(),
    }))
}

fn reset_with_map(harness: &mut Harness, mem_slots: bool) -> Res<Found> {
    let backend = harness.started(mem_slots)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    harness.doing("at the reset");
    harness.reset(0)?;
    use_again(harness, &file)
}

fn reboot_with_map(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    harness.doing("at the reboot");
    harness.reboot()?;
    use_again(harness, &file)
}

fn reset_after_unmap(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    backend.unmap(Range::new(0, PAGE))?;
    harness.doing("at the reset");
    harness.reset(0)?;
    use_again(harness, &file)
}

fn pause_with_maps(harness: &mut Harness, mem_slots: bool) -> Res<Found> {
    let backend = harness.started(mem_slots)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, MANY)?;
    let starts = backend.count(front_end::SET_VRING_ENABLE);
    harness.doing("at the pause");
    harness.pause()?;
    // A pause and its end send at least two of these messages, one to stop and one to start.
    if backend.count(front_end::SET_VRING_ENABLE) < starts + 2 {
        let qemu = harness.qemu()?;
        let why = qemu.written_line("Error starting").unwrap_or_default();
        let why = why.split_once(": ").map_or("QEMU says nothing", |(_, why)| why);
        return Ok(Found::Seen(format!("the device stays dead: {why}")));
    }
    Ok(Found::Seen(match harness.load(0, 0)? {
        b'p' => KEEPS.into(),
        _ => "the device starts, and the maps are gone".into(),
    }))
}

fn update_at_pause(harness: &mut Harness, mem_slots: bool) -> Res<Found> {
    let backend = harness.started(mem_slots)?;
    let file = harness.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    harness.ping()?;
    let (updates, starts) = (backend.memory_updates(), backend.count(front_end::SET_VRING_ENABLE));
    harness.doing("at the pause");
    harness.pause()?;
    if backend.count(front_end::SET_VRING_ENABLE) < starts + 2 {
        return Ok(Found::Seen("the device stays dead".into()));
    }
    Ok(Found::Seen(match (harness.load(0, 0)?, backend.memory_updates() - updates) {
        (b'p', 0) => KEPT_WITHOUT_UPDATE.into(),
        (b'p', _) => KEPT_WITH_UPDATE.into(),
        _ => "the map is gone".into(),
    }))
}
