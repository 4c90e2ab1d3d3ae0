// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One thread that syncs for all who wait.
//!
//! The rule that makes it right: the batch is taken *before* the sync begins. What comes while
//! the sync runs waits for the next one, so each answer rests on a sync that began after the
//! request was handed in.

use crate::support::failpoint;
use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::{io, mem};

use log::error;

/// One who waits for a sync.
pub trait Waiter: Send + 'static {
    /// False for one that only keeps its place in the order.
    fn needs_sync(&self) -> bool;

    /// The answer: what the sync said.
    fn answer(self, durable: bool);
}

struct Queue<W> {
    waiting: Vec<W>,
    stopping: bool,
}

struct Shared<W> {
    queue: Mutex<Queue<W>>,
    changed: Condvar,
}

impl<W> Shared<W> {
    fn lock(&self) -> MutexGuard<'_, Queue<W>> {
        lock(&self.queue)
    }
}

/// Shares each sync among all that were waiting when it began. Answers come in the order of
/// [`submit`](Self::submit).
pub struct GroupSync<W> {
    shared: Arc<Shared<W>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl<W: Waiter> GroupSync<W> {
    /// Starts the thread. `sync` returns whether all is durable now; that a failure is final is its
    /// business.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn new(sync: impl FnMut() -> bool + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { waiting: Vec::new(), stopping: false }),
            changed: Condvar::new(),
        });
        let theirs = shared.clone();
        let worker = Builder::new().name("sync".into()).spawn(move || run(&theirs, sync))?;
        Ok(Self { shared, worker: Mutex::new(Some(worker)) })
    }

    /// Hands in one waiter. Never blocks on a sync.
    pub fn submit(&self, waiter: W) {
        self.shared.lock().waiting.push(waiter);
        self.shared.changed.notify_one();
    }

    /// Lets the running sync finish and answers its batch; those that wait for the next one are
    /// dropped unanswered. Returns when the thread has ended. Callable more than once.
    pub fn stop(&self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
        // Held while joining, so that a second caller also returns only after the end.
        let mut worker = lock(&self.worker);
        if let Some(worker) = worker.take()
            && worker.join().is_err()
        {
            error!("the sync thread panicked");
        }
    }
}

impl<W> Drop for GroupSync<W> {
    fn drop(&mut self) {
        // Not joined: the last owner may be the thread itself, answering its last batch.
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
    }
}

fn run<W: Waiter>(shared: &Shared<W>, mut sync: impl FnMut() -> bool) {
    while let Some(batch) = next_batch(shared) {
        let is_needed = batch.iter().any(Waiter::needs_sync);
        let is_late = failpoint::is_on("pmem-reply-before-sync");
        // The sync before the answers: the guest takes an answer as durable.
        let durable = is_needed && (is_late || sync());
        for waiter in batch {
            waiter.answer(durable);
        }
        if is_late && is_needed {
            sync();
        }
    }
}

fn next_batch<W>(shared: &Shared<W>) -> Option<Vec<W>> {
    let mut queue = shared.lock();
    while !queue.stopping && queue.waiting.is_empty() {
        queue = shared.changed.wait(queue);
    }
    (!queue.stopping).then(|| mem::take(&mut queue.waiting))
}
