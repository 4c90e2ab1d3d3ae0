// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: whether the device is started, which decides whether the front-end may be sent a
//! map (Q1). It is the only source: the channel asks it for each map. Knows no ring.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::lock::{Mutex, Rank, lock};

/// Started, or not.
pub(crate) struct Life {
    started: AtomicBool,
    /// A ring was started, and none was stopped since. Held from the start of a ring until this
    /// says so, and while what a start did is undone. Ring locks are taken under it.
    begun: Mutex<bool>,
}

impl Default for Life {
    fn default() -> Self {
        Self { started: AtomicBool::new(false), begun: Mutex::ranked(Rank::Life, false) }
    }
}

impl Life {
    /// Whether a ring has gone on, and none was stopped since.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Lets `start` start a ring, if it can be. The ring's thread does so, or the watchdog; the
    /// front-end thread makes no stop in between, which would leave a device that is stopped and
    /// says that it is started: the next map would kill the VM.
    pub(crate) fn start<T>(&self, start: impl FnOnce() -> Option<T>) -> Option<T> {
        let mut begun = lock(&self.begun);
        let ring = start()?;
        *begun = true;
        Some(ring)
    }

    /// A ring that was [started](Self::start) goes on: from now on the front-end may be sent maps.
    /// `then` is done behind that, and a stop by the front-end thread undoes it. None, and nothing
    /// is done, if a stop has come already.
    ///
    /// Between the two the device forgets the driver that is over. A request of that driver must
    /// not be sent meanwhile.
    pub(crate) fn go_on<T>(&self, then: impl FnOnce() -> T) -> Option<T> {
        let begun = lock(&self.begun);
        if !*begun {
            return None;
        }
        self.started.store(true, Ordering::SeqCst);
        Some(then())
    }

    /// The device is not started any more; `undo` undoes what the start did. The ring must not be
    /// ready any more, so that no start comes behind this one's back.
    pub(crate) fn stop(&self, undo: impl FnOnce()) {
        // First of all: a thread that is about to send a map must not, and must not keep this one
        // waiting.
        self.started.store(false, Ordering::SeqCst);
        let mut begun = lock(&self.begun);
        *begun = false;
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
                    life.go_on(|| *lock(done) += 1);
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

    /// Shows: a device is not started before its ring goes on, and a stop in between keeps it so.
    #[test]
    fn it_is_started_when_a_ring_goes_on() {
        let life = Life::default();
        assert!(life.go_on(|| ()).is_none());
        life.start(|| Some(())).unwrap();
        assert!(!life.is_started());
        life.go_on(|| assert!(life.is_started())).unwrap();
        assert!(life.is_started());
        life.start(|| Some(())).unwrap();
        life.stop(|| ());
        assert!(life.go_on(|| ()).is_none() && !life.is_started());
    }
}
