// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: who waits for an entry to be unlocked (behaviour 2). Knows no index.
//!
//! A waiter joins its bucket while it still holds the index lock under which it saw the entry
//! locked, and whoever unlocks the entry does so under that same lock. So every unlock comes either
//! before the look or after the joining, and no wake-up is lost.

use std::sync::atomic::{AtomicU64, Ordering}; // It only counts: not for the model checker.

use super::entry::PageIndex;
use super::sync::{Arc, Condvar, Mutex, lock, ranked, wait};
use crate::support::lock::Rank;

/// As many as the kernel has.
#[cfg(not(loom))]
const BUCKETS: usize = 4096;
/// One, so that the model checker also sees two keys in one bucket.
#[cfg(loom)]
const BUCKETS: usize = 1;

/// A number that no other address space of the same table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpaceId(pub u64);

/// What one waits for: the first page of an entry. All pages of a PMD share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) space: SpaceId,
    pub(crate) start: PageIndex,
}

impl Key {
    fn bucket(self) -> usize {
        // Fibonacci hashing: the high bits of the product are well mixed.
        let mixed =
            (self.space.0.rotate_left(32) ^ self.start.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as usize % BUCKETS
    }
}

/// How many to wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// An unlock: whoever comes first takes the entry.
    One,
    /// The entry is gone or has another order: everyone must look again.
    All,
}

/// One who waits.
pub(crate) struct Waiter {
    key: Key,
    woken: Mutex<bool>,
    bell: Condvar,
}

impl Waiter {
    /// Sleeps until woken. The index lock must have been let go.
    pub(crate) fn sleep(&self) {
        let mut woken = lock(&self.woken);
        while !*woken {
            woken = wait(&self.bell, woken);
        }
    }

    fn wake(&self) {
        *lock(&self.woken) = true;
        self.bell.notify_one();
    }
}

/// The waiters of all address spaces, hashed by key.
pub struct WaitTable {
    buckets: Box<[Mutex<Vec<Arc<Waiter>>>]>,
    joined: AtomicU64,
}

impl Default for WaitTable {
    fn default() -> Self {
        let buckets = (0..BUCKETS).map(|_| ranked(Rank::Bucket, Vec::new())).collect();
        Self { buckets, joined: AtomicU64::new(0) }
    }
}

impl WaitTable {
    fn bucket(&self, key: Key) -> Option<&Mutex<Vec<Arc<Waiter>>>> {
        self.buckets.get(key.bucket())
    }

    /// Joins those who wait for `key`. The caller holds the index lock, lets it go, and then
    /// [sleeps](Waiter::sleep).
    pub(crate) fn join(&self, key: Key) -> Arc<Waiter> {
        self.joined.fetch_add(1, Ordering::Relaxed);
        let waiter = Arc::new(Waiter { key, woken: Mutex::new(false), bell: Condvar::new() });
        if let Some(bucket) = self.bucket(key) {
            lock(bucket).push(waiter.clone());
        }
        waiter
    }

    /// Wakes those who wait for `key`, the longest waiting first.
    pub(crate) fn wake(&self, key: Key, how_many: Wake) {
        let Some(bucket) = self.bucket(key) else { return };
        let mut bucket = lock(bucket);
        match how_many {
            Wake::One => {
                if let Some(first) = bucket.iter().position(|waiter| waiter.key == key) {
                    bucket.remove(first).wake();
                }
            }
            Wake::All => bucket.retain(|waiter| {
                let wanted = waiter.key == key;
                if wanted {
                    waiter.wake();
                }
                !wanted
            }),
        }
    }

    /// How many have ever waited.
    pub fn joined(&self) -> u64 {
        self.joined.load(Ordering::Relaxed)
    }

    /// How many wait for anything.
    pub fn waiting(&self) -> usize {
        self.buckets.iter().map(|bucket| lock(bucket).len()).sum()
    }
}
