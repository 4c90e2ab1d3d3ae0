// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: whether the device is started, which decides whether the front-end may be sent a
//! map (Q1). Many look at it, and two threads change it. Knows no ring.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::lock::lock;

/// Started, or not.
#[derive(Default)]
pub(crate) struct Life {
    started: AtomicBool,
    /// Held from the start of a ring until the flag says so. Ring locks are taken under it.
    change: Mutex<()>,
}

impl Life {
    /// Whether no ring was stopped since the last start.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Lets `start` start a ring, if it can be. No stop comes in between: it would leave a device
    /// that is stopped and says that it is started, and the next map would kill the VM.
    pub(crate) fn start<T>(&self, start: impl FnOnce() -> Option<T>) -> Option<T> {
        let _change = lock(&self.change);
        let ring = start()?;
        self.started.store(true, Ordering::SeqCst);
        Some(ring)
    }

    /// Does something that a stop must undo, unless one has come already.
    pub(crate) fn if_started<T>(&self, then: impl FnOnce() -> T) -> Option<T> {
        let _change = lock(&self.change);
        self.is_started().then(then)
    }

    /// The device is not started any more; `undo` undoes what the start did. The ring must not be
    /// ready any more, so that no start comes behind this one's back.
    pub(crate) fn stop(&self, undo: impl FnOnce()) {
        // First of all: who is about to send a map must not, and must not keep us waiting.
        self.started.store(false, Ordering::SeqCst);
        let _change = lock(&self.change);
        self.started.store(false, Ordering::SeqCst);
        undo();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Barrier};
    use std::thread;

    use super::*;

    /// Shows: however a start and a stop meet, a device whose ring was stopped is not started, and
    /// nothing that was done for the start is left.
    #[test]
    fn a_stop_beside_a_start() {
        const ROUNDS: usize = 20_000;
        let barrier = Arc::new(Barrier::new(2));
        let rounds: Arc<Vec<_>> = Arc::new(
            (0..ROUNDS).map(|_| (Life::default(), AtomicBool::new(true), Mutex::new(0))).collect(),
        );
        let (theirs, meet) = (rounds.clone(), barrier.clone());
        let starts = thread::spawn(move || {
            for (life, ready, done) in theirs.iter() {
                meet.wait();
                if life.start(|| ready.load(Ordering::SeqCst).then_some(())).is_some() {
                    life.if_started(|| *lock(done) += 1);
                }
            }
        });
        for (life, ready, done) in rounds.iter() {
            barrier.wait();
            ready.store(false, Ordering::SeqCst);
            life.stop(|| *lock(done) = 0);
        }
        starts.join().unwrap();
        for (life, _, done) in rounds.iter() {
            assert!(!life.is_started(), "stopped, and started all the same");
            assert_eq!(*lock(done), 0, "done behind the stop");
        }
    }
}
