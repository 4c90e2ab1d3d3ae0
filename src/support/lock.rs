// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside all steps: the mutexes of this crate, and the order in which a thread takes them.
//!
//! Each mutex has a [`Rank`]. A debug build asserts at each lock that the thread holds only locks
//! of lower ranks. So a test that runs the two sides of a deadlock one after the other finds the
//! deadlock. A release build stores no rank and checks nothing.
//!
//! [`Condvar`] is the condition variable of these mutexes: a waiting thread keeps its rank, since
//! it takes no other lock meanwhile.

use std::ops::{Deref, DerefMut};
use std::sync;
use std::time::Duration;

pub(crate) use order::{Held, assert_free};

/// The lock order: a thread that holds a rank takes only later ones. The tables in ARCHITECTURE.md
/// and `dax/mod.rs` list what each lock guards; a test compares them with this list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Rank {
    /// `fs/lives.rs`: the turn of the thread that drops a driver's mount.
    Lives,
    /// `fs/dax/times.rs`: the observed times of one file.
    Times,
    /// `dax/sync.rs`: the invalidate lock of one space.
    Invalidate,
    /// `dax/engine.rs`: the checkout of the window.
    Window,
    /// `fs/descriptors.rs`: the turn of the thread that counts descriptors.
    Counting,
    /// `fs/dax/nodes.rs`: which files have an address space.
    Nodes,
    /// `passthrough/mod.rs`: the turn of the thread that renews the private mount.
    Renewal,
    /// `window/channel/committed.rs`: the turn of the thread whose request is at the front-end.
    Channel,
    /// `passthrough/broker.rs`: the turn of the thread whose message is at the broker process.
    Broker,
    /// `session/lifecycle.rs`: whether the device is started.
    Life,
    /// `session/restart.rs`: whether the device has dropped the last driver's state.
    Restarts,
    /// `ring/mod.rs`: the state of one ring.
    Ring,
    /// The library's vring: the indices of one queue.
    Vring,
    /// `dax/entries.rs`: the entries of one space.
    Index,
    /// `dax/wait.rs`: one bucket of threads that wait for an entry.
    Bucket,
    /// `fs/sync_errors.rs`: the guest's open files.
    Opened,
    /// All other mutexes: under them a thread takes only `Log`.
    Leaf,
    /// `support/log_limit.rs` and `support/stderr.rs`: a thread may log under any lock.
    Log,
}

impl Rank {
    /// Whether one thread may hold several locks of this rank: the locks of several files.
    #[cfg(all(debug_assertions, not(loom)))]
    const fn repeats(self) -> bool {
        matches!(self, Self::Times | Self::Invalidate)
    }
}

/// A mutex with a rank.
#[derive(Debug)]
pub(crate) struct Mutex<T> {
    #[cfg(all(debug_assertions, not(loom)))]
    rank: Rank,
    mutex: sync::Mutex<T>,
}

impl<T> Mutex<T> {
    /// A mutex of rank `Leaf`.
    pub(crate) const fn new(value: T) -> Self {
        Self::ranked(Rank::Leaf, value)
    }

    /// A mutex of `rank`.
    #[cfg_attr(not(all(debug_assertions, not(loom))), allow(unused_variables))]
    pub(crate) const fn ranked(rank: Rank, value: T) -> Self {
        Self {
            #[cfg(all(debug_assertions, not(loom)))]
            rank,
            mutex: sync::Mutex::new(value),
        }
    }

    #[cfg(all(debug_assertions, not(loom)))]
    const fn rank(&self) -> Rank {
        self.rank
    }

    #[cfg(not(all(debug_assertions, not(loom))))]
    #[allow(clippy::unused_self)]
    const fn rank(&self) -> Rank {
        Rank::Leaf
    }
}

impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

/// A locked [`Mutex`], or a locked mutex of a library.
pub struct MutexGuard<'a, T> {
    guard: sync::MutexGuard<'a, T>,
    held: Held,
}

impl<'a, T> MutexGuard<'a, T> {
    /// Takes the mutex of a library: `take` locks it.
    #[track_caller]
    pub(crate) fn of(rank: Rank, take: impl FnOnce() -> sync::MutexGuard<'a, T>) -> Self {
        let held = Held::take(rank);
        Self { guard: take(), held }
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

/// Locks `mutex`. Ignores poisoning by a panic: the guarded data is consistent at every step.
#[track_caller]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    MutexGuard::of(mutex.rank(), || mutex.mutex.lock().unwrap_or_else(|e| e.into_inner()))
}

/// Like [`lock`], but does not wait: `None` if another thread holds `mutex`.
pub(crate) fn try_lock<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    let guard = match mutex.mutex.try_lock() {
        Ok(guard) => guard,
        Err(sync::TryLockError::Poisoned(e)) => e.into_inner(),
        Err(sync::TryLockError::WouldBlock) => return None,
    };
    Some(MutexGuard { guard, held: Held::tried(mutex.rank()) })
}

/// The standard library's `Condvar`, for a [`MutexGuard`].
#[derive(Debug, Default)]
pub(crate) struct Condvar(sync::Condvar);

impl Condvar {
    pub(crate) const fn new() -> Self {
        Self(sync::Condvar::new())
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        let MutexGuard { guard, held } = guard;
        MutexGuard { guard: self.0.wait(guard).unwrap_or_else(|e| e.into_inner()), held }
    }

    /// Waits for at most `most`. Also returns whether that time has passed.
    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> (MutexGuard<'a, T>, bool) {
        let MutexGuard { guard, held } = guard;
        let waited = self.0.wait_timeout(guard, most).unwrap_or_else(|e| e.into_inner());
        (MutexGuard { guard: waited.0, held }, waited.1.timed_out())
    }
}

/// Not for loom, which runs all its threads as one: the ranks of one of them are not known there.
#[cfg(all(debug_assertions, not(loom)))]
mod order {
    use std::cell::RefCell;
    use std::marker::PhantomData;
    use std::thread::panicking;

    use super::Rank;

    thread_local! {
        static HELD: RefCell<Vec<Rank>> = const { RefCell::new(Vec::new()) };
    }

    /// One lock that this thread holds.
    #[derive(Debug)]
    pub(crate) struct Held(Rank, PhantomData<*const ()>);

    impl Held {
        /// Called before the thread takes a lock of `rank` and may wait for it.
        #[track_caller]
        pub(crate) fn take(rank: Rank) -> Self {
            let follows = |held: Rank| held < rank || held == rank && rank.repeats();
            let held = HELD.try_with(|held| held.borrow().iter().copied().max());
            if let Ok(Some(held)) = held {
                // No assert during a panic: a second panic would abort the process before the first
                // is logged.
                assert!(follows(held) || panicking(), "lock order: {rank:?} taken under {held:?}");
            }
            Self::tried(rank)
        }

        /// Called after the thread has taken a lock of `rank` without waiting for it.
        pub(crate) fn tried(rank: Rank) -> Self {
            // Fails only while the thread ends: the thread-local is destroyed.
            let _ = HELD.try_with(|held| held.borrow_mut().push(rank));
            Self(rank, PhantomData)
        }
    }

    /// Asserts that this thread holds no lock of `rank` or of a later rank.
    #[track_caller]
    pub(crate) fn assert_free(rank: Rank) {
        let held = HELD.try_with(|held| held.borrow().iter().copied().max());
        if let Ok(Some(held)) = held {
            assert!(held < rank || panicking(), "{held:?} is held where {rank:?} must be free");
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(last) = held.iter().rposition(|rank| *rank == self.0) {
                    held.swap_remove(last);
                }
            });
        }
    }
}

#[cfg(not(all(debug_assertions, not(loom))))]
mod order {
    use std::marker::PhantomData;

    use super::Rank;

    /// One lock that this thread holds.
    #[derive(Debug)]
    pub(crate) struct Held(PhantomData<*const ()>);

    impl Held {
        #[inline(always)]
        pub(crate) fn take(rank: Rank) -> Self {
            Self::tried(rank)
        }

        #[inline(always)]
        pub(crate) fn tried(_: Rank) -> Self {
            Self(PhantomData)
        }
    }

    #[inline(always)]
    pub(crate) fn assert_free(_: Rank) {}
}

#[cfg(all(test, debug_assertions, not(loom)))]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    /// Shows: a lock taken against the order panics, also where no other thread holds it. A lock
    /// that was released does not count.
    #[test]
    fn the_order_is_checked() {
        let (ring, leaf) = (Mutex::ranked(Rank::Ring, ()), Mutex::new(()));
        {
            let _ring = lock(&ring);
            let _leaf = lock(&leaf);
        }
        drop(lock(&leaf));
        drop(lock(&ring));
        let against = catch_unwind(|| {
            let _leaf = lock(&leaf);
            let _ring = lock(&ring);
        });
        assert!(against.is_err());
        assert!(catch_unwind(|| drop((lock(&leaf), lock(&Mutex::new(()))))).is_err());
        drop(lock(&ring));
    }

    /// The ranks in the first column of the tables of `page`.
    fn ranks(page: &str) -> Vec<String> {
        let name = |line: &str| {
            let line = line.trim_start_matches("//!").trim();
            Some(line.strip_prefix("| `Rank::")?.split_once('`')?.0.to_owned())
        };
        page.lines().filter_map(name).collect()
    }

    /// Shows: the tables of the lock order list the checked ranks, in the same order.
    #[test]
    fn the_tables_list_the_checked_ranks() {
        use Rank::*;
        let all = [
            Lives, Times, Invalidate, Window, Counting, Nodes, Renewal, Channel, Broker, Life,
            Restarts, Ring, Vring, Index, Bucket, Opened, Leaf, Log,
        ];
        assert!(all.is_sorted());
        assert_eq!(all.len(), Log as usize + 1);
        let names: Vec<_> = all.iter().map(|rank| format!("{rank:?}")).collect();
        assert_eq!(ranks(include_str!("../../ARCHITECTURE.md")), names);
        let engine = ranks(include_str!("../dax/mod.rs"));
        assert_eq!(engine, ["Times", "Invalidate", "Window", "Index", "Bucket", "Leaf"]);
    }
}
