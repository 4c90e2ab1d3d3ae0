// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the locks that the engine is built of; under `--cfg loom` the model checker's.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
#[cfg(not(loom))]
use std::time::{Duration, Instant};
// Not loom's: it can't hold a trait object, and counting references is not what is checked.
pub(crate) use std::sync::Arc;
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

/// Locks, also after a panic elsewhere: what these locks guard is consistent at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Waits, also after a panic elsewhere.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|e| e.into_inner())
}

/// Something that one thread at a time may take away and work on, for as long as it likes: a front-end
/// round trip is made with it in hand, and no mutex is held meanwhile.
pub(crate) struct Turn<T> {
    place: Mutex<Place<T>>,
    returned: Condvar,
}

struct Place<T> {
    value: Option<T>,
    /// So many wait for it: to wake nobody costs a system call, too.
    waiting: u32,
}

impl<T> Turn<T> {
    pub(crate) fn new(value: T) -> Self {
        let place = Mutex::new(Place { value: Some(value), waiting: 0 });
        Self { place, returned: Condvar::new() }
    }

    /// Waits until it is there, and takes it.
    pub(crate) fn take(&self) -> Taken<'_, T> {
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return Taken { turn: self, value: Some(value) };
            }
            place.waiting += 1;
            place = wait(&self.returned, place);
            place.waiting -= 1;
        }
    }
}

#[cfg(not(loom))]
impl<T> Turn<T> {
    /// Takes it, if it is there within `most`.
    pub(crate) fn take_within(&self, most: Duration) -> Option<Taken<'_, T>> {
        let until = Instant::now() + most;
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return Some(Taken { turn: self, value: Some(value) });
            }
            let left = until.checked_duration_since(Instant::now()).filter(|it| !it.is_zero())?;
            place.waiting += 1;
            let waited = self.returned.wait_timeout(place, left);
            place = waited.unwrap_or_else(|e| e.into_inner()).0;
            place.waiting -= 1;
        }
    }
}

/// Goes back to its [`Turn`] when dropped.
pub(crate) struct Taken<'a, T> {
    turn: &'a Turn<T>,
    value: Option<T>,
}

impl<T> std::ops::Deref for Taken<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("the value leaves only in drop()"),
        }
    }
}

impl<T> std::ops::DerefMut for Taken<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.value {
            Some(value) => value,
            None => unreachable!("the value leaves only in drop()"),
        }
    }
}

impl<T> Drop for Taken<'_, T> {
    fn drop(&mut self) {
        let mut place = lock(&self.turn.place);
        place.value = self.value.take();
        if place.waiting > 0 {
            self.turn.returned.notify_one();
        }
    }
}

/// A lock to sleep under, shared or alone; whoever waits to be alone goes first.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    shared: u32,
    alone: bool,
    waiting_alone: u32,
    /// Of both kinds.
    waiting: u32,
}

impl Gate {
    pub(crate) fn share(&self) -> Passed<'_> {
        let mut state = lock(&self.state);
        while state.alone || state.waiting_alone > 0 {
            state = self.wait(state);
        }
        state.shared += 1;
        Passed { gate: self, alone: false }
    }

    /// The same, unless somebody is alone or waits to be.
    pub(crate) fn try_share(&self) -> Option<Passed<'_>> {
        let mut state = lock(&self.state);
        if state.alone || state.waiting_alone > 0 {
            return None;
        }
        state.shared += 1;
        Some(Passed { gate: self, alone: false })
    }

    pub(crate) fn alone(&self) -> Passed<'_> {
        let mut state = lock(&self.state);
        state.waiting_alone += 1;
        while state.alone || state.shared > 0 {
            state = self.wait(state);
        }
        state.waiting_alone -= 1;
        state.alone = true;
        Passed { gate: self, alone: true }
    }

    fn wait<'a>(&self, mut state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        state.waiting += 1;
        state = wait(&self.changed, state);
        state.waiting -= 1;
        state
    }
}

/// Inside a [`Gate`], until dropped.
pub(crate) struct Passed<'a> {
    gate: &'a Gate,
    alone: bool,
}

impl Drop for Passed<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.gate.state);
        if self.alone {
            state.alone = false;
        } else {
            state.shared -= 1;
        }
        if state.waiting > 0 {
            self.gate.changed.notify_all();
        }
    }
}
