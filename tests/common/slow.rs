// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! strace, attached to a running daemon: holds system calls back, fails them, and tells when they
//! begin and end.

use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::HANG;

/// How long a call is held back. No test depends on it, but that all else is faster.
pub const DELAY: &str = "delay_enter=5000000";
/// The calls that make a file durable.
pub const SYNCS: &str = "fsync,fdatasync";

/// One strace on one process.
///
/// What it writes is read when it is asked for, not by a thread of its own: strace writes that a
/// call has ended before the call ends, so whoever has seen its effects finds it written.
pub struct Strace {
    child: Child,
    calls: Vec<String>,
    stderr: ChildStderr,
    readable: Epoll,
    text: String,
}

impl Strace {
    /// Whether there is one.
    pub fn is_here() -> bool {
        Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
    }

    /// Attaches to all threads of `pid`. `calls` is a list of system calls, `how` what is done to
    /// them in strace's own words, or nothing.
    pub fn attach(pid: u32, calls: &str, how: &str) -> Self {
        let mut command = Command::new("strace");
        command.args(["-f", "-y", "-e", "signal=none", "-e", &format!("trace={calls}")]);
        if !how.is_empty() {
            command.args(["-e", &format!("inject={calls}:{how}")]);
        }
        command.args(["-p", &pid.to_string()]).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        fcntl(&stderr, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let readable = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        readable.ctl(ControlOperation::Add, stderr.as_raw_fd(), event).unwrap();
        let calls = calls.split(',').map(str::to_owned).collect();
        let mut strace = Self { child, calls, stderr, readable, text: String::new() };
        strace.wait_until("attached", |s| s.text.contains(" attached"));
        strace
    }

    /// All that was written so far.
    pub fn text(&mut self) -> &str {
        let mut buffer = [0u8; 4096];
        while let Ok(got @ 1..) = self.stderr.read(&mut buffer) {
            self.text.push_str(&String::from_utf8_lossy(&buffer[..got]));
        }
        &self.text
    }

    fn wait_until(&mut self, what: &str, done: impl Fn(&mut Self) -> bool) {
        let deadline = Instant::now() + HANG;
        loop {
            self.text();
            if done(self) {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut events = [EpollEvent::default()];
            let ready = self.readable.wait(left.as_millis() as i32, &mut events);
            assert!(!matches!(ready, Ok(0)), "hang: not {what}: {}", self.text);
            let over = events[0].event_set().contains(EventSet::HANG_UP);
            assert!(!over || done(self), "strace ended, and not {what}: {}", self.text);
        }
    }

    /// How many calls have begun.
    pub fn begun(&mut self) -> usize {
        self.text();
        self.calls.iter().map(|call| self.text.matches(&format!("{call}(")).count()).sum()
    }

    /// How many calls that were held back have ended.
    pub fn ended(&mut self) -> usize {
        self.text().matches("(DELAYED)").count()
    }

    /// Waits until so many calls have begun.
    pub fn wait_begun(&mut self, calls: usize) {
        self.wait_until("begun", |s| s.begun() >= calls);
    }

    /// Waits until so many calls that were held back have ended.
    pub fn wait_ended(&mut self, calls: usize) {
        self.wait_until("ended", |s| s.ended() >= calls);
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // At SIGTERM it lets its process go on.
        let _ = kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM);
        // It waits for the first process of a PID namespace to be gone, which waits for its own
        // threads to be let go of.
        let deadline = Instant::now() + Duration::from_secs(3);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("strace said:\n{}", self.text());
        }
    }
}

/// Says loudly that a test can't run here; ci/test counts these lines.
pub fn skip(test: &str, why: &str) {
    use std::io::Write;
    // Not eprintln!: the test runner would swallow it.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
