// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pool of threads that serve FUSE requests. It starts threads on demand, and keeps some free
//! of requests that wait for a disk.

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

/// Time after which an idle thread ends.
const IDLE: Duration = Duration::from_secs(10);

/// Divisor: this part of the threads serves no slow request. One quarter.
const KEPT_FREE: usize = 4;

/// Divisor: this part of the threads may wait for leases. One eighth, but at least one thread.
const FOR_LEASES: usize = 8;

/// For what a request waits in the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JobClass {
    /// For no disk, or only for a short read of metadata.
    Quick,
    /// For a disk or a network, without a limit.
    Slow,
    /// For a lease of a host process: by default at most 45 s (`/proc/sys/fs/lease-break-time`).
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
    /// Number of running jobs of the classes Slow and Lease.
    slow_running: usize,
    /// Number of running jobs of the class Lease.
    lease_running: usize,
    /// Number of threads in [`Pool::finish`].
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
    /// Notified when no job runs and no job waits.
    still: Condvar,
    /// Largest number of threads.
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

    /// A job has ended.
    fn ended(&self, state: &mut State) {
        state.running -= 1;
        if state.finishing > 0 && state.is_still() {
            self.still.notify_all();
        }
    }
}

/// A pool of threads. It starts a thread when all threads are busy and a job waits.
pub(crate) struct Pool(Arc<Shared>);

impl Pool {
    /// Creates a pool of at most `most` threads (at least 2). Starts one thread, so that an error
    /// is reported here.
    ///
    /// # Errors
    /// The error of unshare(2) or of the thread's start.
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

    /// Queues `job` for a thread of the pool. Never blocks.
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
            // At least one thread exists, so the job runs later.
            error!("can't start a thread: {e}");
        }
        drop(state);
        self.0.changed.notify_one();
    }

    /// Counts a job of the calling thread as running until the result is dropped.
    pub(crate) fn here(&self) -> Here {
        self.0.lock().running += 1;
        Here(self.0.clone())
    }

    /// Waits until each submitted job, and each job counted by [`here`](Self::here), has ended.
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
            // Before any job: virtiofsd's code must not change the directory of other threads.
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

/// A running job of a thread outside of the pool.
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

/// Gives the calling thread its own working directory and umask. virtiofsd's code changes both; if
/// two threads shared them, a request would be served with those of another request.
///
/// # Errors
/// EPERM or ENOSYS of unshare(2), most likely from a seccomp filter. The calling thread must then
/// serve no request.
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

/// Tries [`own_directory`] in a thread of its own, so that the caller's thread is not changed.
fn can_own_directory() -> io::Result<()> {
    let tried = Builder::new().name("fuse".into()).spawn(own_directory)?;
    let refused = |e| {
        io::Error::other(format!(
            "no thread can have an umask and a working directory of its own (unshare(CLONE_FS): \
             {e}); let the filter of system calls (the container's, or systemd's \
             SystemCallFilter=) permit unshare"
        ))
    };
    tried.join().unwrap_or_else(|_| Err(Errno::EIO.into())).map_err(refused)
}

/// Runs `job`, and catches its panic, so that no request ends a thread. The request of a job that
/// panics is never answered.
pub(crate) fn guarded(job: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        error!("a request made its thread panic: this is a bug in the daemon");
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

    /// Shows: a quick job runs while more slow jobs wait than the pool has threads.
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

    /// Shows: slow jobs run while more jobs wait for leases than the pool has threads, and each of
    /// the latter runs in the end.
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

    /// Shows: finish() returns when all jobs have ended, and not earlier.
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

    /// Shows: each slow job runs in the end, and a job that panics ends no thread.
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
