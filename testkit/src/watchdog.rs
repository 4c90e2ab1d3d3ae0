// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shuts down a connection whose peer does not reply in time. (vhost's `Frontend` has no time
//! limit, and repeats the read after a receive timeout.)

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

#[derive(Default)]
struct State {
    until: Option<Instant>,
    fired: bool,
    quit: bool,
}

/// One thread that watches one connection.
pub struct Watchdog {
    shared: Arc<(Mutex<State>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches `connection`.
    pub fn new(connection: UnixStream) -> Self {
        let shared = Arc::new((Mutex::new(State::default()), Condvar::new()));
        let theirs = shared.clone();
        let thread = thread::spawn(move || watch(&theirs, &connection));
        Self { shared, thread: Some(thread) }
    }

    /// Runs `call`; `None` if it lasted longer than `limit`, and the connection was shut down.
    pub fn guard<T>(&self, limit: Duration, call: impl FnOnce() -> T) -> Option<T> {
        let (state, changed) = &*self.shared;
        state.lock().unwrap().until = Some(Instant::now() + limit);
        changed.notify_one();
        let result = call();
        let mut state = state.lock().unwrap();
        state.until = None;
        (!state.fired).then_some(result)
    }
}

fn watch(shared: &(Mutex<State>, Condvar), connection: &UnixStream) {
    let (state, changed) = shared;
    let mut state = state.lock().unwrap();
    while !state.quit {
        let Some(until) = state.until else {
            state = changed.wait(state).unwrap();
            continue;
        };
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            state.until = None;
            state.fired = true;
            let _ = connection.shutdown(Shutdown::Both);
        } else {
            state = changed.wait_timeout(state, left).unwrap().0;
        }
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let (state, changed) = &*self.shared;
        state.lock().unwrap().quit = true;
        changed.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
