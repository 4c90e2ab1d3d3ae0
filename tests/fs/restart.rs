// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver that resets the device: the state of the last driver is dropped before a ring of the
//! new driver is served, and late requests of the last driver do not touch state of the new one.

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest};
use testkit::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op};
use testkit::slow::{DELAY, Strace, skip};

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// The last system call that dropping a mapped file makes.
const FORGETS: &str = "inotify_rm_watch";
/// A request queue that the first driver does not use.
const SECOND: usize = FIRST + 1;

fn host() -> FsHost {
    let host =
        FsHost::with(FsOptions { request_queues: 2, mem_slots: false, ..FsOptions::default() });
    host.put("file", &vec![b'f'; RANGE as usize]);
    host
}

/// Maps a file, and stores to it.
fn dirty(guest: &mut FsGuest) -> (u64, u64) {
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"dirty"));
    (node, fh)
}

/// The file is mapped, stored to and synced, and nothing of it is EIO.
fn works(host: &FsHost, guest: &mut FsGuest, bytes: &[u8]) {
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, bytes));
    guest.fsync(node, fh).unwrap();
    assert_eq!(host.get("file")[..bytes.len()], *bytes);
}

/// Shows: the ring by which the daemon notices the reset is served last, after another ring has
/// served INIT. The file system then stays mounted, and the maps stay granted.
#[test]
fn init_on_a_ring_that_overtakes() {
    let host = host();
    let mut guest = host.boot();
    for round in 0..5_u8 {
        guest.on = FIRST;
        works(&host, &mut guest, &[round, 1]);
        guest.reset_and_enable(SECOND);
        guest.on = SECOND;
        guest.init();
        works(&host, &mut guest, &[round, 2]);
        guest.enable(0);
        guest.enable(FIRST);
        guest.on = FIRST;
        guest.getattr(abi::ROOT).unwrap();
        assert_eq!(guest.vmm.live_maps(), 1);
        // A second grant of the same range replaces the first one; QEMU would refuse an overlap
        // (Q4).
        works(&host, &mut guest, &[round, 3]);
        assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
    }
    guest.power_off();
}

/// Shows: while the device drops the maps of the last driver, no other ring serves the new driver,
/// whose maps would be dropped as well.
#[test]
fn init_while_the_device_still_forgets() {
    if !Strace::is_here() {
        return skip("init_while_the_device_still_forgets", "no strace");
    }
    let host = host();
    let mut guest = host.boot();
    dirty(&mut guest);
    let mut strace = Strace::attach(host.pid(), FORGETS, DELAY);
    guest.reset_and_enable(FIRST);
    strace.wait_begun(1);
    guest.enable(SECOND);
    guest.enable(0);
    guest.on = SECOND;
    guest.init();
    assert_eq!(strace.ended(), 1, "INIT was served before the last driver's state was dropped");
    drop(strace);
    works(&host, &mut guest, b"new");
    guest.on = FIRST;
    works(&host, &mut guest, b"newer");
    assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
    guest.power_off();
}

/// Shows: a DESTROY of the last driver that still runs when the new driver mounts neither unmounts,
/// nor closes files, nor removes maps of the new driver.
#[test]
fn a_late_destroy_does_not_touch_the_new_driver() {
    if !Strace::is_here() {
        return skip("a_late_destroy_does_not_touch_the_new_driver", "no strace");
    }
    let host = host();
    let mut guest = host.boot();
    dirty(&mut guest);
    let mut strace = Strace::attach(host.pid(), FORGETS, DELAY);
    let _never_answered = guest.send(op::DESTROY, 0, &abi::Arg::new(), 0);
    strace.wait_begun(1);
    guest.reset();
    guest.init();
    let (node, fh) = guest.opened("file");
    strace.wait_ended(1);
    drop(strace);
    // Nothing shows when the late DESTROY has ended, so the new driver's file is read several
    // times.
    for _ in 0..300 {
        guest.getattr(node).unwrap();
        assert_eq!(guest.read(node, fh, 1, 4).unwrap(), b"irty");
    }
    works(&host, &mut guest, b"new");
    guest.fsync(node, fh).unwrap();
    guest.destroy();
    guest.power_off();
    assert!(host.ended().success());
}
