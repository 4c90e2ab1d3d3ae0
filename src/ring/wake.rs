// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: how the rings wake their watchdog. Knows no ring.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::lock::{Condvar, Mutex, lock};

/// Shared by the rings of a session and their watchdog thread.
#[derive(Default)]
pub(crate) struct Wake {
    asleep: AtomicBool,
    over: Mutex<bool>,
    changed: Condvar,
}

impl Wake {
    /// Wakes the watchdog: the calling thread is about to serve a request itself. Called under the
    /// ring's lock. The watchdog looks for such requests under the same lock before it sleeps:
    /// either this thread sees `asleep`, or the watchdog sees the request.
    pub(crate) fn wake(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            drop(lock(&self.over));
            self.changed.notify_one();
        }
    }

    /// Ends the watchdog thread.
    pub(crate) fn end(&self) {
        *lock(&self.over) = true;
        self.changed.notify_one();
    }

    /// Whether the watchdog thread shall end.
    pub(crate) fn is_over(&self) -> bool {
        *lock(&self.over)
    }

    /// Called by the watchdog thread: waits for `tick`, or less.
    pub(crate) fn tick(&self, tick: Duration) {
        let over = lock(&self.over);
        if !*over {
            drop(self.changed.wait_timeout(over, tick));
        }
    }

    /// Called by the watchdog thread: sleeps until a ring [wakes](Self::wake) it or it shall end.
    /// Does not sleep if `is_serving` returns true: a ring's thread serves a request already.
    /// `is_serving` takes ring locks, so it is called without `over`.
    pub(crate) fn sleep(&self, is_serving: impl FnOnce() -> bool) {
        self.asleep.store(true, Ordering::SeqCst);
        if is_serving() {
            self.asleep.store(false, Ordering::SeqCst);
        }
        let mut over = lock(&self.over);
        while self.asleep.load(Ordering::SeqCst) && !*over {
            over = self.changed.wait(over);
        }
    }
}
