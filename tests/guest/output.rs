// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Collects the output lines of a process, and notices the end of its output.

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    lines: Vec<String>,
    closed: bool,
}

/// The output of one process. Clones share it.
#[derive(Clone, Default)]
pub struct Output {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Output {
    /// Starts a thread that reads `source` to its end and then calls `on_end`.
    pub fn collect(
        source: impl Read + Send + 'static,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Self {
        let output = Self::default();
        let writer = output.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(source).split(b'\n') {
                let Ok(line) = line else { break };
                let line = String::from_utf8_lossy(&line).into_owned();
                writer.change(|state| state.lines.push(line));
            }
            writer.change(|state| state.closed = true);
            on_end();
        });
        output
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let (state, changed) = &*self.shared;
        change(&mut state.lock().unwrap());
        changed.notify_all();
    }

    pub fn lines(&self) -> Vec<String> {
        self.shared.0.lock().unwrap().lines.clone()
    }

    /// Waits until the process has closed its output, that is, until it has ended.
    pub fn wait_closed(&self, limit: Duration) -> bool {
        let (state, changed) = &*self.shared;
        let state = state.lock().unwrap();
        let (state, _) = changed.wait_timeout_while(state, limit, |state| !state.closed).unwrap();
        state.closed
    }

    /// Waits until the process has written a line that contains `words`.
    pub fn wait_line(&self, limit: Duration, words: &str) -> bool {
        let has = |state: &State| state.lines.iter().any(|line| line.contains(words));
        let (state, changed) = &*self.shared;
        let state = state.lock().unwrap();
        let wait = |state: &mut State| !state.closed && !has(state);
        let (state, _) = changed.wait_timeout_while(state, limit, wait).unwrap();
        has(&state)
    }

    /// Waits until `done` returns true. `done` is called at each new line and every 5 ms, because
    /// it may depend on events without a line. It must not call methods of `Output`: the lock is
    /// held.
    pub fn wait_until(&self, limit: Duration, mut done: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + limit;
        let (state, changed) = &*self.shared;
        let mut state = state.lock().unwrap();
        loop {
            if done() {
                return true;
            }
            if state.closed || Instant::now() > end {
                return false;
            }
            (state, _) = changed.wait_timeout(state, Duration::from_millis(5)).unwrap();
        }
    }
}
