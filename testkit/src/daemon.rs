// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real daemon as a child process, which is killed when its owner is dropped.

use std::borrow::BorrowMut;
use std::env;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::HANG;

/// The daemon that was built with this test program: target/PROFILE/vhost-user-dax, where the
/// program is target/PROFILE/deps/NAME-HASH.
pub fn binary() -> PathBuf {
    let program = env::current_exe().unwrap();
    program.parent().and_then(Path::parent).unwrap().join("vhost-user-dax")
}

/// Waits for the end of a process.
pub fn wait_end(child: &mut Child) -> ExitStatus {
    if let Some(status) = child.try_wait().unwrap() {
        return status;
    }
    let pidfd = pidfd_of(child);
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(HANG).unwrap();
    loop {
        match poll(&mut fds, timeout) {
            Ok(0) => panic!("hang: process {} does not end", child.id()),
            Ok(_) => return child.wait().unwrap(),
            Err(Errno::EINTR) => {}
            Err(e) => panic!("poll: {e}"),
        }
    }
}

#[allow(unsafe_code)]
fn pidfd_of(child: &Child) -> OwnedFd {
    // SAFETY: pidfd_open takes numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
    assert!(fd >= 0, "pidfd_open: {}", Errno::last());
    // SAFETY: the kernel has just returned this descriptor, and no other owner exists.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[derive(Default)]
struct Log {
    text: Mutex<String>,
    grown: Condvar,
}

/// A daemon that has logged that it waits for a front-end.
pub struct Daemon {
    child: Child,
    log: Arc<Log>,
    /// A stderr that no thread reads.
    _unread: Option<BufReader<ChildStderr>>,
}

impl Daemon {
    /// Starts `command`; its stderr is read to the end.
    pub fn start(command: impl BorrowMut<Command>) -> Self {
        Self::start_and_read(command, true)
    }

    /// Starts `command`; its stderr is read on only if `read_log` says so.
    pub fn start_and_read(mut command: impl BorrowMut<Command>, read_log: bool) -> Self {
        let mut child = command.borrow_mut().stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut text = String::new();
        while !text.to_lowercase().contains("waiting for") {
            assert_ne!(stderr.read_line(&mut text).unwrap(), 0, "the daemon ended: {text}");
        }
        let log = Arc::new(Log { text: Mutex::new(text), grown: Condvar::new() });
        let theirs = log.clone();
        let _unread = if read_log {
            thread::spawn(move || {
                for line in stderr.lines().map_while(Result::ok) {
                    let mut text = theirs.text.lock().unwrap();
                    text.push_str(&line);
                    text.push('\n');
                    theirs.grown.notify_all();
                }
            });
            None
        } else {
            Some(stderr)
        };
        Self { child, log, _unread }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The log so far.
    pub fn said(&self) -> String {
        self.log.text.lock().unwrap().clone()
    }

    /// Waits until the log contains `words`.
    pub fn wait_said(&self, words: &str) {
        let text = self.log.text.lock().unwrap();
        let stop = |text: &mut String| !text.contains(words);
        let (text, timeout) = self.log.grown.wait_timeout_while(text, HANG, stop).unwrap();
        assert!(!timeout.timed_out(), "hang: waited for '{words}' in: {text}");
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Kills the process with SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Waits until the process ends.
    pub fn wait_end(&mut self) -> ExitStatus {
        wait_end(&mut self.child)
    }

    /// Sends it a signal, and waits for its end.
    pub fn end_with(mut self, signal: Signal) -> ExitStatus {
        self.signal(signal);
        self.wait_end()
    }

    /// Whether it has ended, without waiting.
    pub fn is_over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
