// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 2: a writeback ends although other threads make entries dirty and mark them all the time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use vhost_user_dax::dax::entry::{Order, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;

use super::doubles::{Loaded, flushed_by_this_thread};
use super::measure::{Effort, median, nanos};
use super::report::{Table, Verdicts, headline, short};

/// Number of pages in the range of the writeback; the first half is granted before it begins.
const PAGES: u64 = 128 * PMD_PAGES;

#[derive(Clone, Copy)]
struct Others {
    name: &'static str,
    writer: bool,
    flusher: bool,
}

const OTHERS: [Others; 3] = [
    Others { name: "nobody", writer: false, flusher: false },
    Others { name: "a writer", writer: true, flusher: false },
    Others { name: "a writer and a flusher", writer: true, flusher: true },
];

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    headline(2, "Writeback beside a writer that never stops");
    println!(
        "  {} entries are dirty at the start, {PAGES} pages in the range. The writer makes\n  \
         write grants of one chunk after another, again and again; the flusher writes the whole\n  \
         range back.\n",
        PAGES / 2
    );
    let mut table =
        Table::new(&["beside it", "most flushes", "bound", "ms", "grants meanwhile", "steps, all"]);
    let mut worst = 0;
    for others in OTHERS {
        let runs: Vec<_> = (0..effort.pick(9, 3)).map(|_| writeback_beside(others)).collect();
        let most = runs.iter().map(|run| run.flushes).max().unwrap_or(0);
        worst = worst.max(most);
        let middle = |of: fn(&Run) -> f64| short(median(&runs.iter().map(of).collect::<Vec<_>>()));
        table.row(&[
            &others.name,
            &most,
            &PAGES,
            &middle(|run| run.nanos / 1e6),
            &middle(|run| run.grants as f64),
            &middle(|run| run.steps as f64),
        ]);
    }
    table.print();
    verdicts.must(
        worst <= PAGES,
        format!("2. flushes of one writeback beside a writer: {worst} (bound {PAGES}: one a page)"),
    );
}

struct Run {
    flushes: u64,
    nanos: f64,
    grants: u64,
    steps: u64,
}

fn writeback_beside(others: Others) -> Run {
    let loaded = Loaded::empty(PAGES, Order::Pte);
    for chunk in 0..PAGES / 2 / PMD_PAGES {
        loaded.grant(PageIndex(chunk * PMD_PAGES), PMD_PAGES, Access::Write);
    }
    let (ended, grants, busy) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let until_ended = |wanted: bool, work: &dyn Fn(u64)| {
        for turn in (0..).take_while(|_| wanted && !ended.load(Ordering::Relaxed)) {
            work(turn);
            busy.fetch_or(1, Ordering::Relaxed);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            until_ended(others.writer, &|turn| {
                let chunk = turn % (PAGES / PMD_PAGES);
                loaded.grant(PageIndex(chunk * PMD_PAGES), PMD_PAGES, Access::Write);
                grants.fetch_add(1, Ordering::Relaxed);
            });
        });
        scope.spawn(|| until_ended(others.flusher, &|_| loaded.writeback()));
        while others.writer && busy.load(Ordering::Relaxed) == 0 {
            thread::yield_now();
        }
        let (flushed, granted) = (flushed_by_this_thread(), grants.load(Ordering::Relaxed));
        let steps = loaded.steps();
        let nanos = nanos(|| loaded.writeback());
        let run = Run {
            flushes: flushed_by_this_thread() - flushed,
            nanos,
            grants: grants.load(Ordering::Relaxed) - granted,
            steps: loaded.steps() - steps,
        };
        ended.store(true, Ordering::Relaxed);
        run
    })
}
