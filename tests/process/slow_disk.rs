// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real daemon on a slow disk, with the test's front-end. strace makes the disk slow: it delays
//! each fdatasync.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, mkfifo};
use testkit::FILE_BYTES;
use testkit::driver::{Answer, Driver, DriverOptions};
use testkit::memory::guest_ram;
use testkit::strict_vmm::{StrictVmm, VmmOptions};

/// Duration of each fdatasync, in microseconds: long enough that a signal comes during it.
const SYNC_MICROSECONDS: u32 = 1_500_000;

/// A daemon with a slow fdatasync. strace writes one line when a call begins, and one when it ends.
struct SlowDaemon {
    child: Child,
    trace: BufReader<File>,
}

impl SlowDaemon {
    fn start(dir: &Path) -> Self {
        let pipe = dir.join("trace");
        mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut command = Command::new("strace");
        // -D: the child is the daemon itself, so it gets the signal.
        command.args(["-D", "-f", "-o"]).arg(&pipe).args(["-e", "trace=fdatasync", "-e"]);
        command.arg(format!("inject=fdatasync:delay_exit={SYNC_MICROSECONDS}")).arg("--");
        command.arg(env!("CARGO_BIN_EXE_vhost-user-dax")).arg("pmem");
        command.arg("--socket-path").arg(dir.join("sock")).arg("--file").arg(dir.join("file"));
        command.args(["--size", &FILE_BYTES.to_string()]).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let trace = BufReader::new(File::open(pipe).unwrap());
        let mut said = String::new();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        while !said.contains("waiting for a front-end") {
            assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "the daemon ended: {said}");
        }
        // The rest of stderr is not read: a full pipe must not stop the daemon.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Self { child, trace }
    }

    /// Waits until a line of strace shows that an fdatasync has begun.
    fn wait_for_sync(&mut self) {
        let mut line = String::new();
        while !line.contains("fdatasync(") {
            line.clear();
            assert_ne!(self.trace.read_line(&mut line).unwrap(), 0, "the daemon ended");
        }
    }
}

impl Drop for SlowDaemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Shows: SIGTERM during a sync lets it finish, answers its flush, removes the socket, and ends
/// with code 0.
#[test]
fn sigterm_in_the_middle_of_a_sync_loses_nothing() {
    if Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_err() {
        let _ = writeln!(std::io::stderr(), "SKIPPED sigterm_in_the_middle_of_a_sync: no strace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut daemon = SlowDaemon::start(dir.path());
    let ram = guest_ram(1);
    let mut vmm =
        StrictVmm::connect(&dir.path().join("sock"), &ram, VmmOptions::default()).unwrap();
    let mut driver = Driver::new(ram, DriverOptions::default());
    vmm.start(&mut driver);
    vmm.wait_live(1);
    let flush = driver.flush();
    daemon.wait_for_sync();
    kill(Pid::from_raw(daemon.child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(driver.wait(flush), Answer::OK, "the running sync must be answered");
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
    assert!(!fs::exists(dir.path().join("sock")).unwrap(), "the socket is left");
}
