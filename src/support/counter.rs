// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A statistics counter: relaxed atomics, which order no other access.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number of events or bytes.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    pub(crate) fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }
}
