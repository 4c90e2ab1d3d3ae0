// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside the path: what is said on stderr. A guest can't fill a log, and nobody who reads it
//! slowly, or not at all, holds a request up.
//!
//! Each place in a program, ours or a library's, may say `BURST` lines at once and one a second
//! from then on. The others are counted, and the number is said with the next line of that place,
//! or a second later. (What is asked for by `debug` and `trace` is not limited.) From `detach` on a
//! thread of its own writes: lines wait for it in a queue of `MOST_WAITING`, and what finds no room
//! there is counted and said, too.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::Builder;
use std::time::{Duration, Instant};

use env_logger::Logger;
use log::{Level, LevelFilter, Log, Metadata, Record};
use nix::poll::{PollFd, PollFlags, poll};

use crate::support::lock::lock;
use crate::support::log_limit::HeldBack;

/// So many lines of one place are said at once.
const BURST: u64 = 20;

/// And one more of them after each such time.
const REFILL: Duration = Duration::from_secs(1);

/// So many lines wait to be written.
const MOST_WAITING: usize = 1024;

/// So long the end of the process waits for stderr.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// A place in a program: file and line.
type Site = (&'static str, u32);

/// What one place may say.
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

    /// The line, with the number of those before it; None if it is one of them.
    fn admit(&mut self, now: Instant, text: String) -> Option<String> {
        self.refill(now);
        if self.left == 0 {
            self.held_back += 1;
            self.last = text;
            return None;
        }
        self.left -= 1;
        let held_back = HeldBack(std::mem::take(&mut self.held_back));
        Some(said(self.level, &format!("{text}{held_back}")))
    }

    /// What is to be said if no other line comes.
    fn settle(&mut self, now: Instant, last: bool) -> Option<String> {
        self.refill(now);
        if self.held_back == 0 || (self.left == 0 && !last) {
            return None;
        }
        self.left = self.left.saturating_sub(1);
        let (n, text) = (std::mem::take(&mut self.held_back), std::mem::take(&mut self.last));
        Some(said(self.level, &format!("{n} more lines like this one were held back: {text}")))
    }
}

fn said(level: Level, text: &str) -> String {
    format!("vhost-user-dax: {}: {text}", level.as_str().to_ascii_lowercase())
}

#[derive(Default)]
struct State {
    limits: HashMap<Site, Limit>,
    /// What the thread is to write.
    waiting: VecDeque<String>,
    /// Lines for which there was no room.
    lost: u64,
    /// There is a thread.
    detached: bool,
    /// It is writing.
    busy: bool,
}

impl State {
    fn push(&mut self, line: String) {
        if self.waiting.len() < MOST_WAITING {
            self.waiting.push_back(line);
        } else {
            self.lost += 1;
        }
    }

    /// Says how many lines were held back where nothing else is said any more.
    fn settle(&mut self, now: Instant, last: bool) {
        let limits = self.limits.values_mut();
        let lines: Vec<_> = limits.filter_map(|limit| limit.settle(now, last)).collect();
        lines.into_iter().for_each(|line| self.push(line));
    }

    fn holds_back(&self) -> bool {
        self.limits.values().any(|limit| limit.held_back > 0)
    }

    /// Without a thread: writes as long as somebody reads, or there is room for it, and waits so
    /// long for that. What is left waits for the next line, or the thread.
    fn write_what_can_be(&mut self, patience: Duration) {
        let deadline = Instant::now() + patience;
        while self.lost > 0 || !self.waiting.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now()).as_millis();
            let stderr = io::stderr();
            let mut ready = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
            // What is closed is ready, too. A line is shorter than what a pipe takes at once.
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
            n => {
                Some(said(Level::Warn, &format!("{n} lines were lost: stderr is read too slowly")))
            }
        }
    }
}

struct Stderr {
    filter: Logger,
    state: Mutex<State>,
    /// There is something to write, or all is written.
    changed: Condvar,
}

static STDERR: OnceLock<Stderr> = OnceLock::new();

impl Stderr {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn say(&self, mut state: MutexGuard<'_, State>, line: String) {
        state.push(line);
        if state.detached {
            drop(state);
            self.changed.notify_all();
        } else {
            state.write_what_can_be(Duration::ZERO);
        }
    }

    /// The thread.
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
                let waited = self.changed.wait_timeout(state, REFILL);
                state = waited.unwrap_or_else(|e| e.into_inner()).0;
                state.settle(Instant::now(), false);
            } else {
                state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
            }
        }
    }
}

/// Each line in one system call; who closed stderr is not to be told so.
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
            return self.say(state, said(record.level(), &text));
        }
        let site = (record.file_static().unwrap_or_default(), record.line().unwrap_or_default());
        let now = Instant::now();
        let limit = state.limits.entry(site).or_insert_with(|| Limit::new(now, record.level()));
        match limit.admit(now, text) {
            Some(line) => self.say(state, line),
            // The thread learns that there is something to settle.
            None if limit.held_back == 1 => self.changed.notify_all(),
            None => {}
        }
    }

    /// Waits until all is written, but no longer than a second.
    fn flush(&self) {
        let mut state = self.lock();
        state.settle(Instant::now(), true);
        if !state.detached {
            return state.write_what_can_be(LAST_WAIT);
        }
        self.changed.notify_all();
        let left = |state: &mut State| state.busy || state.lost > 0 || !state.waiting.is_empty();
        drop(self.changed.wait_timeout_while(state, LAST_WAIT, left));
    }
}

/// Begins to log to stderr, from `level` on and as RUST_LOG says. Lines go there without a time:
/// systemd and libvirt add their own.
pub fn init(level: LevelFilter) {
    let mut builder = env_logger::Builder::new();
    builder.filter_level(level);
    // The queue's crate logs each bad chain; ours are counted and held to a bounded rate.
    builder.filter_module("virtio_queue", LevelFilter::Off);
    // A hard limit of open files below virtiofsd's wish is the usual case, and no news.
    builder.filter_module("virtiofsd::limits", LevelFilter::Off);
    if std::env::var_os("RUST_LOG").is_some() {
        builder.parse_default_env();
    }
    let filter = builder.build();
    let most = filter.filter();
    let stderr =
        STDERR.get_or_init(|| Stderr { filter, state: Mutex::default(), changed: Condvar::new() });
    if log::set_logger(stderr).is_ok() {
        log::set_max_level(most);
    }
}

/// A child process writes what waits.
pub(crate) fn forget_waiting() {
    if let Some(stderr) = STDERR.get() {
        stderr.lock().waiting.clear();
    }
}

/// From here on a thread writes. Before it, what stderr does not take at once waits.
///
/// # Errors
/// The system's: no thread can be started.
pub(crate) fn detach() -> io::Result<()> {
    let Some(stderr) = STDERR.get() else { return Ok(()) };
    let mut state = stderr.lock();
    if !state.detached {
        Builder::new().name("stderr".into()).spawn(|| stderr.run())?;
        state.detached = true;
    }
    Ok(())
}

/// Says why the process ends, behind all that was said before. Waits 1 second at most for stderr,
/// unless the system refuses a thread.
pub fn last_words(text: &str) {
    let line = format!("vhost-user-dax: {text}");
    match STDERR.get() {
        Some(stderr) => {
            // After an error this thread writes.
            let _ = detach();
            stderr.say(stderr.lock(), line);
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

    /// Shows: of a flood the first lines are said, then one a second, which says how many were not.
    #[test]
    fn a_flood_is_counted() {
        let start = Instant::now();
        let mut limit = limit(start);
        let mut said = Vec::new();
        for ms in 0..5000 {
            let now = start + Duration::from_millis(ms);
            said.extend(limit.admit(now, format!("line {ms}")));
        }
        assert_eq!(said.len() as u64, BURST + 4);
        assert_eq!(said[0], "vhost-user-dax: warn: line 0");
        assert!(said[20].ends_with("line 1000 (980 more such lines held back)"), "{}", said[20]);
    }

    /// Shows: what was held back is said once it may be, also if nothing else comes, and at the end
    /// in any case.
    #[test]
    fn the_rest_is_told() {
        let start = Instant::now();
        let mut limit = limit(start);
        (0..100).for_each(|i| drop(limit.admit(start, format!("line {i}"))));
        assert_eq!(limit.settle(start, false), None);
        let said = "vhost-user-dax: warn: 80 more lines like this one were held back: line 99";
        assert_eq!(limit.settle(start + REFILL, false).as_deref(), Some(said));
        assert_eq!(limit.settle(start + REFILL, true), None);
        (0..3).for_each(|i| drop(limit.admit(start + REFILL, format!("line {i}"))));
        assert!(limit.settle(start + REFILL, true).is_some());
    }

    /// Shows: what nobody writes is bounded, and counted.
    #[test]
    fn what_waits_is_bounded() {
        let mut state = State::default();
        (0..MOST_WAITING + 7).for_each(|i| state.push(i.to_string()));
        let lines: Vec<_> = std::iter::from_fn(|| state.next()).collect();
        assert_eq!(lines.len(), MOST_WAITING + 1);
        assert!(lines[MOST_WAITING].contains("7 lines were lost"), "{}", lines[MOST_WAITING]);
    }
}
