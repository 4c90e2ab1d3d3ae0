// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the locks that the engine is built of; under `--cfg loom` the model checker's.

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
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

/// Something that one thread at a time may take away and work on, for as long as it likes: a
/// front-end round trip is made with it in hand, and no mutex is held meanwhile.
pub(crate) struct Checkout<T> {
    place: Mutex<Place<T>>,
    returned: Condvar,
}

struct Place<T> {
    value: Option<T>,
    /// Number of waiters. With 0 waiters the wake-up, which is a system call, is left out.
    waiting: u32,
}

impl<T> Checkout<T> {
    pub(crate) fn new(value: T) -> Self {
        let place = Mutex::new(Place { value: Some(value), waiting: 0 });
        Self { place, returned: Condvar::new() }
    }

    /// Waits until it is there, and takes it.
    pub(crate) fn take(&self) -> CheckedOut<'_, T> {
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return CheckedOut { turn: self, value: Some(value) };
            }
            place.waiting += 1;
            place = wait(&self.returned, place);
            place.waiting -= 1;
        }
    }
}

impl<T> Checkout<T> {
    /// Takes it, if it is there within `most`.
    pub(crate) fn take_within(&self, most: Duration) -> Option<CheckedOut<'_, T>> {
        let until = Instant::now() + most;
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return Some(CheckedOut { turn: self, value: Some(value) });
            }
            let left = until.checked_duration_since(Instant::now()).filter(|it| !it.is_zero())?;
            place.waiting += 1;
            let waited = self.returned.wait_timeout(place, left);
            place = waited.unwrap_or_else(|e| e.into_inner()).0;
            place.waiting -= 1;
        }
    }
}

/// Goes back to its [`Checkout`] when dropped.
pub(crate) struct CheckedOut<'a, T> {
    turn: &'a Checkout<T>,
    value: Option<T>,
}

impl<T> std::ops::Deref for CheckedOut<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        match &self.value {
            Some(value) => value,
            None => unreachable!("the value leaves only in drop()"),
        }
    }
}

impl<T> std::ops::DerefMut for CheckedOut<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        match &mut self.value {
            Some(value) => value,
            None => unreachable!("the value leaves only in drop()"),
        }
    }
}

impl<T> Drop for CheckedOut<'_, T> {
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
pub(crate) struct InvalidateLock {
    state: Mutex<InvalidateState>,
    changed: Condvar,
}

#[derive(Default)]
struct InvalidateState {
    shared: u32,
    alone: bool,
    waiting_alone: u32,
    /// Of both kinds.
    waiting: u32,
}

impl InvalidateLock {
    pub(crate) fn read(&self) -> InvalidateGuard<'_> {
        let mut state = lock(&self.state);
        while state.alone || state.waiting_alone > 0 {
            state = self.wait(state);
        }
        state.shared += 1;
        InvalidateGuard { invalidate_lock: self, alone: false }
    }

    /// The same, unless somebody is alone or waits to be.
    pub(crate) fn try_read(&self) -> Option<InvalidateGuard<'_>> {
        let mut state = lock(&self.state);
        if state.alone || state.waiting_alone > 0 {
            return None;
        }
        state.shared += 1;
        Some(InvalidateGuard { invalidate_lock: self, alone: false })
    }

    pub(crate) fn write(&self) -> InvalidateGuard<'_> {
        let mut state = lock(&self.state);
        state.waiting_alone += 1;
        while state.alone || state.shared > 0 {
            state = self.wait(state);
        }
        state.waiting_alone -= 1;
        state.alone = true;
        InvalidateGuard { invalidate_lock: self, alone: true }
    }

    fn wait<'a>(
        &self,
        mut state: MutexGuard<'a, InvalidateState>,
    ) -> MutexGuard<'a, InvalidateState> {
        state.waiting += 1;
        state = wait(&self.changed, state);
        state.waiting -= 1;
        state
    }
}

/// Inside a [`InvalidateLock`], until dropped.
pub(crate) struct InvalidateGuard<'a> {
    invalidate_lock: &'a InvalidateLock,
    alone: bool,
}

impl Drop for InvalidateGuard<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.invalidate_lock.state);
        if self.alone {
            state.alone = false;
        } else {
            state.shared -= 1;
        }
        if state.waiting > 0 {
            self.invalidate_lock.changed.notify_all();
        }
    }
}
