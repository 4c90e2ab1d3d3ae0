// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One QEMU process without a guest: `-accel qtest` runs no instruction, and the probe accesses the
//! devices as a driver would. QEMU's end is a result; a QEMU that hangs is killed.

use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::HANG;
use crate::output::Output;

/// An error that kept a row from being measured to its end.
#[derive(Debug)]
pub enum ProbeError {
    /// A connection broke. If QEMU has ended, that is the result of the row.
    Io(io::Error),
    /// QEMU or the probe did something unexpected that the row does not measure.
    Other(String),
}

impl From<io::Error> for ProbeError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

pub type Res<T> = Result<T, ProbeError>;

/// How a QEMU ended.
#[derive(Debug, Clone)]
pub enum End {
    Signal(Signal),
    Code(i32),
    /// QEMU was killed: it did not do in time what it was asked for.
    Hung,
}

/// Longest time between QEMU's write of a line and our reader thread's read of it. A row waits that
/// long only if QEMU writes no line.
const READER_LAG: Duration = Duration::from_secs(2);

/// Time limit for QEMU to free the memory of a dropped map.
const FREE_COMES: Duration = Duration::from_secs(60);

/// Kills QEMU if it does not end in time.
struct Watchdog {
    done: Sender<()>,
    thread: JoinHandle<bool>,
}

impl Watchdog {
    fn new(pid: Pid) -> Self {
        let (done, is_done) = channel();
        let thread = thread::spawn(move || {
            let fired = is_done.recv_timeout(HANG) == Err(RecvTimeoutError::Timeout);
            if fired {
                // The process is reaped only after this thread is joined, so the process ID is
                // still valid.
                let _ = kill(pid, Signal::SIGKILL);
            }
            fired
        });
        Self { done, thread }
    }

    /// Stops the watchdog. True if it has killed QEMU.
    fn finish(self) -> bool {
        let _ = self.done.send(());
        self.thread.join().unwrap_or(false)
    }
}

pub struct Qemu {
    child: Child,
    watchdog: Option<Watchdog>,
    output: Output,
    listeners: [UnixListener; 2],
    sockets: Option<Sockets>,
    /// Events that have arrived and that `wait_event` has not returned yet.
    events: Vec<String>,
    end: Option<End>,
}

struct Sockets {
    qmp: BufReader<UnixStream>,
    qtest: BufReader<UnixStream>,
}

impl Qemu {
    /// Starts QEMU. If QEMU ends at once, `start` succeeds and the first command fails.
    pub fn start(program: &Path, folder: &Path, arguments: &[String]) -> Res<Self> {
        let (qmp_path, qtest_path) = (folder.join("qmp"), folder.join("qtest"));
        let qmp_listener = UnixListener::bind(&qmp_path)?;
        let qtest_listener = UnixListener::bind(&qtest_path)?;
        // The kernel kills QEMU when the probe ends.
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(["-accel", "qtest", "-nodefaults", "-no-user-config", "-display", "none"])
            .args(["-qtest-log", "/dev/null"])
            .args(["-qtest", &format!("unix:{}", qtest_path.display())])
            .args(["-qmp", &format!("unix:{}", qmp_path.display())])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = child.stderr.take().ok_or(io::Error::from(ErrorKind::BrokenPipe))?;
        let output = Output::collect(stderr, move || {
            // Unblocks a thread in accept(): it gets a closed connection.
            let _ = (UnixStream::connect(qmp_path), UnixStream::connect(qtest_path));
        });
        let watchdog = Some(Watchdog::new(Pid::from_raw(child.id().cast_signed())));
        let listeners = [qmp_listener, qtest_listener];
        Ok(Self {
            child,
            watchdog,
            output,
            listeners,
            sockets: None,
            events: Vec::new(),
            end: None,
        })
    }

    /// Waits until QEMU has connected both sockets and sent its QMP greeting.
    pub fn greet(&mut self) -> Res<()> {
        let [qmp, qtest] = &self.listeners;
        let (qmp, qtest) = (qmp.accept()?.0, qtest.accept()?.0);
        self.sockets = Some(Sockets { qmp: BufReader::new(qmp), qtest: BufReader::new(qtest) });
        let greeting = self.read_qmp()?;
        if greeting.get("QMP").is_none() {
            return Err(ProbeError::Other(format!("not a QMP greeting: {greeting}")));
        }
        self.qmp("qmp_capabilities", json!({})).map(|_| ())
    }

    fn sockets(&mut self) -> io::Result<&mut Sockets> {
        self.sockets.as_mut().ok_or_else(|| ErrorKind::NotConnected.into())
    }

    /// Runs a QMP command. Events that come in between are recorded.
    pub fn qmp(&mut self, command: &str, arguments: Value) -> Res<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.sockets()?.qmp.get_mut(), "{request}")?;
        loop {
            let mut answer = self.read_qmp()?;
            if let Some(error) = answer.get("error") {
                let text = error.get("desc").and_then(Value::as_str).unwrap_or("?");
                return Err(ProbeError::Other(format!("QMP {command}: {text}")));
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    /// Waits for an event that a command causes; the event may have come before the command's
    /// answer.
    pub fn wait_event(&mut self, name: &str) -> Res<()> {
        while !self.events.iter().any(|event| event == name) {
            self.read_qmp()?;
        }
        self.events.clear();
        Ok(())
    }

    fn read_qmp(&mut self) -> Res<Value> {
        let line = read_line(&mut self.sockets()?.qmp)?;
        let said: Value = serde_json::from_str(&line)
            .map_err(|e| ProbeError::Other(format!("QMP sent '{line}': {e}")))?;
        if let Some(event) = said.get("event").and_then(Value::as_str) {
            self.events.push(event.to_owned());
        }
        Ok(said)
    }

    /// Waits until QEMU has no mapping of this file any more. QEMU frees a dropped region by RCU,
    /// about 50 ms later; without the wait the result would depend on the speed of the probe.
    pub fn wait_unmapped(&mut self, file: &Path) -> Res<()> {
        let end = Instant::now() + FREE_COMES;
        let maps = format!("/proc/{}/maps", self.child.id());
        let file = file.display().to_string();
        loop {
            let is_mapped = std::fs::read_to_string(&maps)?.contains(&file);
            if !is_mapped || self.is_gone() {
                return Ok(());
            }
            if Instant::now() > end {
                return Err(ProbeError::Other("QEMU keeps the region of a dropped map".into()));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Runs a qtest command, and returns the text after the OK.
    pub fn qtest(&mut self, command: &str) -> Res<String> {
        let qtest = &mut self.sockets()?.qtest;
        writeln!(qtest.get_mut(), "{command}")?;
        let line = read_line(qtest)?;
        match line.strip_prefix("OK") {
            Some(value) => Ok(value.trim().to_owned()),
            None => Err(ProbeError::Other(format!("qtest {command}: '{line}'"))),
        }
    }

    /// Runs a qtest command whose answer is a number.
    pub fn qtest_number(&mut self, command: &str) -> Res<u64> {
        let value = self.qtest(command)?;
        u64::from_str_radix(value.trim_start_matches("0x"), 16)
            .map_err(|e| ProbeError::Other(format!("qtest {command}: '{value}': {e}")))
    }

    /// The lines that QEMU has written to stderr.
    pub fn lines(&self) -> Vec<String> {
        self.output.lines()
    }

    /// Waits until our reader thread has a line that contains `text`, which QEMU has written
    /// already.
    pub fn written_line(&self, text: &str) -> Option<String> {
        // `Output::wait_until` holds the lock of the lines, so this loop polls instead.
        let end = Instant::now() + READER_LAG;
        loop {
            let found = self.lines().into_iter().find(|line| line.contains(text));
            if found.is_some() || Instant::now() > end {
                return found;
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Whether QEMU has ended.
    pub fn is_gone(&self) -> bool {
        self.output.wait_closed(Duration::ZERO)
    }

    /// How QEMU ended, if it did. To be called after a connection broke.
    pub fn end_after_break(&mut self) -> Option<&End> {
        // A connection breaks shortly before the process ends.
        if self.end.is_none() && self.output.wait_closed(HANG) {
            self.reap();
        }
        self.end.as_ref()
    }

    fn reap(&mut self) {
        let hung = self.watchdog.take().is_some_and(Watchdog::finish);
        let Ok(status) = self.child.wait() else { return };
        let signal = status.signal().and_then(|number| Signal::try_from(number).ok());
        self.end = Some(match signal {
            _ if hung => End::Hung,
            Some(signal) => End::Signal(signal),
            None => End::Code(status.code().unwrap_or(-1)),
        });
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        if self.end.is_none() {
            // Fails if QEMU has ended already; that is no error.
            let _ = self.child.kill();
            self.reap();
        }
    }
}

fn read_line(stream: &mut BufReader<UnixStream>) -> io::Result<String> {
    let mut line = String::new();
    match stream.read_line(&mut line)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(line.trim_end().to_owned()),
    }
}
