// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The flush: what its answer promises, who shares a sync, and what a slow or failing disk does.

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

/// A guest with one flush in a sync that the test holds open.
fn boot_into_held_sync(host: &Host) -> (Guest, Offered) {
    let mut guest = host.boot();
    host.gate.hold();
    let first = guest.driver.flush();
    host.gate.wait_begun(1);
    guest.driver.wait_taken();
    (guest, first)
}

/// Shows that an answer comes only after the end of a sync that began after the flush was offered.
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
            // Syncs follow one another: the next one after those has ended, so it began after the
            // offer.
            assert!(host.gate.finished() > begun_before);
        }
    }
    guest.power_off();
}

/// Durability by cache lines: each flush is noted, and the fence is a gate.
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

/// Shows, where only cache lines make a store durable: all of the file is written back, each line
/// once, and the answer waits for the fence behind it.
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
    assert!(!guest.driver.is_answered(flush), "an answer before the fence");
    host.gate.open();
    assert_eq!(guest.driver.wait(flush), Answer::OK);
    let mut lines = flushed.lock().unwrap().clone();
    lines.sort_unstable_by_key(|range| range.from);
    let end = lines.iter().fold(FileOffset(0), |end, range| {
        assert_eq!(range.from, end, "a gap, or lines that come twice: {lines:?}");
        range.end()
    });
    assert_eq!(end, FileOffset(FILE_BYTES), "the last byte");
    guest.power_off();
}

/// Shows that all flushes which wait when a sync begins share it: 101 flushes, exactly 2 syncs.
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

/// Shows that a flush which comes during a sync is not answered by it, but by the next one.
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

/// Shows that a flush without anything else begins a sync, and one flush costs one.
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

/// Shows that every message is answered while a sync is held open for as long as it takes.
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

/// Shows that a stop hands back what is unanswered, and that after the next start each is
/// answered once, by a sync that began after it. (The driver panics at a second answer.)
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
        assert_eq!(guest.vmm.base(), 1, "the base is behind the one answered flush");
        assert_eq!(guest.driver.used_idx(), 1);
        if release_before_start {
            host.gate.release_one();
            host.gate.wait_finished(2);
            guest.start();
        } else {
            guest.start();
            host.gate.release_one();
        }
        // The sync that ran over the stop answers nobody.
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

/// Shows that a reset during a sync voids what was taken: nothing of it appears in the new rings.
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

/// Shows that one failing sync fails its whole batch, each later flush, and the next sessions'.
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
    // A later success would say nothing about what was lost, so none is tried.
    assert_eq!(host.gate.log(), [Began(1), Ended(1), Began(2), Failed(2)]);
    assert_eq!(host.pmem.counters().failed, 9);
}

/// Shows that all who share a failing sync, and those who wait behind it, get the failure.
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

/// Shows that a shutdown during a sync ends after it, and after its batch was answered; and that
/// nothing is answered later.
#[test]
fn shutdown_during_a_sync_answers_the_running_batch() {
    let host = Host::new();
    let (mut guest, first) = boot_into_held_sync(&host);
    let pmem = host.pmem.clone();
    let stopper = thread::spawn(move || pmem.shutdown());
    host.gate.open();
    stopper.join().unwrap();
    assert_eq!(host.gate.finished(), 1);
    // Answered already: shutdown() came back.
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

/// Shows that a front-end which vanishes in the middle of a sync does not hold up the session's
/// end, and that the next guest is served, by its own sync.
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
