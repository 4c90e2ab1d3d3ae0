// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads that requests run in: as many as are needed at once, and no queue waits for a disk.

use std::cell::Cell;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, sleep};
use std::time::Duration;

use log::error;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};

/// An idle thread goes away after this long.
const IDLE: Duration = Duration::from_secs(10);

/// Of the threads, the part that is kept free of what may take long: one quarter.
const KEPT_FREE: usize = 4;

/// Of the threads, the part that may wait for leases: one eighth, but at least one.
const FOR_LEASES: usize = 8;

/// How long a request may take in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobClass {
    /// It waits for no disk, or not for long.
    Quick,
    /// It may wait for a disk or a network as long as that likes.
    Slow,
    /// It waits for a lease of a host process: for 45 seconds, as Linux is set up.
    Lease,
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    quick: VecDeque<Job>,
    slow: VecDeque<Job>,
    lease: VecDeque<Job>,
    threads: usize,
    idle: usize,
    running: usize,
    /// Number of running jobs that are not quick.
    slow_running: usize,
    /// Number of those that wait for leases.
    lease_running: usize,
    /// Who waits until nothing runs.
    finishing: usize,
    stopping: bool,
}

impl State {
    fn is_still(&self) -> bool {
        self.running == 0 && self.is_empty()
    }

    fn is_empty(&self) -> bool {
        self.waiting() == 0
    }

    fn waiting(&self) -> usize {
        self.quick.len() + self.slow.len() + self.lease.len()
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Nothing runs and nothing waits.
    still: Condvar,
    most: usize,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn most_slow(&self) -> usize {
        self.most - self.most / KEPT_FREE
    }

    fn most_lease(&self) -> usize {
        (self.most / FOR_LEASES).max(1)
    }

    fn next(&self, state: &mut State) -> Option<(JobClass, Job)> {
        if let Some(job) = state.quick.pop_front() {
            return Some((JobClass::Quick, job));
        }
        if state.slow_running >= self.most_slow() {
            return None;
        }
        if let Some(job) = state.slow.pop_front() {
            state.slow_running += 1;
            return Some((JobClass::Slow, job));
        }
        if state.lease_running >= self.most_lease() {
            return None;
        }
        let job = state.lease.pop_front()?;
        state.slow_running += 1;
        state.lease_running += 1;
        Some((JobClass::Lease, job))
    }

    /// Something that was running has ended.
    fn ended(&self, state: &mut State) {
        state.running -= 1;
        if state.finishing > 0 && state.is_still() {
            self.still.notify_all();
        }
    }
}

/// A pool that grows when all its threads are busy.
pub(crate) struct Pool(Arc<Shared>);

impl Pool {
    /// A pool of at most `most` threads (at least 2). One is started at once, to see whether it can
    /// be.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn new(most: usize) -> io::Result<Self> {
        can_own_directory()?;
        let shared = Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            still: Condvar::new(),
            most: most.max(2),
        };
        let pool = Self(Arc::new(shared));
        pool.start_one(&mut pool.0.lock())?;
        Ok(pool)
    }

    /// Runs `job` in some thread, soon. Never blocks.
    pub(crate) fn submit(&self, class: JobClass, job: impl FnOnce() + Send + 'static) {
        let mut state = self.0.lock();
        match class {
            JobClass::Quick => state.quick.push_back(Box::new(job)),
            JobClass::Slow => state.slow.push_back(Box::new(job)),
            JobClass::Lease => state.lease.push_back(Box::new(job)),
        }
        if state.waiting() > state.idle
            && state.threads < self.0.most
            && let Err(e) = self.start_one(&mut state)
        {
            // There is at least one thread, which comes to it in the end.
            error!("can't start a thread: {e}");
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// What the caller's thread is about to do counts as running, until the result is dropped.
    pub(crate) fn here(&self) -> Here {
        self.0.lock().running += 1;
        Here(self.0.clone())
    }

    /// Waits until all that was submitted, or is done [here](Self::here), has ended.
    pub(crate) fn finish(&self) {
        let mut state = self.0.lock();
        state.finishing += 1;
        while !state.is_still() {
            state = self.0.still.wait(state);
        }
        state.finishing -= 1;
    }

    fn start_one(&self, state: &mut State) -> io::Result<()> {
        let shared = self.0.clone();
        Builder::new().name("fuse".into()).spawn(move || {
            // Before anything else: a thread of the pool never runs without.
            while let Err(e) = own_directory() {
                error!("a thread waits for a working directory and umask of its own: {e}");
                sleep(IDLE);
            }
            run(&shared);
        })?;
        state.threads += 1;
        Ok(())
    }
}

/// Something that runs in no thread of the pool.
pub(crate) struct Here(Arc<Shared>);

impl Drop for Here {
    fn drop(&mut self) {
        self.0.ended(&mut self.0.lock());
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.0.lock().stopping = true;
        self.0.changed.notify_all();
    }
}

/// Gives the calling thread a working directory and an umask of its own: virtiofsd's code changes
/// both, and with shared ones a request would meet those of another one.
///
/// # Errors
/// The system's: a filter of system calls, most likely. Nothing that uses either may run in this
/// thread then.
pub(crate) fn own_directory() -> io::Result<()> {
    thread_local! {
        static OWN: Cell<bool> = const { Cell::new(false) };
    }
    if !OWN.get() {
        unshare(CloneFlags::CLONE_FS)?;
        OWN.set(true);
    }
    Ok(())
}

/// Whether a thread can have them: tried in one of its own, since the caller's stays as it is.
fn can_own_directory() -> io::Result<()> {
    let tried = Builder::new().name("fuse".into()).spawn(own_directory)?;
    let refused = |e| {
        io::Error::other(format!(
            "no thread can have an umask and a working directory of its own (unshare(CLONE_FS): {e}); let \
             the filter of system calls (the container's, or systemd's SystemCallFilter=) permit unshare"
        ))
    };
    tried.join().unwrap_or_else(|_| Err(Errno::EIO.into())).map_err(refused)
}

/// Does `job`. What the guest sent must never end a thread; its request stays open.
pub(crate) fn guarded(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        error!("a request made its thread panic: this is a bug");
    }
}

fn run(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some((class, job)) = shared.next(&mut state) {
            state.running += 1;
            drop(state);
            guarded(job);
            state = shared.lock();
            state.slow_running -= usize::from(class != JobClass::Quick);
            state.lease_running -= usize::from(class == JobClass::Lease);
            shared.ended(&mut state);
            continue;
        }
        if state.stopping {
            break;
        }
        state.idle += 1;
        let timed_out;
        (state, timed_out) = shared.changed.wait_timeout(state, IDLE);
        state.idle -= 1;
        let spare = timed_out && state.threads > 1;
        if spare && state.is_empty() {
            break;
        }
    }
    state.threads -= 1;
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;

    use super::*;

    /// Shows: however many slow requests there are, a quick one runs beside them.
    #[test]
    fn slow_requests_hold_up_no_quick_one() {
        let pool = Pool::new(4).unwrap();
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..20 {
            let held = held.clone();
            pool.submit(JobClass::Slow, move || {
                let _ = held.lock().unwrap().recv();
            });
        }
        let (done, seen) = channel();
        pool.submit(JobClass::Quick, move || done.send(()).unwrap());
        seen.recv().unwrap();
        drop(release);
    }

    /// Shows: however many requests wait for leases, a slow one runs beside them, and each of them
    /// runs at last.
    #[test]
    fn leases_hold_up_no_slow_request() {
        let pool = Pool::new(4).unwrap();
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        let ended = Arc::new(Mutex::new(0));
        for _ in 0..20 {
            let (held, ended) = (held.clone(), ended.clone());
            pool.submit(JobClass::Lease, move || {
                let _ = held.lock().unwrap().recv();
                *ended.lock().unwrap() += 1;
            });
        }
        for class in [JobClass::Slow, JobClass::Slow, JobClass::Quick] {
            let (done, seen) = channel();
            pool.submit(class, move || done.send(()).unwrap());
            seen.recv().unwrap();
        }
        drop(release);
        pool.finish();
        assert_eq!(*ended.lock().unwrap(), 20);
    }

    /// Shows: finish() returns when everything has ended, and not before.
    #[test]
    fn finish_waits_for_all() {
        let pool = Pool::new(4).unwrap();
        let ended = Arc::new(Mutex::new(0));
        for _ in 0..100 {
            let ended = ended.clone();
            pool.submit(JobClass::Slow, move || *ended.lock().unwrap() += 1);
        }
        pool.finish();
        assert_eq!(*ended.lock().unwrap(), 100);
        pool.finish();
    }

    /// Shows: each slow request runs at last, and a panic takes no thread away.
    #[test]
    fn everything_runs() {
        let pool = Pool::new(2).unwrap();
        let (done, seen) = channel();
        for i in 0..100 {
            let done = done.clone();
            let class = if i % 2 == 0 { JobClass::Slow } else { JobClass::Quick };
            pool.submit(class, move || {
                done.send(i).unwrap();
                assert!(i % 7 != 0, "on purpose");
            });
        }
        let mut all: Vec<i32> = seen.iter().take(100).collect();
        all.sort_unstable();
        assert_eq!(all, (0..100).collect::<Vec<_>>());
    }
}
