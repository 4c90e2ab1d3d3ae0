// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as a child process: start, log, counters, end.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::disk::Disk;
use crate::images::Images;
use crate::output::Output;
use crate::share::Share;

/// Time limit that tells a hang from a slow machine; each step takes far less.
const HANG: Duration = Duration::from_secs(60);

/// Allowance for maps of threads. A leak of one map per mount, or per map in the window, exceeds
/// it.
const MAPS_OF_THREADS: usize = 64;

/// The counters in the line that the daemon logs at the end of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counts {
    pub flushes: u64,
    pub syncs: u64,
    pub failed: u64,
    pub malformed: u64,
}

/// File descriptors, mappings and anonymous memory of a daemon, without the VM's memory.
#[derive(Debug, Clone, Copy)]
pub struct Usage {
    pub fds: usize,
    pub maps: usize,
    /// Number of mappings of a file, a library or a memfd.
    pub file_maps: usize,
    pub rss_kib: u64,
}

impl Usage {
    /// Asserts that no descriptor and no map of a file was leaked. Other maps may grow: the number
    /// of threads varies, and each thread may have a stack, a malloc arena, and a guard page of
    /// each.
    pub fn assert_like(self, before: Self) {
        let like = self.fds <= before.fds
            && self.file_maps <= before.file_maps
            && self.maps <= before.maps + MAPS_OF_THREADS
            && self.rss_kib <= before.rss_kib + 4096;
        assert!(like, "the daemon grew: {before:?} became {self:?}");
    }
}

/// Path of our daemon. `VUD_DAEMON` selects another build, for example a broken one, to see that a
/// test detects the defect.
pub fn binary() -> PathBuf {
    let other = std::env::var_os("VUD_DAEMON");
    other.map_or_else(|| env!("CARGO_BIN_EXE_vhost-user-dax").into(), PathBuf::from)
}

pub struct Daemon {
    child: Child,
    output: Output,
    socket: PathBuf,
    trace: Option<PathBuf>,
}

impl Daemon {
    /// Starts the daemon on `disk` and waits until its socket exists. With arguments for strace it
    /// runs under strace, which can delay the daemon's system calls or make them fail.
    pub fn start(
        disk: &Disk,
        socket: &Path,
        strace: &[&str],
        on_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        let trace = (!strace.is_empty()).then(|| socket.with_extension("trace"));
        let mut command = match &trace {
            None => Command::new(binary()),
            Some(trace) => {
                let mut command = Command::new("strace");
                // -D: the child process is the daemon and the tracer its grandchild, so that a
                // signal to the child reaches the daemon.
                command.args(["-D", "-f", "-o"]).arg(trace).args(strace);
                command.arg("--").arg(binary());
                command
            }
        };
        command.arg("pmem").arg("--socket-path").arg(socket);
        if trace.is_some() {
            // strace fails a call by making it another one, which a filter would forbid.
            command.args(["--seccomp", "none"]);
        }
        command.arg("--file").arg(disk.path());
        command.args(["--size", &format!("{}M", disk.bytes() >> 20)]).args(disk.daemon_args());
        Self::spawn(command, socket, trace, on_end)
    }

    /// Starts the back-end of a share: ours, or Debian's virtiofsd.
    pub fn serve(
        share: &Share,
        images: &Images,
        socket: &Path,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        Self::spawn(share.command(images, socket), socket, None, on_end)
    }

    fn spawn(
        mut command: Command,
        socket: &Path,
        trace: Option<PathBuf>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("start the daemon (is strace installed?)");
        let output = Output::collect(child.stderr.take().expect("stderr is piped"), on_end);
        let mut daemon = Self { child, output, socket: socket.into(), trace };
        daemon.wait_for_socket();
        daemon
    }

    /// Starts another daemon on `disk`, which must end with code 2 and log `why`.
    pub fn assert_refused(disk: &Disk, why: &str) {
        let mut command = Command::new(binary());
        command.arg("pmem").arg("--socket-path").arg(disk.path().with_extension("second"));
        let output = command.arg("--file").arg(disk.path()).output().expect("start a daemon");
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && log.contains(why), "{log}");
    }

    // Polls for the socket's path. A connection would be the daemon's only session.
    fn wait_for_socket(&mut self) {
        let exists = self.output.wait_until(HANG, || self.socket.exists());
        assert!(exists, "the daemon created no socket:\n{}", self.log());
    }

    pub fn log(&self) -> String {
        self.output.lines().join("\n")
    }

    /// Process ID of the daemon's worker, which serves the guest.
    pub fn pid(&self) -> u32 {
        let daemon = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"));
        let is_worker = |pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm"))
                .is_ok_and(|comm| comm.trim() == "vhost-user-dax")
        };
        let children = children.unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        pids.into_iter().find(is_worker).unwrap_or(daemon)
    }

    /// The daemon's current use of descriptors, mappings and memory.
    pub fn usage(&self) -> Usage {
        let process = PathBuf::from(format!("/proc/{}", self.pid()));
        let read = |name: &str| std::fs::read_to_string(process.join(name)).expect("read /proc");
        let status = read("status");
        let maps = read("maps");
        let rss = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("RssAnon");
        Usage {
            fds: std::fs::read_dir(process.join("fd")).expect("read /proc").count(),
            maps: maps.lines().count(),
            file_maps: maps.lines().filter(|line| line.split(' ').nth(4) != Some("0")).count(),
            rss_kib: rss.split_whitespace().next().unwrap().parse().unwrap(),
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().expect("kill the daemon");
        self.child.wait().expect("wait for the killed daemon");
    }

    /// Ends the daemon by SIGTERM, as a service manager does; the exit code must be 0.
    pub fn terminate(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("send SIGTERM");
        let status = self.wait();
        assert!(status.success(), "the daemon ended with {status}:\n{}", self.log());
    }

    /// Waits until the daemon has ended on its own, as it does when its VM has gone.
    pub fn wait(&mut self) -> ExitStatus {
        assert!(self.output.wait_closed(HANG), "the daemon does not end:\n{}", self.log());
        self.child.wait().expect("wait for the daemon")
    }

    /// The counts in `session ended: flushes=N syncs=M failed=F malformed=X`.
    pub fn counts(&self) -> Counts {
        let lines = self.output.lines();
        let line = lines
            .iter()
            .find_map(|line| line.split_once("session ended:"))
            .unwrap_or_else(|| panic!("no session line in the daemon's log:\n{}", self.log()))
            .1;
        let number = |key: &str| -> u64 {
            line.split_whitespace()
                .filter_map(|word| word.split_once('='))
                .find(|(name, _)| *name == key)
                .and_then(|(_, value)| value.trim_end_matches([',', ';']).parse().ok())
                .unwrap_or_else(|| panic!("no {key}= in '{line}'"))
        };
        Counts {
            flushes: number("flushes"),
            syncs: number("syncs"),
            failed: number("failed"),
            malformed: number("malformed"),
        }
    }

    /// Number of times the daemon entered the system call `call`, counted by strace.
    pub fn traced(&self, call: &str) -> u64 {
        let trace = self.trace.as_ref().expect("the daemon runs under strace");
        let text = std::fs::read_to_string(trace).expect("read the trace");
        // strace prints a call that another thread interrupts in two lines; the second one, `<...
        // call resumed>`, does not contain `call(`.
        let entered = format!("{call}(");
        text.lines().filter(|line| line.contains(&entered)).count() as u64
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Both fail if the daemon has ended already; that is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
