// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 11: the cost of a writeback, as a number of index steps.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Block, Order, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Backed, Extent, ExtentSource};
use vhost_user_dax::dax::index::Mark;
use vhost_user_dax::persist::{LineFlush, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use super::entries::{no_unmap, put};
use super::{ALL, Fixture, MOST_MAPS, pte};
use testkit::fakes::{Log, StrictMapper, lock};

/// A file whose block numbers equal its page numbers and that can't be mapped by PMD entries.
struct Flat(Arc<File>);

impl ExtentSource for Flat {
    fn file(&self) -> &Arc<File> {
        &self.0
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn maps_pmd(&self) -> bool {
        false
    }

    fn allocate(&self, _first: PageIndex, _last: PageIndex) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, page: PageIndex, pages: u64, _access: Access) -> io::Result<Extent> {
        Ok(Extent { start: page, pages, backed: Backed::Mapped(Block::new(page.0).unwrap()) })
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }

    fn zero(&self, _range: FileRange, _keep: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Counted(Arc<AtomicU64>);

impl LineFlush for Counted {
    fn flush(&self, _range: FileRange) -> io::Result<()> {
        self.0.fetch_add(1, SeqCst);
        Ok(())
    }

    fn fence(&self) {}
}

fn flat(pages: u64) -> (Engine, Arc<Space>, Arc<AtomicU64>) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(pages * PAGE_BYTES).unwrap();
    let window = WindowBytes(pages * PAGE_BYTES);
    let engine = Engine::new(window, StrictMapper::new(window.0, Log::default()), MOST_MAPS);
    let flushes = Arc::new(AtomicU64::new(0));
    let persist = Persist::lines(Counted(flushes.clone()));
    let space = engine.space(Box::new(Flat(Arc::new(file))), persist);
    (engine, space, flushes)
}

fn grant(engine: &Engine, space: &Arc<Space>, from: u64, pages: u64, access: Access) {
    let at = WindowOffset(from * PAGE_BYTES);
    let span = engine.span(at, WindowBytes(pages * PAGE_BYTES)).unwrap();
    engine.grant(space, FileOffset(from * PAGE_BYTES), span, access, || true).unwrap();
}

/// Number of index steps of one writeback of `dirty` dirty entries, per entry.
fn steps_per_entry(dirty: u64) -> f64 {
    let (engine, space, flushes) = flat(dirty);
    grant(&engine, &space, 0, dirty, Access::Write);
    assert_eq!(space.entries().len(), dirty);
    let before = space.entries().steps();
    engine.writeback(&space, ALL.0, ALL.1).unwrap();
    assert_eq!(flushes.load(SeqCst), dirty);
    (space.entries().steps() - before) as f64 / dirty as f64
}

/// Row 11: the steps of a writeback are linear in the number of dirty entries, from 1,000 to
/// 1,000,000.
#[test]
fn row_11_steps_are_linear_in_the_dirty_entries() {
    let least = steps_per_entry(1_000);
    for dirty in [10_000, 100_000, 1_000_000] {
        let cost = steps_per_entry(dirty);
        // The tree is two levels taller for 1,000,000 entries, which the factor 1.5 allows for.
        assert!(cost <= 1.5 * least, "{cost} steps per entry for {dirty}, {least} for 1,000");
    }
}

/// Row 11: clean entries and the size of the range cost almost no steps.
#[test]
fn row_11_clean_entries_cost_nothing() {
    let (engine, space, flushes) = flat(100_000);
    grant(&engine, &space, 0, 100_000, Access::Read);
    let cost = |first, last| {
        let before = space.entries().steps();
        engine.writeback(&space, PageIndex(first), PageIndex(last)).unwrap();
        space.entries().steps() - before
    };
    assert!(cost(0, u64::MAX) <= 10, "more than 10 steps without a dirty entry");
    for page in [3, 50_000, 99_999] {
        grant(&engine, &space, page, 1, Access::Write);
    }
    let all = cost(0, PageIndex::LAST.0);
    assert!(all <= 3 * 100, "{all} steps for 3 of 100,000 entries");
    assert_eq!(flushes.load(SeqCst), 3);
    assert!(cost(4, 49_999) <= 20, "more than 20 steps without a dirty entry in the range");
    assert_eq!(flushes.load(SeqCst), 3);
}

/// Row 11: a writeback ends although a writer makes new entries dirty ahead of it all the time: it
/// writes exactly the entries that were dirty when it began, once each.
#[test]
fn row_11_a_writer_that_never_stops() {
    const BEGAN_WITH: u64 = 100;
    let pages = 8 * PMD_PAGES;
    let fixture = Fixture::new(pages);
    fixture.source.state().maps_pmd.store(false, SeqCst);
    fixture.grant(0, 0, BEGAN_WITH, Access::Write).unwrap();
    fixture.log.take();
    let (space, calls) = (fixture.space.clone(), AtomicU64::new(0));
    *lock(&fixture.persist.state().during) = Some(Arc::new(move |_| {
        let next = BEGAN_WITH + calls.fetch_add(1, SeqCst);
        if next < pages {
            put(space.entries(), next, pte(next));
            let held = space.entries().grab(PageIndex(next), Order::Pte, &mut no_unmap).unwrap();
            held.mark(Mark::Dirty, true);
        }
    }));
    fixture.sync().unwrap();
    *lock(&fixture.persist.state().during) = None;
    let flushed: Vec<_> = fixture.flushed().into_iter().map(|(page, _)| page).collect();
    assert_eq!(flushed, (0..BEGAN_WITH).collect::<Vec<_>>());
    assert_eq!(
        fixture.dirty().len() as u64,
        2 * BEGAN_WITH,
        "the next writeback must find the flushed and the new entries"
    );
}
