// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Start, stop, pause, reset, reboot, and the end of a back-end.

use std::fs::File;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;

use super::{PAGE, RANGE};
use crate::backend::{Answer, Backend, Options, send_map};
use crate::lab::{Device, Lab};
use crate::qemu::{Res, Trouble};
use crate::table::{Expected, Found, Row};
use crate::wire::{Range, front_end};

/// More than fit into the 8 regions of SET_MEM_TABLE.
const MANY: u64 = 10;

const STARTS: &str = "the device starts, and the map is there";
const KEEPS: &str = "the device starts, and the maps are there";
const UNTOLD: &str = "the map is kept, and no memory update comes";
const TOLD: &str = "the map is kept, and a memory update comes";
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
        done: "the back-end vanishes, the guest goes on with the window",
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
        probe: |lab| reset_with_map(lab, true),
    },
    Row {
        name: "Q12",
        done: "a reboot of the machine with a live map, CONFIGURE_MEM_SLOTS negotiated, and a start",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "--mem-slots on is safe in every VM; no -action reboot=shutdown",
        probe: reboot_with_map,
    },
    Row {
        name: "Q12",
        done: "the same reset, but without CONFIGURE_MEM_SLOTS",
        expected: Expected::Seen(STARTS),
        gain: NO_GAIN,
        probe: |lab| reset_with_map(lab, false),
    },
    Row {
        name: "Q12",
        done: "the same reset with CONFIGURE_MEM_SLOTS, the map removed before",
        expected: Expected::Seen(STARTS),
        gain: NO_GAIN,
        probe: reset_after_unmap,
    },
    Row {
        name: "Q13",
        done: "pause and continue with 10 maps, CONFIGURE_MEM_SLOTS not negotiated",
        expected: Expected::Seen("the device stays dead: Error starting vhost-user-base: 105"),
        gain: "--mem-slots off for virtio-fs too, and more devices in a VM",
        probe: |lab| pause_with_maps(lab, false),
    },
    Row {
        name: "Q13",
        done: "pause and continue with 10 maps, CONFIGURE_MEM_SLOTS negotiated",
        expected: Expected::Seen(KEEPS),
        gain: NO_GAIN,
        probe: |lab| pause_with_maps(lab, true),
    },
    Row {
        name: "Q16",
        done: "a map that is sent when a stop has just begun (its first message came)",
        expected: Expected::Dies(Signal::SIGSEGV, ""),
        gain: "no moment of a VM's life in which a map can kill it",
        probe: map_crosses_stop,
    },
    Row {
        name: "Q17",
        done: "pause and continue with a map, CONFIGURE_MEM_SLOTS negotiated",
        expected: Expected::Seen(UNTOLD),
        gain: "none: a back-end must not wait for what does not come",
        probe: |lab| told_at_pause(lab, true),
    },
    Row {
        name: "Q17",
        done: "the same, but without CONFIGURE_MEM_SLOTS",
        expected: Expected::Seen(TOLD),
        gain: NO_GAIN,
        probe: |lab| told_at_pause(lab, false),
    },
];

fn map_before_start(lab: &mut Lab) -> Res<Found> {
    lab.boot(&[Options::new(false)])?;
    let file = lab.file("file", RANGE)?;
    lab.doing("at the map");
    let answer = lab.backend(0).map(Range::new(0, RANGE), &file)?;
    lab.found(answer)
}

fn map_after_reset(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(false)?;
    let file = lab.file("file", RANGE)?;
    lab.reset(0)?;
    lab.doing("at the map");
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    lab.found(answer)
}

fn map_in_pause(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(false)?;
    let file = lab.file("file", RANGE)?;
    lab.qemu()?.qmp("stop", json!({}))?;
    lab.doing("at the map");
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    lab.found(answer)
}

fn map_crosses_stop(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(false)?;
    let file = lab.file("file", RANGE)?;
    backend.set_hook(front_end::SET_VRING_ENABLE, move |channel| {
        let _ = send_map(channel, Range::new(0, RANGE), &file, false);
    });
    lab.doing("after the stop");
    lab.reset(0)?;
    // The main loop comes by the channel at least once between these.
    for _ in 0..3 {
        lab.ping()?;
    }
    Ok(Found::Seen("QEMU lives".into()))
}

/// Maps `count` ranges of the file, one behind the other in the window too.
fn map_ranges(backend: &Backend, file: &File, count: u64) -> Res<()> {
    for index in 0..count {
        let range = Range { fd_offset: index * PAGE, ..Range::new(index * RANGE, PAGE) };
        if backend.map(range, file)? == Answer::Refused {
            return Err(Trouble::Other(format!("map {index} is refused")));
        }
    }
    Ok(())
}

fn back_end_vanishes(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(false)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    backend.vanish();
    lab.ping()?;
    lab.doing("at a load");
    let loaded = lab.load(0, 0)?;
    lab.store(0, 1, b'w')?;
    let text = std::fs::read(lab.path("file"))?;
    Ok(Found::Seen(match (loaded, &text[..2]) {
        (b'p', b"pw") => "the guest reads and writes the file".into(),
        _ => "the window is gone".into(),
    }))
}

/// Connects as soon as QEMU listens.
fn connect(lab: &mut Lab) -> Res<Backend> {
    loop {
        match Backend::connect(&lab.path("vhost-0"), Options::new(false)) {
            Err(_) if !lab.qemu()?.is_gone() => std::thread::sleep(Duration::from_millis(2)),
            other => return Ok(other?),
        }
    }
}

fn back_end_returns(lab: &mut Lab) -> Res<Found> {
    let path = lab.path("vhost-0").display().to_string();
    lab.launch(&[format!("path={path},server=on")])?;
    let backend = connect(lab)?;
    lab.devices.push(Device::new(backend.clone()));
    lab.greet()?;
    lab.start(0)?;
    backend.vanish();
    lab.ping()?;
    lab.doing("when a new back-end connects");
    let second = connect(lab)?;
    // The last message of a start; it does not come if QEMU dies.
    second.wait_for(front_end::SET_VRING_ENABLE);
    lab.ping()?;
    Ok(Found::Seen("QEMU goes on with the new back-end".into()))
}

fn reconnect(lab: &mut Lab) -> Res<Found> {
    let path = lab.path("vhost-0");
    let backend = Backend::listen(&path, Options::new(false))?;
    lab.devices.push(Device::new(backend));
    lab.launch(&[format!("path={},reconnect-ms=100", path.display())])?;
    lab.greet()?;
    Ok(Found::Seen("QEMU starts".into()))
}

fn reset_drops_maps(lab: &mut Lab) -> Res<Found> {
    lab.boot(&[Options { reset_device: true, ..Options::new(false) }])?;
    lab.start(0)?;
    let backend = lab.backend(0);
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    lab.doing("at the reset");
    lab.reset(0)?;
    lab.start(0)?;
    let map = if lab.load(0, 0)? == b'p' { "still there" } else { "gone" };
    let came = match backend.count(front_end::RESET_DEVICE) {
        0 => "did not come",
        _ => "came",
    };
    Ok(Found::Seen(format!("the map is {map}, RESET_DEVICE {came}")))
}

fn map_again_after_pause(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(false)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    lab.doing("at the pause");
    lab.pause()?;
    let answer = backend.map(Range::new(0, PAGE), &file)?;
    lab.found(answer)
}

/// Started again: can it be used?
fn use_again(lab: &mut Lab, file: &File) -> Res<Found> {
    let path = lab.path("file");
    lab.qemu()?.wait_unmapped(&path)?;
    lab.doing("at the next start");
    lab.start(0)?;
    lab.doing("at the next map");
    map_ranges(&lab.backend(0), file, 1)?;
    Ok(Found::Seen(match lab.load(0, 0)? {
        b'p' => STARTS.into(),
        _ => "the device starts, and the map shows something else".into(),
    }))
}

fn reset_with_map(lab: &mut Lab, mem_slots: bool) -> Res<Found> {
    let backend = lab.started(mem_slots)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    lab.doing("at the reset");
    lab.reset(0)?;
    use_again(lab, &file)
}

fn reboot_with_map(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(true)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    lab.doing("at the reboot");
    lab.reboot()?;
    use_again(lab, &file)
}

fn reset_after_unmap(lab: &mut Lab) -> Res<Found> {
    let backend = lab.started(true)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    backend.unmap(Range::new(0, PAGE))?;
    lab.doing("at the reset");
    lab.reset(0)?;
    use_again(lab, &file)
}

fn pause_with_maps(lab: &mut Lab, mem_slots: bool) -> Res<Found> {
    let backend = lab.started(mem_slots)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, MANY)?;
    let starts = backend.count(front_end::SET_VRING_ENABLE);
    lab.doing("at the pause");
    lab.pause()?;
    // One message to stop, one to start.
    if backend.count(front_end::SET_VRING_ENABLE) < starts + 2 {
        let qemu = lab.qemu()?;
        let why = qemu.written_line("Error starting").unwrap_or_default();
        let why = why.split_once(": ").map_or("QEMU says nothing", |(_, why)| why);
        return Ok(Found::Seen(format!("the device stays dead: {why}")));
    }
    Ok(Found::Seen(match lab.load(0, 0)? {
        b'p' => KEEPS.into(),
        _ => "the device starts, and the maps are gone".into(),
    }))
}

fn told_at_pause(lab: &mut Lab, mem_slots: bool) -> Res<Found> {
    let backend = lab.started(mem_slots)?;
    let file = lab.file("file", RANGE)?;
    map_ranges(&backend, &file, 1)?;
    lab.ping()?;
    let (updates, starts) = (backend.memory_updates(), backend.count(front_end::SET_VRING_ENABLE));
    lab.doing("at the pause");
    lab.pause()?;
    if backend.count(front_end::SET_VRING_ENABLE) < starts + 2 {
        return Ok(Found::Seen("the device stays dead".into()));
    }
    Ok(Found::Seen(match (lab.load(0, 0)?, backend.memory_updates() - updates) {
        (b'p', 0) => UNTOLD.into(),
        (b'p', _) => TOLD.into(),
        _ => "the map is gone".into(),
    }))
}
