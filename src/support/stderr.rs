// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside all steps: the log on stderr. A guest can't fill the log, and a slow reader of stderr
//! delays no request.
//!
//! Each log statement (of this crate or of a library) may log `BURST` lines at once and one line
//! per second from then on. Further lines are held back and counted; the count is logged with the
//! next line of that statement, or one second later. The levels `debug` and `trace` have no limit.
//! After `detach` the thread `stderr` writes the lines. They wait in a queue of `QUEUE_LINES`
//! lines; lines that find the queue full are lost and counted, and that count is logged.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::thread::Builder;
use std::time::{Duration, Instant};

use env_logger::Logger;
use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, poll};

use crate::support::lock::{Condvar, Mutex, MutexGuard, Rank, lock};
use crate::support::log_limit::HeldBack;

/// Number of lines that one log statement may log at once.
const BURST: u64 = 20;

/// Time after which a log statement may log one more line.
const REFILL: Duration = Duration::from_secs(1);

/// Limit on the number of lines in the queue.
const QUEUE_LINES: usize = 1024;

/// Limit on the time for which the process waits for stderr before it ends.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// A log statement: file and line.
type Site = (&'static str, u32);

/// The rate limit of one log statement.
struct Limit {
    left: u64,
    since: Instant,
    held_back: u64,
    level: Level,
    last: String,
}

impl Limit {
    fn new(now: Instant, level: Level) -> Self {
        Self { left: BURST, since: now, held_back: 0, level, last: String::new() }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since).as_secs() / REFILL.as_secs();
        if passed > 0 {
            self.left = (self.left + passed).min(BURST);
            self.since = now;
        }
    }

    /// The line with the number of lines held back before it; None if this line is held back.
    fn admit(&mut self, now: Instant, text: String) -> Option<String> {
        self.refill(now);
        if self.left == 0 {
            self.held_back += 1;
            self.last = text;
            return None;
        }
        self.left -= 1;
        let held_back = HeldBack(std::mem::take(&mut self.held_back));
        Some(format_line(self.level, &format!("{text}{held_back}")))
    }

    /// The line that reports the number of lines held back, if that is due. `last`: the process
    /// ends.
    fn settle(&mut self, now: Instant, last: bool) -> Option<String> {
        self.refill(now);
        if self.held_back == 0 || (self.left == 0 && !last) {
            return None;
        }
        self.left = self.left.saturating_sub(1);
        let (n, text) = (std::mem::take(&mut self.held_back), std::mem::take(&mut self.last));
        Some(format_line(
            self.level,
            &format!("{n} more lines like this one were held back: {text}"),
        ))
    }
}

fn format_line(level: Level, text: &str) -> String {
    format!("vhost-user-dax: {}: {text}", level.as_str().to_ascii_lowercase())
}

#[derive(Default)]
struct State {
    limits: HashMap<Site, Limit>,
    /// Lines that the stderr thread has to write.
    waiting: VecDeque<String>,
    /// Number of lines for which the queue had no room.
    lost: u64,
    /// The thread `stderr` has been started.
    detached: bool,
    /// The thread `stderr` is in write(2).
    busy: bool,
}

impl State {
    fn push(&mut self, line: String) {
        if self.waiting.len() < QUEUE_LINES {
            self.waiting.push_back(line);
        } else {
            self.lost += 1;
        }
    }

    /// Queues the lines that report the numbers of lines held back.
    fn settle(&mut self, now: Instant, last: bool) {
        let limits = self.limits.values_mut();
        let lines: Vec<_> = limits.filter_map(|limit| limit.settle(now, last)).collect();
        lines.into_iter().for_each(|line| self.push(line));
    }

    fn holds_back(&self) -> bool {
        self.limits.values().any(|limit| limit.held_back > 0)
    }

    /// Writes waiting lines without the stderr thread, and waits at most `patience` for stderr to
    /// become writable. Further lines wait for the next call, or for the thread.
    fn write_what_can_be(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.lost > 0 || !self.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let stderr = io::stderr();
            let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
            // poll(2) reports a closed stderr as ready, too. A line is shorter than PIPE_BUF.
            if !poll(&mut ready, left as u16).is_ok_and(|ready| ready > 0) {
                return;
            }
            self.next().iter().for_each(|line| write_line(line));
        }
    }

    fn next(&mut self) -> Option<String> {
        if let Some(line) = self.waiting.pop_front() {
            return Some(line);
        }
        match std::mem::take(&mut self.lost) {
            0 => None,
            n => Some(format_line(
                Level::Warn,
                &format!("{n} lines were lost: stderr is read too slowly"),
            )),
        }
    }
}

struct Stderr {
    filter: Logger,
    state: Mutex<State>,
    /// Notified when a line was queued, when the first line was held back, and when the queue is
    /// empty.
    changed: Condvar,
}

static STDERR: OnceLock<Stderr> = OnceLock::new();

impl Stderr {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn write(&self, mut state: MutexGuard<'_, State>, line: String) {
        state.push(line);
        if state.detached {
            drop(state);
            self.changed.notify_all();
        } else {
            state.write_what_can_be(Duration::ZERO);
        }
    }

    /// The body of the stderr thread.
    fn run(&self) {
        let mut state = self.lock();
        loop {
            if let Some(line) = state.next() {
                state.busy = true;
                drop(state);
                write_line(&line);
                state = self.lock();
                state.busy = false;
                continue;
            }
            self.changed.notify_all();
            if state.holds_back() {
                (state, _) = self.changed.wait_timeout(state, REFILL);
                state.settle(Instant::now(), false);
            } else {
                state = self.changed.wait(state);
            }
        }
    }
}

/// Writes the line by one system call. An error is ignored: there is no other place to report it.
fn write_line(line: &str) {
    let _ = io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.filter.matches(record) {
            return;
        }
        let text = record.args().to_string();
        let mut state = self.lock();
        if record.level() > Level::Info {
            return self.write(state, format_line(record.level(), &text));
        }
        let site = (record.file_static().unwrap_or_default(), record.line().unwrap_or_default());
        let now = Instant::now();
        let limit = state.limits.entry(site).or_insert_with(|| Limit::new(now, record.level()));
        match limit.admit(now, text) {
            Some(line) => self.write(state, line),
            // Wakes the stderr thread: it logs the count one second later.
            None if limit.held_back == 1 => self.changed.notify_all(),
            None => {}
        }
    }

    /// Waits until the queue is empty, at most `LAST_WAIT`.
    fn flush(&self) {
        let mut state = self.lock();
        state.settle(Instant::now(), true);
        if !state.detached {
            return state.write_what_can_be(LAST_WAIT);
        }
        self.changed.notify_all();
        let until = Instant::now() + LAST_WAIT;
        while state.busy || state.lost > 0 || !state.waiting.is_empty() {
            let Some(left) = until.checked_duration_since(Instant::now()) else { return };
            (state, _) = self.changed.wait_timeout(state, left);
        }
    }
}

/// Starts logging to stderr at `level`; RUST_LOG overrides it. Lines have no time stamp: systemd
/// and libvirt add their own.
pub fn init(level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    // The crate virtio-queue logs each malformed chain; the device logs them itself, by a limit.
    builder.filter_module("virtio_queue", LevelFilter::Off);
    // virtiofsd logs a hard limit on open files that is lower than its request: the common case.
    builder.filter_module("virtiofsd::limits", LevelFilter::Off);
    if std::env::var_os("RUST_LOG").is_some() {
        builder.parse_default_env();
    }
    let filter = builder.build();
    let most = filter.filter();
    let stderr = STDERR.get_or_init(|| Stderr {
        filter,
        state: Mutex::ranked(Rank::Log, State::default()),
        changed: Condvar::new(),
    });
    if log::set_logger(stderr).is_ok() {
        log::set_max_level(most);
    }
}

/// Drops the waiting lines: called in a child process, whose parent writes them.
pub(crate) fn forget_waiting() {
    if let Some(stderr) = STDERR.get() {
        stderr.lock().waiting.clear();
    }
}

/// Starts the stderr thread. Until then a line that stderr does not take at once waits in the queue.
///
/// # Errors
/// The error of clone(2) if the thread can't be started.
pub(crate) fn detach() -> io::Result<()> {
    let Some(stderr) = STDERR.get() else { return Ok(()) };
    let mut state = stderr.lock();
    if !state.detached {
        Builder::new().name("stderr".into()).spawn(|| stderr.run())?;
        state.detached = true;
    }
    Ok(())
}

/// Logs why the process ends, after all earlier lines. Waits at most `LAST_WAIT` for stderr, unless
/// the stderr thread can't be started.
pub fn last_words(text: &str) {
    let line = format!("vhost-user-dax: {text}");
    match STDERR.get() {
        Some(stderr) => {
            // If the thread can't be started, the calling thread writes the line itself.
            let _ = detach();
            stderr.write(stderr.lock(), line);
            stderr.flush();
        }
        None => write_line(&line),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(start: Instant) -> Limit {
        Limit::new(start, Level::Warn)
    }

    /// Shows: of a flood of lines the first `BURST` are logged, then one line per second with the
    /// number of lines held back.
    #[test]
    fn a_flood_is_counted() {
        let start = Instant::now();
        let mut limit = limit(start);
        let mut lines = Vec::new();
        for ms in 0..5000 {
            let now = start + Duration::from_millis(ms);
            lines.extend(limit.admit(now, format!("line {ms}")));
        }
        assert_eq!(lines.len() as u64, BURST + 4);
        assert_eq!(lines[0], "vhost-user-dax: warn: line 0");
        assert!(lines[20].ends_with("line 1000 (980 more such lines held back)"), "{}", lines[20]);
    }

    /// Shows: the number of lines held back is logged after `REFILL` although no other line comes,
    /// and at the end of the process in any case.
    #[test]
    fn held_back_lines_are_reported() {
        let start = Instant::now();
        let mut limit = limit(start);
        (0..100).for_each(|i| drop(limit.admit(start, format!("line {i}"))));
        assert_eq!(limit.settle(start, false), None);
        let line = "vhost-user-dax: warn: 80 more lines like this one were held back: line 99";
        assert_eq!(limit.settle(start + REFILL, false).as_deref(), Some(line));
        assert_eq!(limit.settle(start + REFILL, true), None);
        (0..3).for_each(|i| drop(limit.admit(start + REFILL, format!("line {i}"))));
        assert!(limit.settle(start + REFILL, true).is_some());
    }

    /// Shows: the queue of lines is bounded, and lines that find it full are counted.
    #[test]
    fn the_queue_is_bounded() {
        let mut state = State::default();
        (0..QUEUE_LINES + 7).for_each(|i| state.push(i.to_string()));
        let lines: Vec<_> = std::iter::from_fn(|| state.next()).collect();
        assert_eq!(lines.len(), QUEUE_LINES + 1);
        assert!(lines[QUEUE_LINES].contains("7 lines were lost"), "{}", lines[QUEUE_LINES]);
    }
}
