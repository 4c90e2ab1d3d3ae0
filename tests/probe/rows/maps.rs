// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows about single maps and unmaps: which are refused, what they do, and in which order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;
use std::time::Duration;

use super::{PAGE, RANGE};
use crate::backend::{WINDOW_BYTES, has_answer, read_answer, send_map};
use crate::harness::Harness;
use crate::qemu::{ProbeError, Res};
use crate::table::{Expected, Found, Row};
use crate::wire::{Range, back_end, front_end, send_request};

/// Time limit for a memory update to arrive.
const UPDATE_COMES: Duration = Duration::from_secs(60);

/// Time in which an ack arrives that nothing delays.
const ACK_COMES: Duration = Duration::from_millis(300);

const UPDATE_FIRST: &str = "the memory update comes before the ack";
const ACK_FIRST: &str = "the ack comes before the memory update";

pub const ROWS: &[Row] = &[
    Row {
        name: "Q3",
        done: "a map: which comes first, ADD_MEM_REG or the ack",
        expected: Expected::Seen(ACK_FIRST),
        gain: "none: a back-end that waits for the ack where it answers updates would hang",
        probe: order_at_map,
    },
    Row {
        name: "Q3",
        done: "an unmap: which comes first, REM_MEM_REG or the ack",
        expected: Expected::Seen(ACK_FIRST),
        gain: "none: a back-end that waits for the ack where it answers updates would hang",
        probe: order_at_unmap,
    },
    Row {
        name: "Q3",
        done: "a second map while the memory update of the first one is not answered yet",
        expected: Expected::Seen("its ack waits for that answer"),
        gain: "a back-end may wait for an ack where it answers memory updates",
        probe: map_during_update,
    },
    Row {
        name: "Q4",
        done: "a map over a live one",
        expected: Expected::Refused("VIRTIO Shared Memory mapping overlap"),
        gain: "a range that was read can become writable without a moment in which it is not there",
        probe: map_over_map,
    },
    Row {
        name: "Q5",
        done: "an unmap of half of a map",
        expected: Expected::Refused("Shared memory mapping not found at offset"),
        gain: "large maps that can be given back in parts, so far fewer of them",
        probe: unmap_half,
    },
    Row {
        name: "Q5",
        done: "an unmap of exactly one map, of 4 KiB",
        expected: Expected::Accepted,
        gain: "none: it would be a loss",
        probe: unmap_page,
    },
    Row {
        name: "Q5",
        done: "a map that ends past the window",
        expected: Expected::Refused("Bad offset/len for mmap"),
        gain: "none",
        probe: map_past_window,
    },
    Row {
        name: "Q6",
        done: "a map of 2 MiB of a file of 5000 bytes",
        expected: Expected::Refused("is too small for"),
        gain: "files of any size through the window without the private mount",
        probe: map_past_end,
    },
    Row {
        name: "Q6",
        done: "a map of 2 MiB of an empty file",
        expected: Expected::Seen("done, and the file is 2097152 bytes long now"),
        gain: "an empty file that is mapped stays empty",
        probe: map_empty_file,
    },
    Row {
        name: "Q7",
        done: "a map flagged read-only from an O_RDWR descriptor, then a store of the guest",
        expected: Expected::Seen("the store is in the file"),
        gain: "read-only devices and shares that the window keeps to",
        probe: store_to_read_only,
    },
    Row {
        name: "Q8",
        done: "a map flagged read-only from an O_RDONLY descriptor",
        expected: Expected::Refused("Permission denied"),
        gain: "files that the host may only read can be mapped",
        probe: map_read_only_file,
    },
];

/// Sends a request, and looks for the ack on the channel when the memory update arrives.
fn order(
    harness: &mut Harness,
    update: u32,
    send: impl FnOnce(&std::os::unix::net::UnixStream) -> std::io::Result<()>,
) -> Res<Found> {
    let backend = harness.backend(0);
    let channel_to_qemu = backend.channel()?;
    let (sender, receiver) = channel();
    // One thread of QEMU writes both: if it wrote the ack first, the ack is in the socket by now.
    backend.set_hook(update, move |channel| {
        let _ = sender.send(has_answer(channel));
    });
    send(&channel_to_qemu)?;
    let acked_before = receiver.recv_timeout(UPDATE_COMES);
    read_answer(&channel_to_qemu)?;
    Ok(Found::Seen(match acked_before {
        Ok(true) => ACK_FIRST.into(),
        Ok(false) => UPDATE_FIRST.into(),
        Err(_) => "no memory update comes".into(),
    }))
}

fn order_at_map(harness: &mut Harness) -> Res<Found> {
    harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    order(harness, front_end::ADD_MEM_REG, |channel| {
        send_map(channel, Range::new(0, RANGE), &file, true)
    })
}

fn order_at_unmap(harness: &mut Harness) -> Res<Found> {
    mapped(harness)?;
    order(harness, front_end::REM_MEM_REG, |channel| {
        let payload = Range::new(0, RANGE).payload();
        send_request(channel, back_end::SHMEM_UNMAP, true, &payload, None)
    })
}

fn map_during_update(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", 2 * RANGE)?;
    let to_qemu = backend.channel()?;
    let second = Range { fd_offset: RANGE, ..Range::new(RANGE, RANGE) };
    let second_file = file.try_clone()?;
    let (first_acked, is_first_acked) = channel();
    let (sender, receiver) = channel();
    // The memory update is answered only after this function has returned.
    backend.set_hook(front_end::ADD_MEM_REG, move |channel| {
        let _ = is_first_acked.recv_timeout(UPDATE_COMES);
        let sent = send_map(channel, second, &second_file, true);
        std::thread::sleep(ACK_COMES);
        let _ = sender.send(sent.map(|()| has_answer(channel)));
    });
    send_map(&to_qemu, Range::new(0, RANGE), &file, true)?;
    read_answer(&to_qemu)?;
    let _ = first_acked.send(());
    let Ok(acked_before) = receiver.recv_timeout(UPDATE_COMES) else {
        return Ok(Found::Seen("no memory update comes".into()));
    };
    let acked_before = acked_before?;
    read_answer(&to_qemu)?;
    Ok(Found::Seen(match acked_before {
        true => "its ack comes at once".into(),
        false => "its ack waits for that answer".into(),
    }))
}

/// Makes a map of 2 MiB at the window's start.
fn mapped(harness: &mut Harness) -> Res<File> {
    let backend = harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    match backend.map(Range::new(0, RANGE), &file)? {
        crate::backend::Answer::Done => Ok(file),
        crate::backend::Answer::Refused => {
            Err(ProbeError::Other("the first map is refused".into()))
        }
    }
}

fn map_over_map(harness: &mut Harness) -> Res<Found> {
    let file = mapped(harness)?;
    let answer = harness.backend(0).map(Range::new(0, RANGE), &file)?;
    harness.found(answer)
}

fn unmap_half(harness: &mut Harness) -> Res<Found> {
    mapped(harness)?;
    let answer = harness.backend(0).unmap(Range::new(0, RANGE / 2))?;
    harness.found(answer)
}

fn unmap_page(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", PAGE)?;
    let page = Range::new(RANGE + PAGE, PAGE);
    let answer = backend.map(page, &file)?;
    if answer == crate::backend::Answer::Refused {
        return harness.found(answer);
    }
    let answer = backend.unmap(page)?;
    harness.found(answer)
}

fn map_past_window(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    let answer = backend.map(Range::new(WINDOW_BYTES - PAGE, RANGE), &file)?;
    harness.found(answer)
}

fn map_past_end(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", 5000)?;
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    harness.found(answer)
}

fn map_empty_file(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", 0)?;
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    match harness.found(answer)? {
        Found::Accepted => {
            let bytes = file.metadata()?.len();
            Ok(Found::Seen(format!("done, and the file is {bytes} bytes long now")))
        }
        other => Ok(other),
    }
}

fn store_to_read_only(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    let file = harness.file("file", RANGE)?;
    let answer = backend.map(Range { writable: false, ..Range::new(0, RANGE) }, &file)?;
    if let refused @ Found::Refused(_) = harness.found(answer)? {
        return Ok(refused);
    }
    harness.store(0, 0, b'w')?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0)?;
    Ok(Found::Seen(match byte {
        [b'w'] => "the store is in the file".into(),
        _ => "the store is not in the file".into(),
    }))
}

fn map_read_only_file(harness: &mut Harness) -> Res<Found> {
    let backend = harness.started(true)?;
    harness.file("file", RANGE)?;
    let file = File::open(harness.path("file"))?;
    let answer = backend.map(Range { writable: false, ..Range::new(0, RANGE) }, &file)?;
    harness.found(answer)
}
