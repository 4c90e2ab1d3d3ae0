// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the threads that wait for an entry to be unlocked (behaviour 2). Knows no index.
//!
//! No wake-up is lost: the waiting thread looks at the entry and joins its bucket under one hold of
//! the index lock, and the unlocking thread changes the entry under the index lock before it wakes
//! the bucket. So the waiting thread either sees the entry unlocked, or is in the bucket when the
//! unlocking thread wakes it.

use std::sync::atomic::{AtomicU64, Ordering}; // Not loom's: this atomic is only a counter.

use super::entry::PageIndex;
use super::sync::{Arc, Condvar, Mutex, lock, ranked, wait};
use crate::support::lock::Rank;

/// Number of wait buckets: as in Linux fs/dax.c (`DAX_WAIT_TABLE_ENTRIES`).
#[cfg(not(loom))]
const BUCKETS: usize = 4096;
/// Number of wait buckets: 1, so that the model checker sees two keys in one bucket.
#[cfg(loom)]
const BUCKETS: usize = 1;

/// The number of a space, unique among the spaces that share a [`WaitTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SpaceId(pub u64);

/// The entry that a thread waits for: its space and first page. All pages of a PMD have one key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key {
    pub(crate) space: SpaceId,
    pub(crate) start: PageIndex,
}

impl Key {
    fn bucket(self) -> usize {
        // Fibonacci hashing: the factor is 2^64 divided by the golden ratio, and the high bits of
        // the product depend on all bits of the key.
        let mixed =
            (self.space.0.rotate_left(32) ^ self.start.0).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed >> 40) as usize % BUCKETS
    }
}

/// Which waiters of a key to wake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    /// The longest waiting thread: the entry was unlocked, and one thread can lock it.
    One,
    /// All waiting threads: the entry was deleted or split, and each thread must look again.
    All,
}

/// One thread that waits for an entry.
pub(crate) struct Waiter {
    key: Key,
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Waiter {
    /// Sleeps until woken. The caller must have released the index lock.
    pub(crate) fn sleep(&self) {
        let mut woken = lock(&self.woken);
        while !*woken {
            woken = wait(&self.changed, woken);
        }
    }

    fn wake(&self) {
        *lock(&self.woken) = true;
        self.changed.notify_one();
    }
}

/// The waiters of all spaces of an engine, hashed by key.
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

    /// Adds a waiter for `key`. The caller holds the index lock, releases it after this call, and
    /// then [sleeps](Waiter::sleep).
    pub(crate) fn join(&self, key: Key) -> Arc<Waiter> {
        self.joined.fetch_add(1, Ordering::Relaxed);
        let waiter = Arc::new(Waiter { key, woken: Mutex::new(false), changed: Condvar::new() });
        if let Some(bucket) = self.bucket(key) {
            lock(bucket).push(waiter.clone());
        }
        waiter
    }

    /// Wakes the waiters of `key`, the longest waiting first.
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

    /// Number of waits since the start.
    pub fn joined(&self) -> u64 {
        self.joined.load(Ordering::Relaxed)
    }

    /// Number of threads that wait now.
    pub fn waiting(&self) -> usize {
        self.buckets.iter().map(|bucket| lock(bucket).len()).sum()
    }
}
