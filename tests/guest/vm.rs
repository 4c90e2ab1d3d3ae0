// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One VM with one daemon per device, and the protocol with the agent inside it, which
//! guest-tests/README.md describes.

mod lives;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Child;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use nix::fcntl::Flock;
use serde_json::json;
use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::disk::Disk;
use crate::images::Images;
use crate::machine::{FIRST_DISK, FIRST_SHARE, Options, Parts, devices, qemu_command};
use crate::output::Output;
use crate::qmp::Qmp;
use crate::report::CaseReport;
use crate::share::Share;

/// Time limit of one case and of one boot. It only tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(180);

/// Longest time between QEMU's write of a line and our reader thread's read of it. A test waits
/// that long only if QEMU writes no such line.
const READER_LAG: Duration = Duration::from_secs(10);

enum Event {
    /// The agent's port is connected.
    Agent(UnixStream),
    /// One line from the agent.
    Line(String),
    /// The agent's port is closed: no more lines.
    Closed,
    /// A process has ended: QEMU or a daemon.
    Gone(Process),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Process {
    Qemu,
    Daemon(usize),
}

/// The environment of a test: the images, the test's name for the log of cases, and a slot to run a
/// VM in.
pub struct Guest {
    images: Images,
    test: &'static str,
    _slot: Flock<File>,
}

impl Guest {
    /// `None` if guest tests are to be skipped; the log of cases then has a line for it.
    pub fn enter(test: &'static str) -> Option<Self> {
        let images = Images::find(test)?;
        let slot = images.slot();
        Some(Self { images, test, _slot: slot })
    }

    pub fn images(&self) -> &Images {
        &self.images
    }

    pub fn boot(&self, disks: &[&Disk]) -> Vm<'_> {
        self.boot_with(disks, &Options::default())
    }

    pub fn boot_with(&self, disks: &[&Disk], options: &Options<'_>) -> Vm<'_> {
        Vm::boot(self, &Parts { disks, shares: &[] }, options)
    }

    /// Boots a VM with shares and disks.
    pub fn boot_shares(&self, shares: &[Share], parts: &[&Disk], options: &Options<'_>) -> Vm<'_> {
        Vm::boot(self, &Parts { disks: parts, shares }, options)
    }
}

pub struct Vm<'g> {
    guest: &'g Guest,
    folder: TempDir,
    /// The daemons of the disks, then those of the shares.
    daemons: Vec<Daemon>,
    disks: usize,
    qemu: Child,
    qemu_output: Output,
    events: Receiver<Event>,
    agent: Option<UnixStream>,
    qmp: Option<Qmp>,
    boot_id: String,
    /// The devices' arguments, needed to plug them in again.
    devices: Vec<String>,
    /// Indices of the daemons that the test has killed.
    killed: Vec<usize>,
}

impl<'g> Vm<'g> {
    fn boot(guest: &'g Guest, parts: &Parts<'_>, options: &Options<'_>) -> Self {
        let started = Instant::now();
        let folder = TempDir::new().expect("make a folder for the VM");
        let (sender, events) = channel();
        let daemons = start_daemons(guest, parts, &folder, options.strace, &sender);
        let agent_listener = UnixListener::bind(folder.path().join("agent")).expect("bind");
        let qmp_listener = UnixListener::bind(folder.path().join("qmp")).expect("bind");
        let mut command = qemu_command(&guest.images, folder.path(), parts, options);
        let mut qemu = command.spawn().expect("start QEMU");
        let gone = sender.clone();
        let qemu_output = Output::collect(qemu.stderr.take().expect("piped"), move || {
            let _ = gone.send(Event::Gone(Process::Qemu));
        });
        read_agent(agent_listener, sender);
        let mut vm = Self {
            guest,
            folder,
            daemons,
            disks: parts.disks.len(),
            qemu,
            qemu_output,
            events,
            agent: None,
            qmp: None,
            boot_id: String::new(),
            devices: devices(parts).into_iter().map(|(device, _)| device).collect(),
            killed: Vec::new(),
        };
        vm.wait_ready();
        // QEMU connects before it runs the guest's first instruction.
        vm.qmp = Some(Qmp::accept(&qmp_listener));
        guest.images.log_case("boot", guest.test, "-", started.elapsed().as_millis());
        vm
    }

    /// Waits for the pmem device of a disk, and returns its path and its size in bytes in the
    /// guest.
    pub fn ready(&mut self, disk: usize) -> (String, u64) {
        let report = self.run("ready", &[&slot_of(disk)]);
        (report.get("dev").to_owned(), report.number("bytes"))
    }

    /// Mounts a share. `options` are used only if the device has a window.
    pub fn mount(&mut self, share: &Share, dir: &str, options: &str) -> CaseReport {
        let options = if share.has_window() { options } else { "rw" };
        self.run("fs-mount", &[share.tag(), dir, options])
    }

    /// The daemon of a share.
    pub fn share(&self, index: usize) -> &Daemon {
        &self.daemons[self.disks + index]
    }

    /// Whether QEMU has written a line with `words` to stderr. QEMU writes it before it answers on
    /// QMP, but our thread may read it later.
    pub fn qemu_has_written(&self, words: &str) -> bool {
        self.qemu_output.wait_line(READER_LAG, words)
    }

    /// All lines that QEMU has written to stderr.
    pub fn qemu_lines(&self) -> Vec<String> {
        self.qemu_output.lines()
    }

    /// Runs one case that must pass.
    pub fn run(&mut self, case: &str, args: &[&str]) -> CaseReport {
        self.start(case, args);
        self.finish(case)
    }

    /// Starts a case, and returns when the guest has begun it.
    pub fn start(&mut self, case: &str, args: &[&str]) {
        self.send(&format!("RUN {case} {}", args.join(" ")));
        let line = self.next_line();
        if line != format!("BEGIN {case}") {
            self.fail(&format!("expected BEGIN {case}, got '{line}'"));
        }
    }

    /// Waits for the next output line of the running case.
    pub fn case_line(&mut self) -> String {
        let line = self.next_line();
        match line.strip_prefix("| ") {
            Some(text) => text.to_owned(),
            None => self.fail(&format!("expected output of a case, got '{line}'")),
        }
    }

    /// Waits for the next output line of the running case, at most for `time`.
    pub fn case_line_within(&mut self, time: Duration) -> Option<String> {
        match self.events.recv_timeout(time) {
            Ok(Event::Line(line)) => line.strip_prefix("| ").map(str::to_owned),
            Ok(_) => self.fail("QEMU, a daemon or the agent's connection has ended"),
            Err(_) => None,
        }
    }

    /// The output lines that the host received before QEMU was killed and that no call has returned
    /// yet.
    pub fn last_lines(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            match self.events.recv_timeout(HANG) {
                Ok(Event::Line(line)) => lines.extend(line.strip_prefix("| ").map(str::to_owned)),
                Ok(Event::Closed) => return lines,
                Ok(_) => {}
                Err(error) => self.fail(&format!("the agent's port stays open: {error}")),
            }
        }
    }

    /// Waits for the end of the case; a case that fails or is skipped fails the test.
    pub fn finish(&mut self, case: &str) -> CaseReport {
        let started = Instant::now();
        let mut lines = Vec::new();
        let end = format!("END {case} ");
        let status: i32 = loop {
            let line = self.next_line();
            if let Some(text) = line.strip_prefix("| ") {
                lines.push(text.to_owned());
            } else if let Some(status) = line.strip_prefix(&end) {
                break status.parse().unwrap_or(-1);
            } else {
                self.fail(&format!("unexpected line in {case}: '{line}'"));
            }
        };
        let outcome = match status {
            0 => "ok",
            77 => "skip",
            _ => "fail",
        };
        let millis = started.elapsed().as_millis();
        self.guest.images.log_case(outcome, self.guest.test, case, millis);
        if status != 0 {
            self.fail(&format!("case {case} ended with {status}:\n{}", lines.join("\n")));
        }
        CaseReport { lines }
    }

    /// Resets the machine from inside the guest, without unmount and sync.
    pub fn reboot(&mut self) {
        // In every other case a reset comes from a panic, and ends QEMU: see `qemu_command`.
        self.qmp("set-action", json!({"reboot": "reset"}));
        self.send("REBOOT");
        self.expect("BYE REBOOT");
        self.wait_ready();
        self.qmp("set-action", json!({"reboot": "shutdown"}));
    }

    /// Resets the machine from inside the guest with `-action reboot=shutdown`, which ends QEMU.
    pub fn reboot_ends(&mut self) {
        self.send("REBOOT");
        self.expect("BYE REBOOT");
        self.wait_ended();
    }

    /// Powers off. QEMU and every daemon must end on their own, with exit code 0.
    pub fn poweroff(&mut self) {
        self.send("POWEROFF");
        self.expect("BYE POWEROFF");
        self.wait_ended();
    }

    fn wait_ended(&mut self) {
        if !self.qemu_output.wait_closed(HANG) {
            self.fail("QEMU does not end");
        }
        let status = self.qemu.wait().expect("wait for QEMU");
        if !status.success() {
            self.fail(&format!("QEMU ended with {status}"));
        }
        self.wait_daemons();
    }

    /// Waits until every daemon that the test has not killed has ended, with exit code 0.
    pub fn wait_daemons(&mut self) {
        for index in 0..self.daemons.len() {
            if !self.killed.contains(&index) {
                let status = self.daemons[index].wait();
                if !status.success() {
                    self.fail(&format!("daemon {index} ended with {status}"));
                }
            }
        }
    }

    #[allow(dead_code)] // Only the benchmark uses it.
    /// Proportional set size (PSS) of QEMU and the daemons, in KiB.
    pub fn pss_kib(&self) -> f64 {
        let daemons = self.daemons.iter().map(Daemon::pid);
        let pss = daemons.chain([self.qemu.id()]).map(|pid| {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = std::fs::read_to_string(path).expect("smaps_rollup");
            let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).expect("Pss");
            line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number")
        });
        pss.sum()
    }

    pub fn kill_qemu(&mut self) {
        self.qemu.kill().expect("kill QEMU");
        self.qemu.wait().expect("wait for the killed QEMU");
    }

    pub fn kill_daemon(&mut self, index: usize) {
        self.killed.push(index);
        self.daemons[index].kill();
    }

    /// Prints QEMU's lines, sorted and without repetitions, and QEMU's exit status if it has ended.
    pub fn print_end(&mut self) {
        let mut lines = self.qemu_output.lines();
        println!("QEMU wrote {} lines; exit status: {:?}", lines.len(), self.qemu.try_wait());
        lines.sort();
        lines.dedup();
        lines.iter().for_each(|line| println!("  {line}"));
    }

    /// Asserts that QEMU has written nothing to stderr.
    pub fn assert_qemu_is_quiet(&self) {
        let lines = self.qemu_output.lines();
        assert!(lines.is_empty(), "QEMU wrote to stderr:\n{}", lines.join("\n"));
    }

    pub fn daemon(&self, index: usize) -> &Daemon {
        &self.daemons[index]
    }

    pub fn qmp(&mut self, command: &str, arguments: serde_json::Value) -> serde_json::Value {
        self.qmp.as_mut().expect("QMP is connected").command(command, arguments)
    }

    fn wait_ready(&mut self) {
        let line = self.next_line();
        let Some(boot_id) = line.strip_prefix("READY ") else {
            self.fail(&format!("expected READY, got '{line}'"));
        };
        if boot_id == self.boot_id {
            self.fail("the guest did not reboot");
        }
        self.boot_id = boot_id.to_owned();
    }

    fn send(&mut self, line: &str) {
        let agent = self.agent.as_mut().expect("the agent is not connected");
        if let Err(error) = writeln!(agent, "{line}") {
            self.fail(&format!("can't write to the agent: {error}"));
        }
    }

    fn expect(&mut self, expected: &str) {
        let line = self.next_line();
        if line != expected {
            self.fail(&format!("expected '{expected}', got '{line}'"));
        }
    }

    fn next_line(&mut self) -> String {
        let end = Instant::now() + HANG;
        loop {
            match self.events.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(Event::Line(line)) => return line,
                Ok(Event::Agent(stream)) => self.agent = Some(stream),
                // The Gone event of the process that has ended follows.
                Ok(Event::Closed) => {}
                Ok(Event::Gone(Process::Daemon(index))) if self.killed.contains(&index) => {}
                // A panic in the guest ends QEMU, too.
                Ok(Event::Gone(process)) => self.fail(&format!("{process:?} ended")),
                Err(RecvTimeoutError::Timeout) => self.fail("the guest hangs"),
                Err(RecvTimeoutError::Disconnected) => self.fail("QEMU and all daemons have ended"),
            }
        }
    }

    /// Fails the test, with the guest's console and the logs of QEMU and the daemons.
    pub fn fail(&self, why: &str) -> ! {
        let console = std::fs::read(self.folder.path().join("console")).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let console: Vec<&str> = console.lines().collect();
        let tail = console[console.len().saturating_sub(40)..].join("\n");
        let mut text = format!("{}: {why}\n--- guest console\n{tail}\n", self.guest.test);
        text += &format!("--- QEMU\n{}\n", self.qemu_output.lines().join("\n"));
        for (index, daemon) in self.daemons.iter().enumerate() {
            text += &format!("--- daemon {index}\n{}\n", daemon.log());
        }
        panic!("{text}");
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        // Both fail if QEMU has ended already; that is no error.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        // Unblocks the thread in accept() if QEMU has never connected.
        let _ = UnixStream::connect(self.folder.path().join("agent"));
    }
}

/// The PCI slot of a disk, in hexadecimal, as the guest's cases take it.
pub fn slot_of(disk: usize) -> String {
    format!("{:02x}", FIRST_DISK + disk)
}

/// The PCI slot of a share, in hexadecimal.
pub fn slot_of_share(share: usize) -> String {
    format!("{:02x}", FIRST_SHARE + share)
}

fn start_daemons(
    guest: &Guest,
    parts: &Parts<'_>,
    folder: &TempDir,
    strace: &[&str],
    sender: &Sender<Event>,
) -> Vec<Daemon> {
    let socket = |index: usize| folder.path().join(format!("vhost-{index}"));
    let on_end = |index: usize| {
        let gone = sender.clone();
        move || {
            let _ = gone.send(Event::Gone(Process::Daemon(index)));
        }
    };
    let mut daemons = Vec::new();
    for (index, disk) in parts.disks.iter().enumerate() {
        daemons.push(Daemon::start(disk, &socket(index), strace, on_end(index)));
    }
    for (index, share) in (parts.disks.len()..).zip(parts.shares) {
        daemons.push(Daemon::serve(share, &guest.images, &socket(index), on_end(index)));
    }
    daemons
}

/// Starts a thread that sends the agent's stream and then its lines, until QEMU closes the stream.
fn read_agent(listener: UnixListener, sender: Sender<Event>) {
    std::thread::spawn(move || {
        let Ok((stream, _)) = listener.accept() else { return };
        let writer = stream.try_clone().expect("clone the agent's stream");
        if sender.send(Event::Agent(writer)).is_err() {
            return;
        }
        for line in BufReader::new(stream).lines().map_while(Result::ok) {
            if sender.send(Event::Line(line)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::Closed);
    });
}
