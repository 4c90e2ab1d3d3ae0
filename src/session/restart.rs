// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: after a reset by the driver, no ring runs before the device has dropped the last
//! driver's state. Knows no device and no ring.
//!
//! Dropping that state may take the time of a disk access, so the thread that does it holds no lock
//! meanwhile, and other threads do not wait for it: a ring that another thread starts meanwhile is
//! queued, and the first thread lets it run afterwards.

use crate::support::lock::{Mutex, Rank, lock};

struct State<T> {
    /// Number of new drivers: resets that this session has seen.
    begun: u64,
    /// Number of those drivers before which the device has dropped the previous driver's state.
    done: u64,
    /// A thread is in `forget`.
    running: bool,
    /// Rings that run once `done` equals `begun`.
    held: Vec<T>,
}

/// Orders the drivers of one session. `T` is a started ring.
pub(crate) struct Restarts<T>(Mutex<State<T>>);

impl<T> Default for Restarts<T> {
    fn default() -> Self {
        let state = State { begun: 0, done: 0, running: false, held: Vec::new() };
        Self(Mutex::ranked(Rank::Restarts, state))
    }
}

impl<T> Restarts<T> {
    /// Records that a new driver has reset the device. Called before any ring of that driver
    /// reaches [`settle`](Self::settle): in the same step of `Life` that starts its first ring.
    pub(crate) fn begun(&self) {
        lock(&self.0).begun += 1;
    }

    /// Takes a started `ring`, and has the device `forget` the drivers before the newest one,
    /// unless another thread is in `forget`. Returns the rings that may run now: `ring` and those
    /// that other threads have queued meanwhile. Returns none if another thread is in `forget`;
    /// that thread returns `ring`.
    pub(crate) fn settle(&self, ring: T, forget: impl Fn()) -> Vec<T> {
        let mut state = lock(&self.0);
        state.held.push(ring);
        if state.running {
            return Vec::new();
        }
        while state.done < state.begun {
            let begun = state.begun;
            state.running = true;
            drop(state);
            forget();
            state = lock(&self.0);
            state.running = false;
            state.done = begun;
        }
        std::mem::take(&mut state.held)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Shows: a ring that starts while a thread is in `forget` runs after that, whichever ring
    /// called `forget`. A reset during `forget` causes another `forget` before any ring of the new
    /// driver runs.
    #[test]
    fn rings_that_start_during_forget_run_after_it() {
        let restarts = Restarts::default();
        let forgotten = Cell::new(0);
        let forget = || forgotten.set(forgotten.get() + 1);
        assert_eq!(restarts.settle(1, forget), [1], "nothing to forget");
        restarts.begun();
        let went_on = restarts.settle(2, || {
            forget();
            if forgotten.get() == 1 {
                assert!(restarts.settle(3, || unreachable!("a thread is in forget")).is_empty());
                restarts.begun();
                assert!(restarts.settle(4, || unreachable!("a thread is in forget")).is_empty());
            }
        });
        assert_eq!((went_on, forgotten.get()), (vec![2, 3, 4], 2));
        assert_eq!(restarts.settle(5, forget), [5]);
        assert_eq!(forgotten.get(), 2);
    }

    /// Shows: a ring whose own thread did not see the reset waits for `forget`, too, although it
    /// calls `settle` before the ring that saw the reset.
    #[test]
    fn a_ring_that_settles_before_the_one_that_saw_the_reset() {
        let restarts = Restarts::default();
        restarts.begun();
        let forgotten = Cell::new(false);
        assert_eq!(restarts.settle("second", || forgotten.set(true)), ["second"]);
        assert!(forgotten.get());
        assert_eq!(restarts.settle("first", || unreachable!("done")), ["first"]);
    }
}
