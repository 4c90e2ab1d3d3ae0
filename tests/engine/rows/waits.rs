// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 2 and 4: which threads wait, which are woken, and that no wake-up is lost.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::thread;

use vhost_user_dax::dax::entries::Entries;
use vhost_user_dax::dax::entry::{Entry, Order, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::Mark;

use super::entries::{new_entries, no_unmap, put};
use super::{Fixture, pmd, pte, receive, until};

/// Starts a thread that grabs a PTE entry, holds it until the barrier if there is one, and sends
/// it.
fn grabber(entries: &Arc<Entries>, page: u64, hold: Option<Arc<Barrier>>) -> Receiver<Entry> {
    let (sender, receiver) = channel();
    let entries = entries.clone();
    thread::spawn(move || {
        let held = entries.grab(PageIndex(page), Order::Pte, &mut |_, _| ()).unwrap();
        if let Some(barrier) = hold {
            barrier.wait();
        }
        sender.send(held.entry()).unwrap();
    });
    receiver
}

/// Row 2: threads that wait on different pages of one PMD entry wait on the same key: each unlock
/// wakes the next one, until all have held the entry.
#[test]
fn row_02_waiters_on_all_pages_of_a_pmd_share_one_key() {
    let (entries, waits) = new_entries();
    put(&entries, PMD_PAGES, pmd(PMD_PAGES));
    let held = entries.grab(PageIndex(PMD_PAGES + 9), Order::Pmd, &mut no_unmap).unwrap();
    let waiters: Vec<_> = [0, 1, 255, PMD_PAGES - 1]
        .into_iter()
        .enumerate()
        .map(|(n, page)| {
            let waiter = grabber(&entries, PMD_PAGES + page, None);
            until(|| waits.waiting() == n + 1);
            waiter
        })
        .collect();
    drop(held);
    for waiter in &waiters {
        assert_eq!(receive(waiter), pmd(PMD_PAGES));
    }
    assert_eq!(waits.waiting(), 0);
}

/// Row 2: unlocking an entry of another page does not wake the waiter.
#[test]
fn row_02_only_the_same_key_is_woken() {
    let (entries, waits) = new_entries();
    let held = entries.grab(PageIndex(1), Order::Pte, &mut no_unmap).unwrap();
    let waiter = grabber(&entries, 1, None);
    until(|| waits.waiting() == 1);
    for page in 2..10_000 {
        put(&entries, page, Entry::empty(Order::Pte));
        entries.delete(PageIndex(page)).unwrap();
    }
    assert_eq!((waits.waiting(), waits.joined()), (1, 1), "a waiter was woken needlessly");
    drop(held);
    receive(&waiter);
}

/// Row 2: a deletion or a split wakes all waiters; then each holds a PTE entry of its own, at the
/// same time.
#[test]
fn row_02_removal_and_change_of_order_wake_all() {
    for split in [false, true] {
        let (entries, waits) = new_entries();
        put(&entries, 0, Entry::zero(Order::Pmd));
        let held = entries.grab(PageIndex(0), Order::Pmd, &mut no_unmap).unwrap();
        let all_hold = Arc::new(Barrier::new(4));
        let waiters: Vec<_> = (0..4)
            .map(|n| {
                let waiter = grabber(&entries, 100 * n, Some(all_hold.clone()));
                until(|| waits.waiting() == n as usize + 1);
                waiter
            })
            .collect();
        // In the split case the first thread that wakes splits the entry, which wakes the others.
        if split {
            drop(held)
        } else {
            held.delete()
        }
        for waiter in &waiters {
            assert_eq!(receive(waiter), Entry::empty(Order::Pte));
        }
        assert_eq!(waits.waiting(), 0);
    }
}

/// Two waiters: the first one does not lock the entry after its wait, the second one does.
fn first_does_not_lock(first: impl FnOnce(&Entries) + Send + 'static) {
    let (entries, waits) = new_entries();
    put(&entries, 0, pte(0));
    let held = entries.grab(PageIndex(0), Order::Pte, &mut no_unmap).unwrap();
    held.mark(Mark::Dirty, true);
    let of_first = entries.clone();
    let (sender, receiver) = channel();
    thread::spawn(move || {
        first(&of_first);
        sender.send(()).unwrap();
    });
    until(|| waits.waiting() == 1);
    let second = grabber(&entries, 0, None);
    until(|| waits.waiting() == 2);
    drop(held);
    receive(&receiver);
    assert_eq!(receive(&second), pte(0));
}

/// Row 4: a PMD request that finds a PTE entry after its wait passes the wake-up on.
#[test]
fn row_04_a_refused_grab_passes_the_wake_up_on() {
    first_does_not_lock(|entries| {
        assert!(entries.grab(PageIndex(0), Order::Pmd, &mut no_unmap).is_err());
    });
}

/// Row 4: an invalidation that finds the entry dirty passes the wake-up on.
#[test]
fn row_04_a_failed_invalidation_passes_the_wake_up_on() {
    first_does_not_lock(|entries| assert!(!entries.invalidate_clean(PageIndex(0))));
}

/// Row 4: a flusher whose entry was flushed by another one passes the wake-up on.
#[test]
fn row_04_a_flusher_that_comes_late_passes_the_wake_up_on() {
    let fixture = Arc::new(Fixture::new(1));
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    let gate = fixture.persist.stop_in_flush();
    let run = |job: fn(&Fixture)| {
        let (sender, receiver) = channel();
        let shared = fixture.clone();
        thread::spawn(move || {
            job(&shared);
            sender.send(()).unwrap();
        });
        receiver
    };
    let first = run(|fixture| fixture.sync().unwrap());
    gate.wait_stopped();
    // Both syncs mark the entry ToWrite again; one of them flushes it, and the other finds it
    // flushed.
    let second = run(|fixture| fixture.sync().unwrap());
    fixture.until_waits(1);
    let third = run(|fixture| fixture.sync().unwrap());
    fixture.until_waits(2);
    let grant = run(|fixture| fixture.grant(0, 1, 1, Access::Write).unwrap());
    fixture.until_waits(3);
    gate.open();
    for receiver in [first, second, third, grant] {
        receive(&receiver);
    }
    assert_eq!(fixture.flushed().len(), 2);
}
