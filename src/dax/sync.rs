// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the locks of the engine. Under `--cfg loom` they are built on the locks of the
//! model checker.

#[cfg(loom)]
pub(crate) use self::loom_locks::{lock, ranked, wait, wait_timeout};
#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
// Not loom's: loom's Arc can't hold a trait object, and reference counts are not model-checked.
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

/// The model checker's mutexes have no rank: it tries all lock orders itself.
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

/// A value that one thread at a time may check out, for any time: it may make a front-end round
/// trip meanwhile. No mutex is held while the value is checked out.
pub(crate) struct Checkout<T> {
    rank: Rank,
    place: Mutex<Place<T>>,
    returned: Condvar,
}

struct Place<T> {
    /// None while a thread has the value.
    value: Option<T>,
    /// Number of waiting threads. With 0 waiters the wake-up, which is a system call, is left out.
    waiting: u32,
}

impl<T> Checkout<T> {
    pub(crate) fn new(rank: Rank, value: T) -> Self {
        let place = Mutex::new(Place { value: Some(value), waiting: 0 });
        Self { rank, place, returned: Condvar::new() }
    }

    /// Waits until no other thread has the value, and checks it out.
    #[track_caller]
    pub(crate) fn take(&self) -> CheckedOut<'_, T> {
        let held = Held::take(self.rank);
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return CheckedOut { checkout: self, value: Some(value), _held: held };
            }
            place.waiting += 1;
            place = wait(&self.returned, place);
            place.waiting -= 1;
        }
    }
}

impl<T> Checkout<T> {
    /// Like [`take`](Self::take), but waits for at most `most`. None if another thread has the
    /// value for longer.
    pub(crate) fn take_within(&self, most: Duration) -> Option<CheckedOut<'_, T>> {
        let until = Instant::now() + most;
        // A thread that waits for a limited time is part of no deadlock.
        let held = Held::tried(self.rank);
        let mut place = lock(&self.place);
        loop {
            if let Some(value) = place.value.take() {
                return Some(CheckedOut { checkout: self, value: Some(value), _held: held });
            }
            let left = until.checked_duration_since(Instant::now()).filter(|it| !it.is_zero())?;
            place.waiting += 1;
            place = wait_timeout(&self.returned, place, left);
            place.waiting -= 1;
        }
    }
}

/// A checked-out value. It is returned to its [`Checkout`] on drop.
pub(crate) struct CheckedOut<'a, T> {
    checkout: &'a Checkout<T>,
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
        let mut place = lock(&self.checkout.place);
        place.value = self.value.take();
        if place.waiting > 0 {
            self.checkout.returned.notify_one();
        }
    }
}

/// A readers-writer lock that may be held over blocking calls. Waiting writers go before new
/// readers.
#[derive(Default)]
pub(crate) struct InvalidateLock {
    state: Mutex<InvalidateState>,
    changed: Condvar,
}

#[derive(Default)]
struct InvalidateState {
    /// Number of threads that hold the lock for reading.
    readers: u32,
    /// A thread holds the lock for writing.
    writer: bool,
    /// Number of threads that wait for the write lock.
    waiting_writers: u32,
    /// Number of threads that wait for the read or the write lock.
    waiting: u32,
}

impl InvalidateLock {
    #[track_caller]
    pub(crate) fn read(&self) -> InvalidateGuard<'_> {
        let held = Held::take(Rank::Invalidate);
        let mut state = lock(&self.state);
        while state.writer || state.waiting_writers > 0 {
            state = self.wait(state);
        }
        state.readers += 1;
        InvalidateGuard { invalidate_lock: self, writer: false, _held: held }
    }

    /// The read lock. None if a thread holds the write lock or waits for it.
    pub(crate) fn try_read(&self) -> Option<InvalidateGuard<'_>> {
        let mut state = lock(&self.state);
        if state.writer || state.waiting_writers > 0 {
            return None;
        }
        state.readers += 1;
        let held = Held::tried(Rank::Invalidate);
        Some(InvalidateGuard { invalidate_lock: self, writer: false, _held: held })
    }

    #[track_caller]
    pub(crate) fn write(&self) -> InvalidateGuard<'_> {
        let held = Held::take(Rank::Invalidate);
        let mut state = lock(&self.state);
        state.waiting_writers += 1;
        while state.writer || state.readers > 0 {
            state = self.wait(state);
        }
        state.waiting_writers -= 1;
        state.writer = true;
        InvalidateGuard { invalidate_lock: self, writer: true, _held: held }
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

/// Holds an [`InvalidateLock`] until dropped.
pub(crate) struct InvalidateGuard<'a> {
    invalidate_lock: &'a InvalidateLock,
    writer: bool,
    _held: Held,
}

impl Drop for InvalidateGuard<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.invalidate_lock.state);
        if self.writer {
            state.writer = false;
        } else {
            state.readers -= 1;
        }
        if state.waiting > 0 {
            self.invalidate_lock.changed.notify_all();
        }
    }
}
