// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: no ring goes on before the device has forgotten the last driver. Knows neither.
//!
//! To forget may take a disk's time, so it is done under no lock, and nobody waits for it: who
//! comes meanwhile is let go on by the one who does it.

use crate::support::lock::{Mutex, Rank, lock};

struct State<T> {
    /// Number of drivers that have begun anew.
    begun: u64,
    /// Number of these drivers for which the device has forgotten the previous driver.
    done: u64,
    /// Somebody sees to it.
    running: bool,
    /// Who goes on behind that.
    held: Vec<T>,
}

/// The drivers of a session, one behind the other.
pub(crate) struct Restarts<T>(Mutex<State<T>>);

impl<T> Default for Restarts<T> {
    fn default() -> Self {
        let state = State { begun: 0, done: 0, running: false, held: Vec::new() };
        Self(Mutex::ranked(Rank::Restarts, state))
    }
}

impl<T> Restarts<T> {
    /// A driver has begun anew. Said before any of its rings comes to [`settle`](Self::settle): in
    /// the step in which the first one was started.
    pub(crate) fn begun(&self) {
        lock(&self.0).begun += 1;
    }

    /// `ring` was started. Has the device `forget` the drivers that are over, unless somebody is at
    /// it, and returns who may go on now: this one and those who came meanwhile, or nobody, if
    /// somebody else will see to it.
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

    /// Shows: a ring that starts while the device still forgets goes on behind that, whichever ring
    /// began it; and a driver that begins anew meanwhile is forgotten for, too, before any of its
    /// rings goes on.
    #[test]
    fn who_comes_meanwhile_goes_on_behind() {
        let restarts = Restarts::default();
        let forgotten = Cell::new(0);
        let forget = || forgotten.set(forgotten.get() + 1);
        assert_eq!(restarts.settle(1, forget), [1], "nothing to forget");
        restarts.begun();
        let went_on = restarts.settle(2, || {
            forget();
            if forgotten.get() == 1 {
                assert!(restarts.settle(3, || unreachable!("somebody is at it")).is_empty());
                restarts.begun();
                assert!(restarts.settle(4, || unreachable!("somebody is at it")).is_empty());
            }
        });
        assert_eq!((went_on, forgotten.get()), (vec![2, 3, 4], 2));
        assert_eq!(restarts.settle(5, forget), [5]);
        assert_eq!(forgotten.get(), 2);
    }

    /// Shows: a ring that did not itself see that the driver had begun anew, and overtakes the one
    /// that did, waits for the device all the same.
    #[test]
    fn a_ring_that_overtakes() {
        let restarts = Restarts::default();
        restarts.begun();
        let forgotten = Cell::new(false);
        assert_eq!(restarts.settle("second", || forgotten.set(true)), ["second"]);
        assert!(forgotten.get());
        assert_eq!(restarts.settle("first", || unreachable!("done")), ["first"]);
    }
}
