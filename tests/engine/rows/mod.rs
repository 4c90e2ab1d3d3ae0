// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One or more tests per behaviour, named after its row. The table is in the documentation of
//! `dax`.

mod entries;
mod fallback;
mod flushers;
mod grants;
mod holes;
mod lines;
mod real_files;
mod refusals;
mod resize;
mod rw;
mod trace;
mod waits;
mod walk;
mod writeback;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};

use vhost_user_dax::dax::counters::Snapshot;
use vhost_user_dax::dax::engine::{Engine, GrantError, Space};
use vhost_user_dax::dax::entry::{Block, Entry, Order, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::Mark;
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use testkit::fakes::{Event, FakePersist, FakeSource, Log, StrictMapper};

pub const ALL: (PageIndex, PageIndex) = (PageIndex(0), PageIndex::LAST);
pub const WINDOW_PAGES: u64 = 64 * PMD_PAGES;
pub const MOST_MAPS: usize = 64;

/// An engine with test doubles and one file.
pub struct Fixture {
    pub log: Log,
    pub mapper: Arc<StrictMapper>,
    pub engine: Arc<Engine>,
    pub source: FakeSource,
    pub persist: FakePersist,
    pub space: Arc<Space>,
}

impl Fixture {
    /// A file of `pages` pages whose dirty pages only entries track.
    pub fn new(pages: u64) -> Self {
        Self::with(pages * PAGE_BYTES, false)
    }

    pub fn with(file_bytes: u64, kernel_tracks: bool) -> Self {
        let log = Log::default();
        let window = WINDOW_PAGES * PAGE_BYTES;
        let mapper = StrictMapper::new(window, log.clone());
        let engine = Engine::new(WindowBytes(window), mapper.clone(), MOST_MAPS);
        let source = FakeSource::new(file_bytes, log.clone());
        let persist = FakePersist::new(kernel_tracks, log.clone());
        let space = engine.space(Box::new(source.clone()), persist.persist());
        Self { log, mapper, engine: Arc::new(engine), source, persist, space }
    }

    /// Another file under the same engine.
    pub fn another_file(&self, pages: u64) -> Arc<Space> {
        let source = FakeSource::new(pages * PAGE_BYTES, self.log.clone());
        let persist = FakePersist::new(false, self.log.clone());
        self.engine.space(Box::new(source), persist.persist())
    }

    /// Grants `pages` of the file from page `from` on, at page `at` of the window.
    pub fn grant(&self, from: u64, at: u64, pages: u64, access: Access) -> Result<(), GrantError> {
        self.grant_of(&self.space, from, at, pages, access)
    }

    pub fn grant_of(
        &self,
        space: &Arc<Space>,
        from: u64,
        at: u64,
        pages: u64,
        access: Access,
    ) -> Result<(), GrantError> {
        let (at, bytes) = (WindowOffset(at * PAGE_BYTES), WindowBytes(pages * PAGE_BYTES));
        let span = self.engine.span(at, bytes)?;
        self.engine.grant(space, FileOffset(from * PAGE_BYTES), span, access, || true)
    }

    /// Revokes the grants of ranges of the window: first page and number of pages.
    pub fn revoke(&self, ranges: &[(u64, u64)]) -> Result<(), GrantError> {
        let span = |(at, pages): &(u64, u64)| {
            let (at, bytes) = (WindowOffset(at * PAGE_BYTES), WindowBytes(pages * PAGE_BYTES));
            self.engine.span(at, bytes).unwrap()
        };
        self.engine.revoke(&ranges.iter().map(span).collect::<Vec<_>>())
    }

    /// Makes `bytes` bytes of the file from byte `from` on read as zeros.
    pub fn punch(&self, from: u64, bytes: u64) -> Result<(), GrantError> {
        self.engine.punch(&self.space, FileRange::new(FileOffset(from), bytes))
    }

    pub fn sync(&self) -> std::io::Result<()> {
        self.engine.writeback(&self.space, ALL.0, ALL.1)
    }

    /// All entries: first page and entry.
    pub fn entries(&self) -> Vec<(u64, Entry)> {
        self.marked(None)
    }

    pub fn dirty(&self) -> Vec<u64> {
        self.marked(Some(Mark::Dirty)).into_iter().map(|(start, _)| start).collect()
    }

    fn marked(&self, mark: Option<Mark>) -> Vec<(u64, Entry)> {
        let mut at = PageIndex(0);
        let mut found = Vec::new();
        while let Some((start, entry)) = self.space.entries().next(at, ALL.1, mark) {
            found.push((start.0, entry));
            at = PageIndex(start.0 + entry.order().pages());
        }
        found
    }

    /// The flushes since the log was last taken: first page and number of pages.
    pub fn flushed(&self) -> Vec<(u64, u64)> {
        let flush = |event| match event {
            Event::Flush { from, bytes } => Some((from / PAGE_BYTES, bytes / PAGE_BYTES)),
            _ => None,
        };
        self.log.take().into_iter().filter_map(flush).collect()
    }

    /// Messages to the front-end since the log was last taken.
    pub fn messages(&self) -> Vec<Event> {
        let sent = |event: &Event| matches!(event, Event::Map { .. } | Event::Unmap { .. });
        self.log.take().into_iter().filter(sent).collect()
    }

    pub fn counted(&self) -> Snapshot {
        self.engine.counters().snapshot()
    }

    /// Waits until the number of waits for an entry so far is at least `waits`.
    pub fn until_waits(&self, waits: u64) {
        until(|| self.counted().waits >= waits);
    }
}

/// The block that `FakeSource` gives to a page.
pub fn own_block(page: u64) -> Block {
    Block::new((1 << 30) + page).unwrap()
}

pub fn zero(order: Order) -> Entry {
    Entry::zero(order)
}

pub fn pte(page: u64) -> Entry {
    Entry::real(Order::Pte, own_block(page))
}

pub fn pmd(page: u64) -> Entry {
    Entry::real(Order::Pmd, own_block(page))
}

pub fn map(at: u64, from: u64, pages: u64) -> Event {
    Event::Map { at: at * PAGE_BYTES, from: from * PAGE_BYTES, bytes: pages * PAGE_BYTES }
}

pub fn unmap(at: u64, pages: u64) -> Event {
    Event::Unmap { at: at * PAGE_BYTES, bytes: pages * PAGE_BYTES }
}

pub fn unmap_hole(from: u64, pages: u64) -> Event {
    Event::UnmapHole { from: from * PAGE_BYTES, bytes: pages * PAGE_BYTES }
}

/// Waits until another thread has made `condition` true.
pub fn until(condition: impl Fn() -> bool) {
    testkit::eventually("another thread", condition);
}

/// Receives a value that another thread sends.
pub fn receive<T>(from: &Receiver<T>) -> T {
    match from.recv_timeout(testkit::HANG) {
        Ok(value) => value,
        Err(RecvTimeoutError::Timeout) => panic!("no value after 20 s: a lost wake-up?"),
        Err(RecvTimeoutError::Disconnected) => {
            panic!("the other thread has ended without sending a value")
        }
    }
}
