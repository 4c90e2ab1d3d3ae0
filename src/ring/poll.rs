// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: the ring's thread polls the ring for a short time before it sleeps. Knows no ring.
//!
//! A wakeup takes 5 to 40 microseconds, and the driver has to kick; a driver whose request was just
//! completed often sends the next request sooner. So the ring's thread polls, as QEMU's IOThreads
//! do: often while polls have found requests, seldom after polls that found none. If the guest's
//! driver needs the same processor, polls find none. The number of threads that poll at the same
//! time is limited: a thread that never sleeps delays the other threads of its processor.

use std::hint::spin_loop;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, yield_now};
use std::time::{Duration, Instant};

/// Duration of one poll, at most. QEMU's IOThreads poll as long (`poll-max-ns` of 32768).
const POLL: Duration = Duration::from_micros(32);

/// Number of sleeps between two polls, at most.
const MOST_SLEEPS: u32 = 1024;

/// Number of successive hits after which the thread yields the processor: the scheduler gives a
/// thread that never sleeps a time slice of several milliseconds.
const YIELD_EVERY: u32 = 8;

/// Decides whether the next poll is due. A hit is a poll that found a request, a miss one that did
/// not.
#[derive(Clone, Copy, Default)]
pub(crate) struct Poll {
    /// Number of sleeps before the next poll after a miss.
    after_miss: u32,
    /// Number of those sleeps that have not happened yet.
    sleeps_left: u32,
    /// Number of successive hits.
    hits: u32,
}

impl Poll {
    /// Whether to poll before the next sleep.
    pub(crate) fn is_due(self) -> bool {
        self.sleeps_left == 0
    }

    /// Records that the thread is about to sleep until a kick comes.
    pub(crate) fn sleeps(&mut self) {
        self.sleeps_left = self.sleeps_left.saturating_sub(1);
    }

    /// Records a poll; `hit`: it found a request.
    pub(crate) fn tried(&mut self, hit: bool) {
        if hit {
            self.hits = self.hits.wrapping_add(1);
            self.after_miss /= 2;
        } else {
            self.hits = 0;
            self.after_miss = (self.after_miss * 2).clamp(1, MOST_SLEEPS);
            self.sleeps_left = self.after_miss + 1; // This number includes the sleep that follows.
        }
    }
}

/// Limits the number of threads that poll at the same time.
pub(crate) struct Turns {
    most: usize,
    taken: AtomicUsize,
}

/// The limit of the process: half of the number of processors, at least 1.
pub(crate) static TURNS: LazyLock<Turns> =
    LazyLock::new(|| Turns::new(available_parallelism().map_or(1, usize::from) / 2));

struct Turn<'t>(&'t Turns);

impl Turns {
    fn new(most: usize) -> Self {
        Self { most: most.max(1), taken: AtomicUsize::new(0) }
    }

    fn take(&self) -> Option<Turn<'_>> {
        let turn = Turn(self);
        (self.taken.fetch_add(1, Ordering::Relaxed) < self.most).then_some(turn)
    }

    /// Calls `look` until it returns true or none, or [`POLL`] is over. Returns whether it returned
    /// true; none, without a call, if too many threads poll already.
    pub(crate) fn until(&self, poll: Poll, mut look: impl FnMut() -> Option<bool>) -> Option<bool> {
        let _turn = self.take()?;
        let began = Instant::now();
        if poll.hits % YIELD_EVERY == YIELD_EVERY - 1 {
            yield_now();
            if began.elapsed() >= POLL {
                return Some(false); // The processor is busy: a thread that sleeps gets it sooner.
            }
        }
        loop {
            match look() {
                Some(false) if began.elapsed() < POLL => spin_loop(),
                found => return Some(found == Some(true)),
            }
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Number of polls in `turns` turns, each of which ends with a sleep if its poll is a miss.
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

    /// Shows: while all polls are misses they become less frequent, down to one in 1024 sleeps;
    /// while all are hits every turn polls.
    #[test]
    fn misses_make_polls_less_frequent() {
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
        assert!(poll.is_due(), "after hits, one sleep follows a miss");
    }

    /// Shows: a poll ends when `look` finds a request, when it returns none, and after its time
    /// limit.
    #[test]
    fn a_poll_ends() {
        let turns = Turns::new(0);
        let mut looks = 0;
        let found = turns.until(Poll::default(), || {
            looks += 1;
            Some(looks == 2)
        });
        assert_eq!(found, Some(true));
        assert_eq!(turns.until(Poll::default(), || None), Some(false));
        assert_eq!(turns.until(Poll::default(), || Some(false)), Some(false));
    }

    /// Shows: the number of threads that poll at the same time is limited.
    #[test]
    fn the_number_of_polling_threads_is_limited() {
        let turns = Turns::new(2);
        let third = || turns.until(Poll::default(), || Some(true));
        let second = || turns.until(Poll::default(), || third().is_none().then_some(true));
        assert_eq!(turns.until(Poll::default(), second), Some(true));
        assert_eq!(third(), Some(true), "the turns were returned");
    }
}
