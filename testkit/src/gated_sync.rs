// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A double of `KernelSync`: counts syncs, holds a sync until a test releases it, fails the k-th.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use vhost_user_dax::persist::{KernelSync, Persist};

use crate::HANG;

/// An event of a sync, in the order of the events. Syncs are numbered from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncEvent {
    /// The k-th sync began.
    Began(u64),
    /// The k-th sync succeeded.
    Ended(u64),
    /// The k-th sync failed.
    Failed(u64),
}

#[derive(Default)]
struct State {
    log: Vec<SyncEvent>,
    begun: u64,
    finished: u64,
    /// Number of the last sync that may finish while `held`.
    allowed: u64,
    held: bool,
    fail_at: Option<u64>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The double. All clones share one gate.
#[derive(Clone, Default)]
pub struct Gate(Arc<Shared>);

impl Gate {
    /// An open gate: syncs succeed at once until [`hold`](Self::hold).
    pub fn new() -> Self {
        Self::default()
    }

    /// The `Persist` to pass to the device.
    pub fn persist(&self) -> Persist {
        Persist::kernel(self.clone())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    /// From now on a sync that begins does not finish before it is released.
    pub fn hold(&self) {
        let mut state = self.lock();
        state.held = true;
        state.allowed = state.begun.max(state.finished);
    }

    /// Lets one more held sync finish, whether it has begun or not.
    pub fn release_one(&self) {
        self.lock().allowed += 1;
        self.0.changed.notify_all();
    }

    /// Opens the gate: all held and later syncs finish.
    pub fn open(&self) {
        self.lock().held = false;
        self.0.changed.notify_all();
    }

    /// Makes the k-th sync since the gate's creation return EIO.
    pub fn fail_at(&self, k: u64) {
        self.lock().fail_at = Some(k);
    }

    /// The number of syncs that have begun.
    pub fn begun(&self) -> u64 {
        self.lock().begun
    }

    /// The number of syncs that have returned.
    pub fn finished(&self) -> u64 {
        self.lock().finished
    }

    /// All events so far.
    pub fn log(&self) -> Vec<SyncEvent> {
        self.lock().log.clone()
    }

    /// Waits until `k` syncs have begun.
    pub fn wait_begun(&self, k: u64) {
        self.wait("begun", |state| state.begun >= k);
    }

    /// Waits until `k` syncs have returned.
    pub fn wait_finished(&self, k: u64) {
        self.wait("finished", |state| state.finished >= k);
    }

    fn wait(&self, what: &str, done: impl Fn(&State) -> bool) {
        let (state, timeout) =
            self.0.changed.wait_timeout_while(self.lock(), HANG, |state| !done(state)).unwrap();
        assert!(!timeout.timed_out(), "hang: the sync never got {what}; so far {:?}", state.log);
    }
}

impl KernelSync for Gate {
    fn sync(&self) -> io::Result<()> {
        let Gate(shared) = self;
        let mut state = shared.state.lock().unwrap();
        state.begun += 1;
        let k = state.begun;
        state.log.push(SyncEvent::Began(k));
        shared.changed.notify_all();
        let (mut state, timeout) = shared
            .changed
            .wait_timeout_while(state, 2 * HANG, |state| state.held && state.allowed < k)
            .unwrap();
        assert!(!timeout.timed_out(), "the test forgot to release sync {k}");
        state.finished += 1;
        let fails = state.fail_at == Some(k);
        state.log.push(if fails { SyncEvent::Failed(k) } else { SyncEvent::Ended(k) });
        shared.changed.notify_all();
        if fails { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }
}
