// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sync thread: one sync answers all waiting flushes.
//!
//! The thread takes the batch *before* the sync begins. A flush that is submitted during the sync
//! waits for the next one. So each flush is answered by a sync that began after its submission
//! (docs/invariants.md 1).

use crate::support::failpoint;
use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::{io, mem};

use log::error;

/// A request that waits for a sync.
pub trait Waiter: Send + 'static {
    /// False for a request that needs no sync and only waits for its turn in the order of answers.
    fn needs_sync(&self) -> bool;

    /// Answers the request. `durable` is whether the sync of its batch succeeded.
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

/// Shares each sync among all requests that waited when it began. Requests are answered in the
/// order of [`submit`](Self::submit).
pub struct GroupSync<W> {
    shared: Arc<Shared<W>>,
    worker: Mutex<Option<JoinHandle<()>>>,
}

impl<W: Waiter> GroupSync<W> {
    /// Starts the thread. `sync` makes all earlier stores durable, and returns whether it
    /// succeeded. It must itself keep a failure: it is called again for the next batch.
    ///
    /// # Errors
    /// The error of the thread's start, for example EAGAIN.
    pub fn new(sync: impl FnMut() -> bool + Send + 'static) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { waiting: Vec::new(), stopping: false }),
            changed: Condvar::new(),
        });
        let theirs = shared.clone();
        let worker = Builder::new().name("sync".into()).spawn(move || run(&theirs, sync))?;
        Ok(Self { shared, worker: Mutex::new(Some(worker)) })
    }

    /// Adds a request to the next batch. Does not wait for a running sync.
    pub fn submit(&self, waiter: W) {
        self.shared.lock().waiting.push(waiter);
        self.shared.changed.notify_one();
    }

    /// Stops the thread and returns when it has ended. The running sync ends first, and its batch
    /// is answered; requests that wait for the next sync are dropped unanswered. May be called
    /// again.
    pub fn stop(&self) {
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
        // Locked during the join, so that a second caller returns only after the thread's end too.
        let mut worker = lock(&self.worker);
        if let Some(worker) = worker.take()
            && worker.join().is_err()
        {
            error!("the sync thread has panicked: later flushes were not answered");
        }
    }
}

impl<W> Drop for GroupSync<W> {
    fn drop(&mut self) {
        // Not joined: this may run on the sync thread itself, if the answer of its last batch drops
        // the last reference.
        self.shared.lock().stopping = true;
        self.shared.changed.notify_one();
    }
}

fn run<W: Waiter>(shared: &Shared<W>, mut sync: impl FnMut() -> bool) {
    while let Some(batch) = next_batch(shared) {
        let is_needed = batch.iter().any(Waiter::needs_sync);
        let is_late = failpoint::is_on("pmem-reply-before-sync");
        // Sync before answer: the guest treats the data of an answered flush as durable.
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
