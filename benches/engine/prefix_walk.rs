// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 1, for comparison only: the defective walk that the engine's walk replaced. It searches
//! for each batch from the start of the range again; the engine continues after the last batch.
//!
//! Two effects are shown. First, the cost of the restart depends on the search: a search of every
//! entry costs batches times range; one that uses summaries of the marks costs one descent per
//! batch. Second, if another flusher marks entries again that were just written, the restarted walk
//! finds them again and never gets further; summaries do not help against that.

use vhost_user_dax::dax::entry::{Block, Entry, Order, PageIndex};
use vhost_user_dax::dax::index::{Index, Mark};

use super::measure::{Effort, nanos};
use super::report::{Table, chart, short};

/// The engine's batch size.
const BATCH: usize = 64;

/// How a walk finds its next batch.
#[derive(Clone, Copy)]
struct Walk {
    name: &'static str,
    /// Starts the search at the start of the range for each batch: the defect.
    restarts: bool,
    /// Uses the summaries of the marks; otherwise it looks at every entry.
    summaries: bool,
}

const WALKS: [Walk; 3] = [
    Walk { name: "goes on behind the batch", restarts: false, summaries: true },
    Walk { name: "restarts, with summaries", restarts: true, summaries: true },
    Walk { name: "restarts, every entry", restarts: true, summaries: false },
];

fn to_write(entries: u64) -> Index {
    let mut index = Index::default();
    for page in 0..entries {
        let entry = Entry::real(Order::Pte, Block::new(page).unwrap());
        index.insert(PageIndex(page), entry).unwrap();
        index.set_mark(PageIndex(page), Mark::Dirty, true);
    }
    index.tag_for_writeback(PageIndex(0), PageIndex(entries), u64::MAX);
    index
}

impl Walk {
    fn batch(self, index: &Index, first: PageIndex, last: PageIndex) -> Vec<PageIndex> {
        let mut batch = Vec::with_capacity(BATCH);
        let mut at = first;
        let mark = self.summaries.then_some(Mark::ToWrite);
        while batch.len() < BATCH
            && let Some((start, _)) = index.next(at, last, mark)
        {
            if self.summaries || index.is_marked(start, Mark::ToWrite) {
                batch.push(start);
            }
            at = start.next();
        }
        batch
    }

    /// Walks the whole range. `others` runs between batches. Stops after `most` entries, and
    /// returns the number of entries written.
    fn run(self, index: &mut Index, entries: u64, most: u64, others: impl Fn(&mut Index)) -> u64 {
        let (mut at, last) = (PageIndex(0), PageIndex(entries - 1));
        let mut written = 0;
        loop {
            let batch = self.batch(index, at, last);
            let Some(end) = batch.last() else { break };
            if !self.restarts {
                at = end.next();
            }
            for page in &batch {
                index.set_mark(*page, Mark::ToWrite, false);
                written += 1;
            }
            if written >= most {
                break;
            }
            others(index);
        }
        written
    }
}

pub fn bench(effort: Effort) {
    println!("  The walk alone, and the pre-fix one that restarts at the range's start:\n");
    let mut table = Table::new(&["PTE entries, walk", "ns per entry", "steps per entry"]);
    let mut bars = Vec::new();
    for entries in effort.pick(&[1_000, 10_000, 100_000][..], &[1_000, 10_000][..]) {
        for walk in WALKS {
            let mut index = to_write(*entries);
            let before = index.steps();
            let mut written = 0;
            let time = nanos(|| written = walk.run(&mut index, *entries, u64::MAX, |_| {}));
            assert_eq!(written, *entries);
            let steps = (index.steps() - before) as f64 / *entries as f64;
            let label = format!("{entries}, {}", walk.name);
            table.row(&[&label, &short(time / *entries as f64), &short(steps)]);
            bars.push((label, steps));
        }
    }
    table.print();
    chart("nodes of the index visited per entry", &bars);
    retagged();
}

/// A second flusher marks the first batch again after each batch of the walk.
fn retagged() {
    const ENTRIES: u64 = 10_000;
    println!(
        "  The same 10000 entries while a second flusher tags the first 64 again and again:\n"
    );
    let mut table = Table::new(&["walk", "entries written", "ends"]);
    for walk in &WALKS[..2] {
        let mut index = to_write(ENTRIES);
        let most = 10 * ENTRIES;
        let written = walk.run(&mut index, ENTRIES, most, |index| {
            index.tag_for_writeback(PageIndex(0), PageIndex(BATCH as u64 - 1), u64::MAX);
        });
        let ends = if written < most { "yes" } else { "no: stopped by the bench" };
        table.row(&[&walk.name, &written, &ends]);
    }
    table.print();
}
