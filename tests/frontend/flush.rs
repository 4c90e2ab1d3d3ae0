// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Flushes of the pmem device: which sync answers a flush, which flushes share a sync, and the
//! effect of a slow or failing disk.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;

use vhost_user_dax::device::Device as _;
use vhost_user_dax::persist::{KernelSync, LineFlush, Persist};
use vhost_user_dax::pmem::Pmem;
use vhost_user_dax::support::units::{FileOffset, FileRange};

use testkit::driver::{Answer, Driver, Offered};
use testkit::gated_sync::Gate;
use testkit::gated_sync::SyncEvent::{Began, Ended, Failed};
use testkit::{FILE_BYTES, Guest, Host};

fn flushes(driver: &mut Driver, n: usize) -> Vec<Offered> {
    (0..n).map(|_| driver.flush()).collect()
}

fn assert_all(driver: &mut Driver, flushes: Vec<Offered>, expected: Answer) {
    for flush in flushes {
        assert_eq!(driver.wait(flush), expected);
    }
}

/// A guest with one flush in a running sync, which ends only when the test opens the gate.
fn boot_into_held_sync(host: &Host) -> (Guest, Offered) {
    let mut guest = host.boot();
    host.gate.hold();
    let first = guest.driver.flush();
    host.gate.wait_begun(1);
    guest.driver.wait_taken();
    (guest, first)
}

/// Shows that a flush is answered only after a sync has ended that began after the flush was
/// offered.
#[test]
fn answer_rests_on_a_sync_that_began_after_the_flush() {
    let host = Host::new();
    let mut guest = host.boot();
    let mut open: Vec<(Offered, u64)> = Vec::new();
    let mut random = 1u32;
    for _ in 0..5000 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if open.len() < 60 && random >> 31 == 0 {
            let begun_before = host.gate.begun();
            open.push((guest.driver.flush(), begun_before));
        } else if !open.is_empty() {
            let (flush, begun_before) = open.swap_remove(random as usize % open.len());
            assert_eq!(guest.driver.wait(flush), Answer::OK);
            // Syncs do not overlap. One more sync has ended than had begun at the offer, so the
            // last one began after the offer.
            assert!(host.gate.finished() > begun_before);
        }
    }
    guest.power_off();
}

/// Durability by cache lines: notes each flushed range, and waits at the gate in each fence.
struct Lines {
    fence: Gate,
    flushed: Arc<Mutex<Vec<FileRange>>>,
}

impl LineFlush for Lines {
    fn flush(&self, range: FileRange) -> io::Result<()> {
        self.flushed.lock().unwrap().push(range);
        Ok(())
    }

    fn fence(&self) {
        self.fence.sync().unwrap();
    }
}

/// Shows, for durability by cache lines, that a flush writes back each line of the file once, and
/// is answered after the fence behind.
#[test]
fn an_answer_waits_for_the_fence() {
    let dir = tempfile::tempdir().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(FILE_BYTES).unwrap();
    let (gate, flushed) = (Gate::new(), Arc::<Mutex<Vec<FileRange>>>::default());
    let persist = Persist::lines(Lines { fence: gate.clone(), flushed: flushed.clone() });
    let pmem = Pmem::new(Arc::new(file.try_clone().unwrap()), persist).unwrap();
    let host = Host::with(dir, file, gate, pmem);
    let (mut guest, flush) = boot_into_held_sync(&host);
    assert!(!guest.driver.is_answered(flush), "the flush was answered before the fence");
    host.gate.open();
    assert_eq!(guest.driver.wait(flush), Answer::OK);
    let mut lines = flushed.lock().unwrap().clone();
    lines.sort_unstable_by_key(|range| range.from);
    let end = lines.iter().fold(FileOffset(0), |end, range| {
        assert_eq!(range.from, end, "lines were left out or flushed twice: {lines:?}");
        range.end()
    });
    assert_eq!(end, FileOffset(FILE_BYTES), "the last flushed byte is not the file's last byte");
    guest.power_off();
}

/// Shows that all flushes that wait when a sync begins share it: 101 flushes, exactly 2 syncs.
#[test]
fn waiting_flushes_share_one_sync() {
    let host = Host::new();
    let (mut guest, first) = boot_into_held_sync(&host);
    let waiting = flushes(&mut guest.driver, 100);
    guest.driver.wait_taken();
    host.gate.release_one();
    host.gate.wait_begun(2);
    assert_eq!(guest.driver.wait(first), Answer::OK);
    assert_eq!(guest.driver.used_idx(), 1);
    host.gate.release_one();
    assert_all(&mut guest.driver, waiting, Answer::OK);
    assert_eq!(host.gate.log(), [Began(1), Ended(1), Began(2), Ended(2)]);
    let counters = host.pmem.counters();
    assert_eq!((counters.flushes, counters.syncs, counters.failed), (101, 2, 0));
    guest.power_off();
}

/// Shows that a flush that is offered during a sync is answered by the next sync.
#[test]
fn flush_during_a_sync_waits_for_the_next() {
    let host = Host::new();
    let (mut guest, mut running) = boot_into_held_sync(&host);
    for k in 1..=10 {
        let late = guest.driver.flush();
        host.gate.release_one();
        assert_eq!(guest.driver.wait(running), Answer::OK);
        host.gate.wait_begun(k + 1);
        assert!(!guest.driver.is_answered(late));
        running = late;
    }
    host.gate.open();
    assert_eq!(guest.driver.wait(running), Answer::OK);
    assert_eq!(host.gate.begun(), 11);
    guest.power_off();
}

/// Shows that each of several flushes, offered one at a time, causes one sync.
#[test]
fn each_lone_flush_costs_one_sync() {
    let host = Host::new();
    let mut guest = host.boot();
    for k in 1..=20 {
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(host.gate.begun(), k);
    }
    guest.power_off();
}

/// Shows that the front-end's messages are answered during a sync.
#[test]
fn messages_are_answered_during_a_sync() {
    let host = Host::new();
    let (mut guest, first) = boot_into_held_sync(&host);
    let waiting = flushes(&mut guest.driver, 5);
    guest.driver.wait_taken();
    for _ in 0..10 {
        guest.vmm.get_config();
        guest.vmm.update_memory().unwrap();
        guest.vmm.stop();
        guest.start();
    }
    assert_eq!(host.gate.finished(), 0);
    assert_eq!(guest.driver.used_idx(), 0);
    host.gate.open();
    assert_eq!(guest.driver.wait(first), Answer::OK);
    assert_all(&mut guest.driver, waiting, Answer::OK);
    guest.power_off();
}

/// Shows that a stop moves the ring's base back before the unanswered flushes, and that each is
/// answered once after the next start, by a sync that began after that start. (The driver panics
/// at a second answer.)
#[test]
fn stop_during_a_sync_and_start_again() {
    for release_before_start in [false, true] {
        let host = Host::new();
        let mut guest = host.boot();
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        host.gate.hold();
        let mut open = flushes(&mut guest.driver, 1);
        host.gate.wait_begun(2);
        open.extend(flushes(&mut guest.driver, 7));
        guest.driver.wait_taken();
        guest.vmm.stop();
        assert_eq!(guest.vmm.base(), 1, "the base is behind the only answered flush");
        assert_eq!(guest.driver.used_idx(), 1);
        if release_before_start {
            host.gate.release_one();
            host.gate.wait_finished(2);
            guest.start();
        } else {
            guest.start();
            host.gate.release_one();
        }
        // The sync that was running at the stop answers no flush.
        host.gate.wait_begun(3);
        assert_eq!(guest.driver.used_idx(), 1);
        host.gate.open();
        assert_all(&mut guest.driver, open, Answer::OK);
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(guest.driver.used_idx(), 10);
        assert_eq!(guest.driver.outstanding(), 0);
        guest.power_off();
    }
}

/// Shows that a reset during a sync voids the flushes taken before: none is answered in the rings
/// of the new driver.
#[test]
fn reset_during_a_sync_voids_the_old_flushes() {
    let host = Host::new();
    let (mut guest, _gone) = boot_into_held_sync(&host);
    let _ = flushes(&mut guest.driver, 3);
    guest.vmm.reboot(&mut guest.driver);
    let fresh = guest.driver.flush();
    host.gate.open();
    assert_eq!(guest.driver.wait(fresh), Answer::OK);
    assert_eq!(guest.driver.used_idx(), 1);
    guest.power_off();
}

/// Shows that one failing sync fails its whole batch, each later flush, and each flush of later
/// sessions.
#[test]
fn failed_sync_fails_every_flush_from_then_on() {
    let host = Host::new();
    host.gate.fail_at(2);
    let mut guest = host.boot();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    for _ in 0..5 {
        assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    }
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    guest.power_off();
    let mut guest = host.boot();
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    guest.power_off();
    // No further sync is tried: its success would not cover the pages that were lost.
    assert_eq!(host.gate.log(), [Began(1), Ended(1), Began(2), Failed(2)]);
    assert_eq!(host.pmem.counters().failed, 9);
}

/// Shows that the flushes that share a failing sync, and the flushes that wait for the next sync,
/// fail.
#[test]
fn failed_sync_fails_its_batch_and_the_next() {
    let host = Host::new();
    host.gate.fail_at(2);
    let (mut guest, first) = boot_into_held_sync(&host);
    let second = flushes(&mut guest.driver, 20);
    guest.driver.wait_taken();
    host.gate.release_one();
    host.gate.wait_begun(2);
    let third = flushes(&mut guest.driver, 20);
    guest.driver.wait_taken();
    host.gate.release_one();
    assert_eq!(guest.driver.wait(first), Answer::OK);
    assert_all(&mut guest.driver, second, Answer::FAILED);
    assert_all(&mut guest.driver, third, Answer::FAILED);
    guest.power_off();
}

/// Shows that a shutdown during a sync returns after the sync has ended and its batch was answered,
/// and that no flush is answered later.
#[test]
fn shutdown_during_a_sync_answers_the_running_batch() {
    let host = Host::new();
    let (mut guest, first) = boot_into_held_sync(&host);
    let pmem = host.pmem.clone();
    let stopper = thread::spawn(move || pmem.shutdown());
    host.gate.open();
    stopper.join().unwrap();
    assert_eq!(host.gate.finished(), 1);
    // shutdown() has returned, so the batch was answered.
    assert!(guest.driver.is_answered(first));
    assert_eq!(guest.driver.wait(first), Answer::OK);
    let late = guest.driver.flush();
    guest.driver.wait_taken();
    guest.vmm.stop();
    assert!(!guest.driver.is_answered(late));
    assert_eq!(host.gate.begun(), 1);
    host.pmem.shutdown();
    drop(guest.vmm);
    guest.session.ended().unwrap();
}

/// Shows that the session ends at once when the front-end is killed during a sync, and that a flush
/// of the next guest is answered by a sync of its own.
#[test]
fn disconnect_in_the_middle_of_a_sync() {
    let host = Host::new();
    let (mut guest, _gone) = boot_into_held_sync(&host);
    let _ = flushes(&mut guest.driver, 3);
    guest.kill();
    assert_eq!(host.gate.finished(), 0);
    let mut guest = host.boot();
    let flush = guest.driver.flush();
    guest.driver.wait_taken();
    host.gate.release_one();
    host.gate.wait_begun(2);
    assert!(!guest.driver.is_answered(flush));
    host.gate.open();
    assert_eq!(guest.driver.wait(flush), Answer::OK);
    assert_eq!(guest.driver.used_idx(), 1);
    guest.power_off();
}
