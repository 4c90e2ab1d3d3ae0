// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 3: the index in a mutex against a BTreeMap in a mutex, with 1, 2 and 4 threads.

use std::hint::black_box;
use std::sync::{Barrier, Mutex, MutexGuard};
use std::thread;
use std::time::Instant;

use vhost_user_dax::dax::entry::{Block, Entry, Order, PageIndex};
use vhost_user_dax::dax::index::{Index, Mark};

use super::measure::{Effort, Samples};
use super::ordered_map::OrderedMap;
use super::report::{Table, Verdicts, chart, headline, short};

const AIM: f64 = 3.0;
const THREADS: [u64; 3] = [1, 2, 4];
/// Number of entries that a marked walk takes in one critical section, as in `Engine::writeback`.
const BATCH: usize = 64;
/// After the inserts, one of this number of entries stays dirty, for the marked walk.
const DIRTY_EVERY: u64 = 16;
/// Odd, so that its multiples modulo a power of two visit every number once, in scattered order.
const SCATTER: u64 = 0x9e37_79b9_7f4a_7c15;

/// The operations that are compared.
trait Store: Default + Send {
    fn insert_dirty(&mut self, page: PageIndex, entry: Entry) -> bool;
    fn get(&self, page: PageIndex) -> Option<(PageIndex, Entry)>;
    fn clean(&mut self, page: PageIndex);
    fn dirty_batch(&self, first: PageIndex, last: PageIndex) -> Vec<(PageIndex, Entry)>;
}

impl Store for Index {
    fn insert_dirty(&mut self, page: PageIndex, entry: Entry) -> bool {
        self.insert(page, entry).is_ok() && self.set_mark(page, Mark::Dirty, true)
    }

    fn get(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        Index::get(self, page)
    }

    fn clean(&mut self, page: PageIndex) {
        self.set_mark(page, Mark::Dirty, false);
    }

    fn dirty_batch(&self, first: PageIndex, last: PageIndex) -> Vec<(PageIndex, Entry)> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut at = first;
        while batch.len() < BATCH
            && let Some((start, entry)) = self.next(at, last, Some(Mark::Dirty))
        {
            batch.push((start, entry));
            at = PageIndex(start.0 + entry.order().pages());
        }
        batch
    }
}

impl Store for OrderedMap {
    fn insert_dirty(&mut self, page: PageIndex, entry: Entry) -> bool {
        OrderedMap::insert_dirty(self, page, entry)
    }

    fn get(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        OrderedMap::get(self, page)
    }

    fn clean(&mut self, page: PageIndex) {
        OrderedMap::clean(self, page);
    }

    fn dirty_batch(&self, first: PageIndex, last: PageIndex) -> Vec<(PageIndex, Entry)> {
        OrderedMap::dirty_batch(self, first, last, BATCH)
    }
}

/// The order in which pages are accessed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pattern {
    /// Each thread walks a range of its own page by page, as grants and writeback do.
    InOrder,
    /// Each thread accesses pages all over the file, in scattered order.
    AtRandom,
}

/// The parameters of one comparison.
#[derive(Clone, Copy)]
struct Job {
    entries: u64,
    threads: u64,
    pattern: Pattern,
}

/// Wall-clock nanoseconds per entry.
#[derive(Clone, Copy)]
struct Times {
    insert: f64,
    lookup: f64,
    walk: f64,
}

type Phase = (&'static str, fn(&Times) -> f64);
const PHASES: [Phase; 3] =
    [("insert", |t| t.insert), ("lookup", |t| t.lookup), ("marked walk", |t| t.walk)];

fn lock<S>(store: &Mutex<S>) -> MutexGuard<'_, S> {
    store.lock().unwrap_or_else(|e| e.into_inner())
}

impl Job {
    fn page(self, thread: u64, n: u64) -> PageIndex {
        let at = thread * (self.entries / self.threads) + n;
        match self.pattern {
            Pattern::InOrder => PageIndex(at),
            // The number of entries is a power of two: the mask maps the pages one to one.
            Pattern::AtRandom => PageIndex(at.wrapping_mul(SCATTER) & (self.entries - 1)),
        }
    }

    /// Runs `work(thread, share)` in all threads at once, and measures the time.
    fn timed(self, work: impl Fn(u64, u64) + Sync) -> f64 {
        let share = self.entries / self.threads;
        let barrier = Barrier::new(self.threads as usize + 1);
        let elapsed = thread::scope(|scope| {
            let (barrier, work) = (&barrier, &work);
            for thread in 0..self.threads {
                scope.spawn(move || {
                    barrier.wait();
                    work(thread, share);
                    barrier.wait();
                });
            }
            barrier.wait();
            let began = Instant::now();
            barrier.wait();
            began.elapsed()
        });
        elapsed.as_nanos() as f64
    }

    fn run<S: Store>(self) -> Times {
        let store = Mutex::new(S::default());
        let all = self.entries as f64;
        let insert = self.timed(|thread, share| {
            for page in (0..share).map(|n| self.page(thread, n)) {
                let entry = Entry::real(Order::Pte, Block::new(page.0).unwrap());
                assert!(lock(&store).insert_dirty(page, entry));
            }
        });
        let lookup = self.timed(|thread, share| {
            for page in (0..share).map(|n| self.page(thread, n)) {
                assert!(black_box(lock(&store).get(page)).is_some());
            }
        });
        for page in (0..self.entries).filter(|page| !page.is_multiple_of(DIRTY_EVERY)) {
            lock(&store).clean(PageIndex(page));
        }
        let walk = self.timed(|thread, share| {
            let mut at = PageIndex(thread * share);
            let last = PageIndex(at.0 + share - 1);
            let mut found = 0;
            loop {
                let batch = lock(&store).dirty_batch(at, last);
                let Some((start, _)) = batch.last() else { break };
                found += batch.len() as u64;
                at = start.next();
            }
            assert_eq!(found, share / DIRTY_EVERY);
        });
        Times { insert: insert / all, lookup: lookup / all, walk: walk * DIRTY_EVERY as f64 / all }
    }
}

/// The times of the index and of the map in one round.
type Round = [Times; 2];

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    let entries: u64 = effort.pick(1 << 20, 1 << 16);
    headline(
        3,
        &format!("Index against BTreeMap + BTreeSet, each behind one mutex, {entries} PTEs"),
    );
    let mut table = Table::new(&["what", "threads", "index ns", "BTreeMap ns", "times faster"]);
    let mut bars = Vec::new();
    for (name, pattern) in [("in order", Pattern::InOrder), ("at random", Pattern::AtRandom)] {
        for threads in THREADS {
            let job = Job { entries, threads, pattern };
            let rounds: Vec<Round> = (0..effort.pick(7, 3))
                .map(|_| [job.run::<Index>(), job.run::<OrderedMap>()])
                .collect();
            for (phase, of) in PHASES {
                if phase == "marked walk" && pattern == Pattern::AtRandom {
                    continue; // A walk is always in order, whatever the order of the inserts.
                }
                let sides = Samples::of(rounds.iter().map(|round| round.each_ref().map(of)));
                let ratio = sides.ratio(1, 0);
                let label = format!("{phase} {name}");
                table.row(&[
                    &label,
                    &threads,
                    &short(sides.median(0)),
                    &short(sides.median(1)),
                    &short(ratio),
                ]);
                bars.push((format!("{label}, {threads}"), ratio));
                if threads == 4 {
                    verdicts.aim(
                        ratio >= AIM,
                        format!("3. {label}, 4 threads: {} times faster (aim {AIM})", short(ratio)),
                    );
                }
            }
        }
    }
    table.print();
    chart("times faster than the BTreeMap", &bars);
}
