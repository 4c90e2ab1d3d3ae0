// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Limits a log statement that a guest can trigger to one line per second.

use std::fmt;
use std::time::{Duration, Instant};

use crate::support::lock::{Mutex, Rank, lock};

/// Time between two lines of one log statement, at least.
const INTERVAL: Duration = Duration::from_secs(1);

/// Allows one line per second and counts the lines held back.
pub(crate) struct RateLimit {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl Default for RateLimit {
    fn default() -> Self {
        Self { state: Mutex::ranked(Rank::Log, State::default()) }
    }
}

/// Number of lines held back since the last line; displayed as the end of a line, empty for 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeldBack(pub(crate) u64);

impl fmt::Display for HeldBack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => Ok(()),
            n => write!(f, " ({n} more such lines held back)"),
        }
    }
}

impl RateLimit {
    /// The number of lines held back since the last line; `None` if this line is held back, too.
    pub(crate) fn admit(&self, now: Instant) -> Option<HeldBack> {
        self.allow(now).map(HeldBack)
    }

    /// As [`admit`](Self::admit), as a plain number.
    fn allow(&self, now: Instant) -> Option<u64> {
        let mut state = lock(&self.state);
        if state.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            state.suppressed += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: one line per second is logged, with the number of lines held back before it.
    #[test]
    fn one_line_a_second_and_the_rest_is_counted() {
        let limit = RateLimit::default();
        let start = Instant::now();
        assert_eq!(limit.allow(start), Some(0));
        for _ in 0..1000 {
            assert_eq!(limit.allow(start + Duration::from_millis(999)), None);
        }
        assert_eq!(limit.allow(start + Duration::from_secs(1)), Some(1000));
        assert_eq!(limit.allow(start + Duration::from_secs(3)), Some(0));
    }

    /// Shows: a line reports held-back lines only if their number is above 0.
    #[test]
    fn zero_held_back_lines_are_not_reported() {
        let limit = RateLimit::default();
        let start = Instant::now();
        let line = |at| limit.admit(start + at).map(|held_back| format!("line{held_back}"));
        assert_eq!(line(Duration::ZERO).as_deref(), Some("line"));
        assert_eq!(line(INTERVAL / 2), None);
        assert_eq!(line(INTERVAL).as_deref(), Some("line (1 more such lines held back)"));
    }
}
