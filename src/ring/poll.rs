// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: looks for the next request for a moment before it sleeps. Knows no ring.
//!
//! To be woken costs 5 to 40 microseconds, and the driver has to kick; a driver that has just been
//! answered often asks again sooner. So the ring's thread looks whether it does, as QEMU's own do:
//! for as long as it was worth it the last times. On a processor that the driver needs for itself
//! it never is. And only few threads do so at once: one that never sleeps would hold up the others
//! of its processor.

use std::hint::spin_loop;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, yield_now};
use std::time::{Duration, Instant};

/// As long as QEMU's IOThreads poll at most.
const POLL: Duration = Duration::from_micros(32);

/// How often one may sleep at most before it is tried again.
const MOST_SLEEPS: u32 = 1024;

/// Number of hits after which the thread yields the processor to other runnable threads: the
/// scheduler gives a thread that never sleeps a time slice of milliseconds.
const YIELD_EVERY: u32 = 8;

/// Whether to poll.
#[derive(Clone, Copy, Default)]
pub(crate) struct Poll {
    /// After a miss, sleep so often before the next try.
    after_miss: u32,
    /// Number of sleeps that are left of them.
    sleeps_left: u32,
    /// Number of hits in succession.
    hits: u32,
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
            self.hits = self.hits.wrapping_add(1);
            self.after_miss /= 2;
        } else {
            self.hits = 0;
            self.after_miss = (self.after_miss * 2).clamp(1, MOST_SLEEPS);
            self.sleeps_left = self.after_miss + 1; // The sleep that follows is the first.
        }
    }
}

/// How many threads may poll at once, and how many do.
pub(crate) struct Turns {
    most: usize,
    taken: AtomicUsize,
}

/// Those of the process: on half of the processors.
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

    /// Looks until `look` says true or none, or it has taken long enough. Whether it said true;
    /// none if too many look already.
    pub(crate) fn until(&self, poll: Poll, mut look: impl FnMut() -> Option<bool>) -> Option<bool> {
        let _turn = self.take()?;
        let began = Instant::now();
        if poll.hits % YIELD_EVERY == YIELD_EVERY - 1 {
            yield_now();
            if began.elapsed() >= POLL {
                return Some(false); // Who sleeps here is woken sooner.
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

    /// Number of polls in `turns` turns, each of which ends with a sleep if it does not hit.
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

    /// Shows: where polling is in vain it is tried less and less, down to once in a thousand
    /// sleeps, and a hit brings it back.
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

    /// Shows: it ends when something is there, when nothing can come, and when it has lasted too
    /// long.
    #[test]
    fn it_ends() {
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
    fn few_at_once() {
        let turns = Turns::new(2);
        let third = || turns.until(Poll::default(), || Some(true));
        let second = || turns.until(Poll::default(), || third().is_none().then_some(true));
        assert_eq!(turns.until(Poll::default(), second), Some(true));
        assert_eq!(third(), Some(true), "the turns were given back");
    }
}
