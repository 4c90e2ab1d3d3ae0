// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: whether the device is started, and so whether a map may be sent to the front-end
//! (Q1). The back-end channel queries this for each map; no other copy of this state exists. Knows
//! no ring.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::lock::{Mutex, Rank, lock};

/// Whether the device is started.
pub(crate) struct Life {
    started: AtomicBool,
    /// A ring was started, and none was stopped since. Locked during each `start`, `go_on` and
    /// `stop`. Ring locks are taken under it.
    begun: Mutex<bool>,
}

impl Default for Life {
    fn default() -> Self {
        Self { started: AtomicBool::new(false), begun: Mutex::ranked(Rank::Life, false) }
    }
}

impl Life {
    /// Whether a started ring was let run, and none was stopped since.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::SeqCst)
    }

    /// Runs `start`, which starts a ring if it can be started. The ring's thread or the watchdog
    /// calls this. The lock keeps the front-end thread from a stop in between: otherwise the device
    /// would be stopped while `is_started` is true, and the next map would kill the VM.
    pub(crate) fn start<T>(&self, start: impl FnOnce() -> Option<T>) -> Option<T> {
        let mut begun = lock(&self.begun);
        let ring = start()?;
        *begun = true;
        Some(ring)
    }

    /// A ring that was [started](Self::start) may run: from now on maps may be sent to the
    /// front-end. Then runs `then`, whose effect a later stop by the front-end thread undoes.
    /// `None`, and `then` is not run, if a stop came after the start.
    ///
    /// Between `start` and `go_on` the device drops the last driver's state; `is_started` stays
    /// false meanwhile, so that no map of that driver's requests is sent.
    pub(crate) fn go_on<T>(&self, then: impl FnOnce() -> T) -> Option<T> {
        let begun = lock(&self.begun);
        if !*begun {
            return None;
        }
        self.started.store(true, Ordering::SeqCst);
        Some(then())
    }

    /// Marks the device as not started, and runs `undo`, which undoes what the start did. The
    /// caller has made the ring not ready before, so that no start follows.
    pub(crate) fn stop(&self, undo: impl FnOnce()) {
        // Before the lock: a thread that is about to send a map must not send it, and must not
        // delay this thread.
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

    /// Shows: in whichever order a stop of one thread and a start of another one run, the device is
    /// not started after both, and the effect of the start is undone.
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
            assert!(!life.is_started(), "started after its stop");
            assert_eq!(*lock(done), 0, "the effect of the start is left");
        }
    }

    /// Shows: a device is not started before go_on(), and a stop between start() and go_on() keeps
    /// it not started.
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
