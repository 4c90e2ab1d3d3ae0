// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains a ring while the thread that should do so is held up in a request. Knows no device.
//!
//! A request that is expected to be quick is served by the thread that takes it out of its ring: to wake
//! another one costs more than most requests do. When it is not quick, because a disk or a network lets it
//! wait, this thread sees that nothing has ended for a [`TICK`], and from then on hands what comes to others.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{Builder, JoinHandle, current};
use std::time::Duration;

use crate::ring::{Progress, Ring};
use crate::support::lock::lock;

/// A request that takes longer has others served beside it: much longer than nearly all of them take, much
/// shorter than what a guest waits for a disk.
const TICK: Duration = Duration::from_millis(2);

/// After this many ticks in which nothing was served, it sleeps until something is.
const QUIET_TICKS: u32 = 50;

/// What the rings know of it.
#[derive(Default)]
pub(crate) struct Watch {
    asleep: AtomicBool,
    over: Mutex<bool>,
    changed: Condvar,
}

impl Watch {
    /// A request is about to be served by the thread that took it. Called under the ring's lock.
    pub(crate) fn look(&self) {
        // Under the ring's lock: either this sees `asleep`, or the watch sees the request.
        if self.asleep.swap(false, Ordering::SeqCst) {
            drop(lock(&self.over));
            self.changed.notify_one();
        }
    }

    fn run(&self, rings: &[Arc<Ring>], begin: &dyn Fn(&Arc<Ring>)) {
        let mut seen = vec![0; rings.len()];
        let mut quiet = 0;
        let mut over = lock(&self.over);
        while !*over {
            if quiet < QUIET_TICKS {
                let waited = self.changed.wait_timeout(over, TICK);
                over = waited.unwrap_or_else(|e| e.into_inner()).0;
            } else {
                drop(over); // Never held when a ring is locked.
                over = self.sleep(rings);
                quiet = 0;
            }
            drop(over);
            quiet += 1;
            for (ring, seen) in rings.iter().zip(&mut seen) {
                let progress = ring.relieve(seen);
                if progress == Progress::HeldUp {
                    begin(ring);
                }
                if progress != Progress::Idle {
                    quiet = 0;
                }
            }
            over = lock(&self.over);
        }
    }

    fn sleep(&self, rings: &[Arc<Ring>]) -> MutexGuard<'_, bool> {
        self.asleep.store(true, Ordering::SeqCst);
        if rings.iter().any(|ring| ring.is_serving()) {
            self.asleep.store(false, Ordering::SeqCst);
        }
        let mut over = lock(&self.over);
        while self.asleep.load(Ordering::SeqCst) && !*over {
            over = self.changed.wait(over).unwrap_or_else(|e| e.into_inner());
        }
        over
    }
}

/// The thread. It ends when this is dropped.
pub(crate) struct Relief {
    watch: Arc<Watch>,
    thread: Option<JoinHandle<()>>,
}

impl Relief {
    /// Watches over `rings`, which were made with `watch`. `begin` starts a ring, if it can be and is not: one
    /// that was stopped meanwhile, and would not be seen to go on by the thread that is held up.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn start(
        watch: &Arc<Watch>,
        rings: Vec<Arc<Ring>>,
        begin: impl Fn(&Arc<Ring>) + Send + 'static,
    ) -> io::Result<Self> {
        let theirs = watch.clone();
        let run = move || theirs.run(&rings, &begin);
        let thread = Builder::new().name("relief".into()).spawn(run)?;
        Ok(Self { watch: watch.clone(), thread: Some(thread) })
    }
}

impl Drop for Relief {
    fn drop(&mut self) {
        *lock(&self.watch.over) = true;
        self.watch.changed.notify_one();
        // `begin` may have the last hold on the session, and so on this.
        if let Some(thread) = self.thread.take().filter(|it| it.thread().id() != current().id()) {
            let _ = thread.join();
        }
    }
}
