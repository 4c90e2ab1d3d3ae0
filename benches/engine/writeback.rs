// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 1: the cost of a dirty entry in `Engine::writeback`, for different numbers of entries.

use std::time::Instant;

use vhost_user_dax::dax::entry::Order;

use super::doubles::{Loaded, flushed_by_this_thread};
use super::measure::{Effort, Samples, nanos};
use super::prefix_walk;
use super::report::{Table, Verdicts, chart, headline, short};

/// Largest allowed ratio between the costs at two sizes.
const MOST_RATIO: f64 = 1.5;

const SIZES: [u64; 5] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000];

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    headline(1, "Writeback: cost per dirty entry, all entries under a write grant, flush a no-op");
    costs("PTE", Order::Pte, &SIZES, effort, verdicts);
    costs("PMD", Order::Pmd, effort.pick(&SIZES, &SIZES[..4]), effort, verdicts);
    prefix_walk::bench(effort);
}

struct Side {
    entries: u64,
    /// Number of writebacks per sample: small sizes need many for a measurable time.
    repeat: u64,
    loaded: Loaded,
    build_nanos: f64,
    steps_per_entry: f64,
}

impl Side {
    fn new(entries: u64, order: Order, effort: Effort) -> Self {
        let repeat = (effort.pick(2_000_000, 200_000) / entries).max(1);
        let began = Instant::now();
        let loaded = Loaded::dirty(entries, order);
        let build_nanos = began.elapsed().as_nanos() as f64;
        Self { entries, repeat, loaded, build_nanos, steps_per_entry: 0.0 }
    }

    fn per_entry(&self, all: f64) -> f64 {
        all / (self.entries * self.repeat) as f64
    }

    fn sample(&mut self) -> f64 {
        let (flushed, steps) = (flushed_by_this_thread(), self.loaded.steps());
        let time = nanos(|| (0..self.repeat).for_each(|_| self.loaded.writeback()));
        let flushed = flushed_by_this_thread() - flushed;
        assert_eq!(
            flushed,
            self.entries * self.repeat,
            "an entry was not flushed, or was flushed twice"
        );
        self.steps_per_entry = self.per_entry((self.loaded.steps() - steps) as f64);
        self.per_entry(time)
    }
}

fn costs(name: &str, order: Order, sizes: &[u64], effort: Effort, verdicts: &mut Verdicts) {
    let mut sides: Vec<_> = sizes.iter().map(|&size| Side::new(size, order, effort)).collect();
    let samples = Samples::interleaved(effort.pick(5, 1), sides.len(), |side| sides[side].sample());
    let mut table = Table::new(&["entries", "grant ns", "writeback ns", "to the first", "steps"]);
    let mut bars = Vec::new();
    for (at, side) in sides.iter().enumerate() {
        table.row(&[
            &format!("{} {name}", side.entries),
            &short(side.build_nanos / side.entries as f64),
            &short(samples.median(at)),
            &short(samples.ratio(at, 0)),
            &short(side.steps_per_entry),
        ]);
        bars.push((format!("{} {name}", side.entries), side.steps_per_entry));
    }
    table.print();
    chart("nodes of the index visited per entry", &bars);
    let steps = || sides.iter().map(|side| side.steps_per_entry);
    let ratio = steps().fold(0.0, f64::max) / steps().fold(f64::MAX, f64::min);
    let (least, most) = (sizes[0], sizes[sizes.len() - 1]);
    verdicts.must(
        ratio <= MOST_RATIO,
        format!(
            "1. steps per dirty {name}, {least} to {most}: within {} of each other \
             (at most {MOST_RATIO})",
            short(ratio)
        ),
    );
    let time = samples.ratio(sides.len() - 1, 0);
    verdicts.aim(
        time <= MOST_RATIO,
        format!("1. time per dirty {name}, {most} to {least}: {} (aim {MOST_RATIO})", short(time)),
    );
}
