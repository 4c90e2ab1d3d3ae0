// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that SETUPMAPPING is answered while other requests, of the same or of another queue, are
//! in a slow system call. strace delays the call; the order of events is checked.

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, Pending};
use testkit::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op};
use testkit::slow::{HELD, SYNCS, Strace, skip};

/// Node id and handle of the file of the slow request.
type Slow = (u64, u64);

/// Sends the slow request, waits until its system call has begun, and then maps from both queues:
/// another file and, if `same_file`, the same file. A grant for writing allocates blocks, so if
/// that is the slow call, the grants are for reading.
fn while_slow(calls: &str, same_file: bool, send: impl FnOnce(&mut FsGuest, Slow) -> Pending) {
    if !Strace::is_here() {
        return skip(calls, "no strace");
    }
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("slow", &vec![b's'; 2 * RANGE as usize]);
    host.put("map", &vec![b'm'; 4 * RANGE as usize]);
    let mut guest = host.boot();
    let slow = guest.opened("slow");
    let map = guest.node("map");
    // After this all state of a file's first grant exists.
    guest.setup(map, 0, RANGE, MAP_READ | MAP_WRITE, 0).unwrap();
    guest.setup(slow.0, 0, RANGE, MAP_READ | MAP_WRITE, 8 * RANGE).unwrap();
    assert!(guest.vmm.store(8 * RANGE, b"dirty"));

    let flags = if calls == "fallocate" { MAP_READ } else { MAP_READ | MAP_WRITE };
    let mut strace = Strace::attach(host.pid(), calls, HELD);
    let pending = send(&mut guest, slow);
    strace.wait_begun(1);
    for (queue, i) in [(FIRST + 1, 1), (FIRST, 2)] {
        guest.on = queue;
        guest.setup(map, i * RANGE, RANGE, flags, i * RANGE).unwrap();
        assert_eq!(guest.vmm.fetch(i * RANGE, 2).unwrap(), b"mm");
        guest.remove(&[(i * RANGE, RANGE)]).unwrap();
        if same_file {
            guest.setup(slow.0, RANGE, RANGE, flags, (8 + i) * RANGE).unwrap();
        }
        assert!(!guest.is_answered(pending), "the slow request was not slow");
        assert_eq!(strace.ended(), 0, "the map was answered only after the slow request");
    }
    drop(strace);
    guest.on = FIRST;
    guest.result(pending).unwrap();
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows it for FSYNC.
#[test]
fn while_fsync_is_slow() {
    while_slow(SYNCS, true, |guest, (node, fh)| guest.send_fsync(node, fh));
}

/// Shows it for SYNCFS.
#[test]
fn while_syncfs_is_slow() {
    while_slow("syncfs,fsync,fdatasync", true, |guest, _| guest.send_syncfs());
}

/// Shows it for FALLOCATE.
#[test]
fn while_fallocate_is_slow() {
    while_slow("fallocate", false, |guest, (node, fh)| {
        guest.send(op::FALLOCATE, node, &abi::fallocate(fh, 0, 3 * RANGE, 0), 0)
    });
}

/// Shows it for COPY_FILE_RANGE.
#[test]
fn while_copy_file_range_is_slow() {
    while_slow("copy_file_range", false, |guest, (node, fh)| {
        let arg = abi::copy_file_range((fh, 0), (node, fh, RANGE), 4096);
        guest.send(op::COPY_FILE_RANGE, node, &arg, 8)
    });
}

/// Shows it for OPEN.
#[test]
fn while_open_is_slow() {
    while_slow("openat,openat2,open_by_handle_at", false, |guest, (node, _)| {
        guest.send(op::OPEN, node, &abi::open(libc::O_RDWR), abi::OPEN_OUT)
    });
}

/// Shows: a guest that reboots during a slow request is served at once, also by the queue of the
/// slow request.
#[test]
fn a_reboot_while_statfs_is_slow() {
    if !Strace::is_here() {
        return skip("a_reboot_while_statfs_is_slow", "no strace");
    }
    let host = FsHost::new();
    let mut guest = host.boot();
    let mut strace = Strace::attach(host.pid(), "statfs,fstatfs", HELD);
    let _slow = guest.send(op::STATFS, abi::ROOT, &abi::Arg::new(), 80);
    strace.wait_begun(1);
    guest.reset();
    guest.init();
    guest.getattr(abi::ROOT).unwrap();
    assert_eq!(strace.ended(), 0, "the guest was served only after the slow request");
    drop(strace);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows it with more slow requests at one time than a pool of threads is likely to have.
#[test]
fn while_many_are_slow() {
    if !Strace::is_here() {
        return skip("while_many_are_slow", "no strace");
    }
    let host = FsHost::with(FsOptions { request_queues: 4, ..FsOptions::default() });
    host.put("map", &vec![b'm'; 2 * RANGE as usize]);
    let mut guest = host.boot();
    let map = guest.node("map");
    guest.setup(map, 0, RANGE, MAP_READ, 0).unwrap();
    let slow: Vec<_> = (0..64).map(|i| guest.create(&format!("slow{i}")).unwrap()).collect();
    for &(node, fh) in &slow {
        guest.write(node, fh, 0, b"dirty").unwrap();
    }
    let mut strace = Strace::attach(host.pid(), SYNCS, HELD);
    let mut pending = Vec::new();
    for (i, &(node, fh)) in slow.iter().enumerate() {
        guest.on = FIRST + i % 4;
        pending.push(guest.send_fsync(node, fh));
    }
    strace.wait_begun(1);
    for queue in FIRST..FIRST + 4 {
        guest.on = queue;
        guest.setup(map, RANGE, RANGE, MAP_READ, RANGE).unwrap();
        guest.remove(&[(RANGE, RANGE)]).unwrap();
    }
    assert_eq!(strace.ended(), 0, "the maps were answered only after a slow request");
    drop(strace);
    for pending in pending {
        guest.result(pending).unwrap();
    }
    guest.power_off();
    assert!(host.ended().success());
}
