// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keeps what a hostile guest can make us log to one line a second.

use crate::support::lock::lock;
use std::sync::Mutex;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// One line per second; the others are counted.
#[derive(Default)]
pub(crate) struct RateLimit {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last: Option<Instant>,
    suppressed: u64,
}

impl RateLimit {
    /// `Some(n)` if a line may be logged at `now`; `n` lines were held back since the last one.
    pub(crate) fn allow(&self, now: Instant) -> Option<u64> {
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
}
