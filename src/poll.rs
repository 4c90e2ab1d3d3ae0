// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: looks for the next request for a moment before it sleeps. Knows no ring.
//!
//! To be woken costs 5 to 40 microseconds, and the driver has to kick; a driver that has just been answered
//! often asks again sooner. So the ring's thread looks whether it does, as QEMU's own do: for as long as
//! it was worth it the last times. On a processor that the driver needs for itself it never is.

use std::time::{Duration, Instant};

/// As long as QEMU's IOThreads poll at most.
const POLL: Duration = Duration::from_micros(32);

/// How often one may sleep at most before it is tried again.
const MOST_SLEEPS: u32 = 1024;

/// Whether to poll.
#[derive(Clone, Copy, Default)]
pub(crate) struct Poll {
    /// After a miss, sleep so often before the next try.
    after_miss: u32,
    /// So many of them are left.
    sleeps_left: u32,
}

impl Poll {
    /// It is worth a try.
    pub(crate) fn is_due(self) -> bool {
        self.sleeps_left == 0
    }

    /// Sleeps, until a kick comes.
    pub(crate) fn sleeps(&mut self) {
        self.sleeps_left = self.sleeps_left.saturating_sub(1);
    }

    /// It was tried: whether a request came.
    pub(crate) fn tried(&mut self, hit: bool) {
        if hit {
            self.after_miss /= 2;
        } else {
            self.after_miss = (self.after_miss * 2).clamp(1, MOST_SLEEPS);
            self.sleeps_left = self.after_miss + 1; // The sleep that follows is the first.
        }
    }
}

/// Looks until `look` says true or none, or it has taken long enough. Whether it said true.
pub(crate) fn until(mut look: impl FnMut() -> Option<bool>) -> bool {
    let began = Instant::now();
    loop {
        match look() {
            Some(false) if began.elapsed() < POLL => std::hint::spin_loop(),
            found => return found == Some(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How often it polls in so many turns, each of which ends with a sleep if it does not hit.
    fn polls(poll: &mut Poll, turns: u32, hits: bool) -> u32 {
        let mut polls = 0;
        for _ in 0..turns {
            if poll.is_due() {
                polls += 1;
                poll.tried(hits);
            }
            if !hits || polls == 0 {
                poll.sleeps();
            }
        }
        polls
    }

    /// Shows: where polling is in vain it is tried less and less, down to once in a thousand sleeps, and a hit
    /// brings it back.
    #[test]
    fn it_is_tried_where_it_pays() {
        let mut poll = Poll::default();
        assert_eq!(polls(&mut poll, 100, true), 100);
        let in_vain = polls(&mut poll, 100, false);
        assert!((5..=7).contains(&in_vain), "{in_vain}");
        polls(&mut poll, 10_000, false);
        assert_eq!(polls(&mut poll, 10 * MOST_SLEEPS, false), 10);
        while !poll.is_due() {
            poll.sleeps();
        }
        (0..11).for_each(|_| poll.tried(true));
        poll.tried(false);
        poll.sleeps();
        assert!(!poll.is_due());
        poll.sleeps();
        assert!(poll.is_due(), "one sleep after the miss, as at first");
    }

    /// Shows: it ends when something is there, when nothing can come, and when it has lasted too long.
    #[test]
    fn it_ends() {
        let mut looks = 0;
        assert!(until(|| {
            looks += 1;
            Some(looks == 2)
        }));
        assert!(!until(|| None));
        assert!(!until(|| Some(false)));
    }
}
