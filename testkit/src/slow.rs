// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! strace(1), attached to a running daemon: delays system calls, makes them fail, and reports their
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

use crate::HANG;

/// strace's option to delay a call until the [`Strace`] is dropped (or for 10 minutes, a hang).
pub const HELD: &str = "delay_enter=600000000";
/// strace's option to delay a call for 2 s, for tests in which the delayed call must end by itself.
/// If other work takes longer than 2 s, such a test still passes, but checks less.
pub const DELAY: &str = "delay_enter=2000000";
/// The system calls that make a file durable.
pub const SYNCS: &str = "fsync,fdatasync";

/// One strace process, attached to one process.
///
/// The calling thread reads strace's output when it needs it. strace writes that a call has ended
/// before the call ends, so a test that has seen the effect of a call finds the line already
/// written.
pub struct Strace {
    child: Child,
    calls: Vec<String>,
    stderr: ChildStderr,
    readable: Epoll,
    text: String,
}

impl Strace {
    /// Whether strace(1) is installed.
    pub fn is_here() -> bool {
        Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok_and(|s| s.success())
    }

    /// Attaches to all threads of `pid`. `calls` is a list of system calls; `how` is strace's
    /// option for the injection into them, or empty.
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

    /// strace's output so far.
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

    /// The number of calls that have begun.
    pub fn begun(&mut self) -> usize {
        self.text();
        self.calls.iter().map(|call| self.text.matches(&format!("{call}(")).count()).sum()
    }

    /// The number of delayed calls that have ended.
    pub fn ended(&mut self) -> usize {
        self.text().matches("(DELAYED)").count()
    }

    /// Waits until `calls` calls have begun.
    pub fn wait_begun(&mut self, calls: usize) {
        self.wait_until("begun", |s| s.begun() >= calls);
    }

    /// Waits until `calls` calls that were held back have ended.
    pub fn wait_ended(&mut self, calls: usize) {
        self.wait_until("ended", |s| s.ended() >= calls);
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // strace detaches at SIGTERM, and the traced process goes on.
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

/// Reports on stderr that a test can't run here. ci/test counts these lines.
pub fn skip(test: &str, why: &str) {
    use std::io::Write;
    // Not eprintln!, which the test runner captures.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
