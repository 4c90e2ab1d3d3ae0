// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows the effect of a stop, a start and a reset on requests in flight and on live maps.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{MAP_READ, MAP_WRITE, ROOT};
use testkit::slow::{DELAY, HELD, SYNCS, Strace, skip};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

const BOTH: u64 = MAP_READ | MAP_WRITE;

/// A guest with an open file that has bytes to sync.
fn dirty_guest(host: &FsHost) -> (FsGuest, u64, u64) {
    host.put("file", &vec![b'f'; 4 * RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.write(node, fh, 0, b"dirty").unwrap();
    (guest, node, fh)
}

/// Requests of all kinds, one after the other. A wrong reply would have another request's number.
fn many_requests(guest: &mut FsGuest) {
    for _round in 0..100 {
        guest.getattr(ROOT).unwrap();
        guest.statfs().unwrap();
    }
    for queue in &mut guest.queues {
        assert_eq!(queue.outstanding(), 0);
    }
}

/// Shows that a pause does not wait for a slow FSYNC, and that its reply comes once, after the
/// continue.
#[test]
fn a_pause_with_a_slow_fsync() {
    if !Strace::is_here() {
        return skip("a_pause_with_a_slow_fsync", "no strace");
    }
    let host = FsHost::new();
    let (mut guest, node, fh) = dirty_guest(&host);
    let mut strace = Strace::attach(host.pid(), SYNCS, HELD);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.vmm.stop();
    assert_eq!(strace.ended(), 0, "the stop waited for the disk");
    assert!(!guest.is_answered(fsync));
    guest.start();
    guest.getattr(node).unwrap();
    assert_eq!(strace.ended(), 0, "the continue, or a request after it, waited for the disk");
    assert!(!guest.is_answered(fsync), "answered before the disk was done");
    drop(strace);
    guest.result(fsync).unwrap();
    many_requests(&mut guest);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that an FSYNC that ends during a pause is answered once, after the continue, and that
/// guest memory is not written before.
#[test]
fn an_fsync_that_ends_during_a_pause() {
    if !Strace::is_here() {
        return skip("an_fsync_that_ends_during_a_pause", "no strace");
    }
    let host = FsHost::new();
    let (mut guest, node, fh) = dirty_guest(&host);
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.vmm.stop();
    let ram: Vec<u8> = guest.peek(0, guest.scratch as usize);
    strace.wait_ended(1);
    drop(strace);
    // Guest memory is read again after another process has synced a second file: the daemon had
    // time to write.
    std::fs::File::open(host.path("file")).unwrap().sync_all().unwrap();
    assert!(guest.peek(0, guest.scratch as usize) == ram, "written while stopped");
    guest.start();
    guest.result(fsync).unwrap();
    many_requests(&mut guest);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that a request from before a reset is never answered.
#[test]
fn a_reset_with_a_slow_fsync() {
    if !Strace::is_here() {
        return skip("a_reset_with_a_slow_fsync", "no strace");
    }
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    let (mut guest, node, fh) = dirty_guest(&host);
    let mut strace = Strace::attach(host.pid(), SYNCS, HELD);
    let _never_answered = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.reset();
    assert_eq!(strace.ended(), 0, "the reset waited for the disk");
    guest.init();
    many_requests(&mut guest);
    assert_eq!(strace.ended(), 0, "the new driver waited for the disk of the last one");
    drop(strace);
    host.wait_idle();
    many_requests(&mut guest);
    let (node, fh) = guest.opened("file");
    guest.fsync(node, fh).unwrap();
    many_requests(&mut guest);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that maps stay during a pause: grants stay, no message is sent again, and more ranges can
/// be granted.
#[test]
fn maps_outlive_a_pause() {
    for mem_slots in [true, false] {
        let host = FsHost::with(FsOptions { mem_slots, ..FsOptions::default() });
        let (mut guest, node, _fh) = dirty_guest(&host);
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        guest.setup(node, RANGE, RANGE, MAP_READ, 3 * RANGE).unwrap();
        let sent = guest.vmm.map_requests() + guest.vmm.unmap_requests();
        for _pause in 0..3 {
            guest.vmm.stop();
            guest.start();
            assert_eq!(guest.vmm.fetch(0, 5).unwrap(), b"dirty");
            assert_eq!(guest.vmm.fetch(3 * RANGE, 2).unwrap(), b"ff");
            guest.getattr(node).unwrap();
        }
        assert_eq!(guest.vmm.map_requests() + guest.vmm.unmap_requests(), sent);
        assert!(guest.vmm.store(7, b"after the pause"));
        assert_eq!(&host.get("file")[7..22], b"after the pause");
        guest.setup(node, 2 * RANGE, RANGE, BOTH, RANGE).unwrap();
        guest.remove(&[(0, RANGE), (RANGE, RANGE), (3 * RANGE, RANGE)]).unwrap();
        assert_eq!(guest.vmm.mapped_bytes(), 0);
        assert_eq!(guest.vmm.refused(), [""; 0]);
        guest.power_off();
        assert!(host.ended().success());
    }
}

/// Shows that SETUPMAPPING and REMOVEMAPPING that meet a stop are done before it or after the next
/// start, not in between, where QEMU would crash.
#[test]
fn maps_that_meet_a_stop() {
    let host = FsHost::new();
    let (mut guest, node, _fh) = dirty_guest(&host);
    for round in 0..100 {
        let pending: Vec<_> = (0..4)
            .map(|i| guest.send_setup(node, i * RANGE, RANGE, BOTH, (round + i) % 8 * RANGE))
            .collect();
        guest.vmm.stop();
        guest.vmm.check();
        let between = guest.vmm.map_requests();
        guest.vmm.check();
        assert_eq!(guest.vmm.map_requests(), between);
        guest.start();
        for pending in pending {
            guest.result(pending).unwrap();
        }
        for i in 0..4 {
            let at = (round + i) % 8 * RANGE;
            assert_eq!(guest.vmm.fetch(at + RANGE - 2, 2).unwrap(), b"ff");
        }
        let ranges: Vec<_> = (0..4).map(|i| ((round + i) % 8 * RANGE, RANGE)).collect();
        guest.remove(&ranges).unwrap();
        assert_eq!(guest.vmm.mapped_bytes(), 0, "round {round}");
    }
    assert_eq!(guest.vmm.refused(), [""; 0]);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that after a reset no range counts as mapped: each can be granted again, and then shows
/// its file. (Without memory slots: with them QEMU crashes, whatever the back-end does.)
#[test]
fn no_map_stays_after_a_reset() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    host.put("other", &vec![b'o'; RANGE as usize]);
    let (mut guest, mut node, _fh) = dirty_guest(&host);
    for _round in 0..5 {
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        guest.setup(node, RANGE, RANGE, BOTH, RANGE).unwrap();
        guest.reset();
        guest.init();
        assert_eq!(guest.vmm.mapped_bytes(), 0, "mapped without a request");
        let other = guest.node("other");
        node = guest.node("file");
        guest.setup(other, 0, RANGE, BOTH, RANGE).unwrap();
        assert_eq!(guest.vmm.fetch(RANGE, 2).unwrap(), b"oo");
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        assert_eq!(guest.vmm.fetch(0, 5).unwrap(), b"dirty");
        guest.remove(&[(0, RANGE), (RANGE, RANGE)]).unwrap();
    }
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that a reboot after DESTROY works with memory slots, too.
#[test]
fn a_clean_reboot() {
    let host = FsHost::new();
    let (mut guest, mut node, _fh) = dirty_guest(&host);
    for _boot in 0..3 {
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        guest.destroy();
        guest.reset();
        guest.init();
        node = guest.node("file");
    }
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that SIGTERM during a slow FSYNC lets it finish and answers it, removes the socket, and
/// ends with code 0.
#[test]
fn sigterm_with_a_slow_fsync() {
    if !Strace::is_here() {
        return skip("sigterm_with_a_slow_fsync", "no strace");
    }
    let mut host = FsHost::new();
    let socket = host.dir.path().join("sock");
    let (mut guest, node, fh) = dirty_guest(&host);
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    kill(Pid::from_raw(host.pid() as i32), Signal::SIGTERM).unwrap();
    guest.result(fsync).unwrap();
    assert!(strace.ended() >= 1, "answered before the disk was done");
    drop(strace);
    assert!(host.wait_end().success());
    assert!(!socket.exists(), "the socket is left");
    guest.vmm.check();
}

/// Shows that a VM which is killed during a slow FSYNC ends the daemon with code 0.
#[test]
fn a_vm_that_is_killed_with_a_slow_fsync() {
    if !Strace::is_here() {
        return skip("a_vm_that_is_killed_with_a_slow_fsync", "no strace");
    }
    let host = FsHost::new();
    let (mut guest, node, fh) = dirty_guest(&host);
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let _never_answered = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.kill();
    assert!(host.ended().success());
    drop(strace);
}

/// Shows that the next VM is served after the last one has left a slow FSYNC behind. Its session
/// begins when that FSYNC has ended (docs/invariants.md, 18).
#[test]
fn the_next_vm_need_not_wait_for_the_last_ones_disk() {
    if !Strace::is_here() {
        return skip("the_next_vm_need_not_wait_for_the_last_ones_disk", "no strace");
    }
    let host = FsHost::with(FsOptions { keep_listening: true, ..FsOptions::default() });
    let (mut guest, node, fh) = dirty_guest(&host);
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let _never_answered = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.kill();
    let mut next = host.boot();
    let (node, fh) = next.opened("file");
    assert_eq!(next.read(node, fh, 0, 5).unwrap(), b"dirty");
    next.setup(node, 0, RANGE, BOTH, RANGE).unwrap();
    assert_eq!(next.vmm.fetch(RANGE, 5).unwrap(), b"dirty");
    many_requests(&mut next);
    strace.wait_ended(1);
    many_requests(&mut next);
    drop(strace);
    next.power_off();
}

/// Protocol features that the front-end does not have. Without SHARED_OBJECT the vhost library
/// sends each map.
const LACKS: [Protocol; 2] = [Protocol::empty(), Protocol::SHARED_OBJECT];

/// A VM whose front-end has read a map message, and never answers it.
fn hung_in_a_map(host: &FsHost, lacks: Protocol) -> FsGuest {
    host.put("file", &vec![b'f'; RANGE as usize]);
    let mut guest = host.plug_lacking(lacks);
    guest.start();
    guest.init();
    let (node, _) = guest.opened("file");
    guest.vmm.hang_in_map();
    let _never_answered = guest.send_setup(node, 0, RANGE, BOTH, 0);
    guest.vmm.wait_map_requests(1);
    guest
}

/// Shows that SIGTERM ends a daemon whose front-end does not answer a map, with each sender of the
/// map.
#[test]
fn sigterm_with_a_map_that_is_never_answered() {
    for lacks in LACKS {
        let mut host = FsHost::new();
        let guest = hung_in_a_map(&host, lacks);
        kill(Pid::from_raw(host.pid() as i32), Signal::SIGTERM).unwrap();
        assert!(host.wait_end().success(), "{lacks:?}");
        drop(guest);
    }
}

/// Shows that the next front-end is served after one that did not answer a map, hung up, and kept
/// the back-end channel open, with each sender of the map.
#[test]
fn the_next_vm_behind_a_map_that_is_never_answered() {
    for lacks in LACKS {
        let host = FsHost::with(FsOptions { keep_listening: true, ..FsOptions::default() });
        let first = hung_in_a_map(&host, lacks);
        first.vmm.hang_up();
        host.wait_said("session ended");
        let mut next = host.boot();
        let (node, _) = next.opened("file");
        next.setup(node, 0, RANGE, BOTH, 0).unwrap();
        next.power_off();
        drop(first);
    }
}
