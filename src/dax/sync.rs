// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the locks that the engine is built of; under `--cfg loom` the model checker's.

#[cfg(loom)]
pub(crate) use self::loom_locks::{lock, ranked, wait, wait_timeout};
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
// Not loom's: it can't hold a trait object, and counting references is not what is checked.
pub(crate) use std::sync::Arc;

#[cfg(not(loom))]
pub(crate) use self::ranked_locks::{ranked, wait, wait_timeout};
#[cfg(not(loom))]
pub(crate) use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};
use crate::support::lock::{Held, Rank};

#[cfg(not(loom))]
mod ranked_locks {
    use super::{Condvar, Duration, Mutex, MutexGuard, Rank};

    pub(crate) const fn ranked<T>(rank: Rank, value: T) -> Mutex<T> {
        Mutex::ranked(rank, value)
    }

    pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        condvar.wait(guard)
    }

    pub(crate) fn wait_timeout<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> MutexGuard<'a, T> {
        condvar.wait_timeout(guard, most).0
    }
}

/// The model checker's mutexes have no rank: it tries all orders itself.
#[cfg(loom)]
mod loom_locks {
    use super::{Condvar, Duration, Mutex, MutexGuard, Rank};

    pub(crate) fn ranked<T>(_: Rank, value: T) -> Mutex<T> {
        Mutex::new(value)
    }

    pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        condvar.wait(guard).unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn wait_timeout<'a, T>(
        condvar: &Condvar,
        guard: MutexGuard<'a, T>,
        most: Duration,
    ) -> MutexGuard<'a, T> {
        condvar.wait_timeout(guard, most).unwrap_or_else(|e| e.into_inner()).0
    }
}

/// Something that one thread at a time may take away and work on, for as long as it likes: a
/// front-end round trip is made with it in hand, and no mutex is held meanwhile.
pub(crate) struct Checkout<T> {
    rank: Rank,
    place: Mutex<Place<T>>,
    returned: Condvar,
}

struct Place<T> {
    value: Option<T>,
    /// Number of waiters. With 0 waiters the wake-up, which is a system call, is left out.
    waiting: u32,
}

impl<T> Checkout<T> {
    pub(crate) fn new(rank: Rank, value: T) -> Self {
        let place = Mutex::new(Place { value: Some(value), waiting: 0 });
        Self { rank, place, returned: Condvar::new() }
    }

    /// Waits until it is there, and takes it.
    #[track_caller]
    pub(crate) fn take(&self) -> CheckedOut<'_, T> {
        let held = Held::take(self.rank);
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return CheckedOut { turn: self, value: Some(value), _held: held };
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
        // A thread that waits for a limited time is part of no deadlock.
        let held = Held::tried(self.rank);
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return Some(CheckedOut { turn: self, value: Some(value), _held: held });
            }
            let left = until.checked_duration_since(Instant::now()).filter(|it| !it.is_zero())?;
            place.waiting += 1;
            place = wait_timeout(&self.returned, place, left);
            place.waiting -= 1;
        }
    }
}

/// Goes back to its [`Checkout`] when dropped.
pub(crate) struct CheckedOut<'a, T> {
    turn: &'a Checkout<T>,
    value: Option<T>,
    _held: Held,
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
    #[track_caller]
    pub(crate) fn read(&self) -> InvalidateGuard<'_> {
        let held = Held::take(Rank::Invalidate);
        let mut state = lock(&self.state);
        while state.alone || state.waiting_alone > 0 {
            state = self.wait(state);
        }
        state.shared += 1;
        InvalidateGuard { invalidate_lock: self, alone: false, _held: held }
    }

    /// The same, unless somebody is alone or waits to be.
    pub(crate) fn try_read(&self) -> Option<InvalidateGuard<'_>> {
        let mut state = lock(&self.state);
        if state.alone || state.waiting_alone > 0 {
            return None;
        }
        state.shared += 1;
        let held = Held::tried(Rank::Invalidate);
        Some(InvalidateGuard { invalidate_lock: self, alone: false, _held: held })
    }

    #[track_caller]
    pub(crate) fn write(&self) -> InvalidateGuard<'_> {
        let held = Held::take(Rank::Invalidate);
        let mut state = lock(&self.state);
        state.waiting_alone += 1;
        while state.alone || state.shared > 0 {
            state = self.wait(state);
        }
        state.waiting_alone -= 1;
        state.alone = true;
        InvalidateGuard { invalidate_lock: self, alone: true, _held: held }
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
    _held: Held,
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
