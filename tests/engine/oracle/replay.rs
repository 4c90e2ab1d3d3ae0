// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The engine's side. It works on the kernel's file after the kernel has run the operation, so both
//! see the same blocks. An access is a grant, as a guest of virtio-fs asks for it: a read is a
//! grant of the whole chunk; a write is a grant of the chunk if the kernel took 2 MiB, else of the
//! page.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Entry, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Extent, ExtentSource, FileExtents};
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use super::ops::MOST_PAGES;
use testkit::fakes::{Event, FakePersist, Log, StrictMapper};

/// Limit on the number of maps; QEMU crashes above 512 regions (Q2 of docs/front-ends.md).
const MOST_MAPS: usize = 500;

/// The window's page at which writable maps begin; read-only maps of the same file lie below.
const WRITABLE: u64 = MOST_PAGES;

/// A source that allocates, zeroes and cuts nothing, because the kernel has done so already.
struct Replay(FileExtents);

impl ExtentSource for Replay {
    fn file(&self) -> &Arc<File> {
        self.0.file()
    }

    fn file_bytes(&self) -> io::Result<u64> {
        self.0.file_bytes()
    }

    fn maps_pmd(&self) -> bool {
        true
    }

    fn allocate(&self, _: PageIndex, _: PageIndex) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent> {
        self.0.extent(page, pages, access)
    }

    fn set_bytes(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: FileRange, _: bool) -> io::Result<()> {
        Ok(())
    }
}

fn range(page: u64, pages: u64) -> FileRange {
    FileRange::new(FileOffset(page * PAGE_BYTES), pages * PAGE_BYTES)
}

pub struct Ours {
    engine: Engine,
    space: Arc<Space>,
    /// The engine's calls of the mapper and of the disk.
    log: Log,
}

impl Ours {
    pub fn new(file: Arc<File>) -> Self {
        let (log, bytes) = (Log::default(), 2 * MOST_PAGES * PAGE_BYTES);
        let mapper = StrictMapper::new(bytes, log.clone());
        let engine = Engine::new(WindowBytes(bytes), mapper, MOST_MAPS);
        let source = Replay(FileExtents::new(file).on_device(true));
        let persist = FakePersist::new(false, log.clone());
        let space = engine.space(Box::new(source), persist.persist());
        Self { engine, space, log }
    }

    fn grant(&self, page: u64, pages: u64, access: Access) -> Result<(), String> {
        let base = if access == Access::Write { WRITABLE } else { 0 };
        let at = WindowOffset((base + page) * PAGE_BYTES);
        let span = self.engine.span(at, WindowBytes(pages * PAGE_BYTES));
        let from = FileOffset(page * PAGE_BYTES);
        span.and_then(|span| self.engine.grant(&self.space, from, span, access, || true))
            .map_err(|e| format!("the engine refuses {access:?} of {page}: {e}"))
    }

    fn file_pages(&self) -> u64 {
        self.space.source().file_bytes().unwrap() / PAGE_BYTES
    }

    /// The first page of the page's chunk, and the number of its pages below the end of the file.
    fn chunk(&self, page: u64) -> (u64, u64) {
        let start = page / PMD_PAGES * PMD_PAGES;
        (start, (self.file_pages() - start).min(PMD_PAGES))
    }

    /// A load: a read grant of the whole chunk. Returns the page's entry.
    pub fn read(&self, page: u64) -> Result<Entry, String> {
        let (start, pages) = self.chunk(page);
        self.grant(start, pages, Access::Read)?;
        self.entry(page)
    }

    /// A store: a write grant of the chunk or of the page. Returns the page's entry.
    pub fn store(&self, page: u64, by_chunk: bool) -> Result<Entry, String> {
        let (start, pages) = if by_chunk { self.chunk(page) } else { (page, 1) };
        self.grant(start, pages, Access::Write)?;
        self.entry(page)
    }

    fn entry(&self, page: u64) -> Result<Entry, String> {
        let found = self.space.next_entry(PageIndex(page));
        let covers = |start: PageIndex, entry: Entry| {
            start.0 <= page && page < start.0 + entry.order().pages()
        };
        match found {
            Some((start, entry, _)) if covers(start, entry) => Ok(entry),
            other => Err(format!("the engine has no entry at {page}: {other:?}")),
        }
    }

    pub fn fsync(&self) -> Result<BTreeSet<(u64, u64)>, String> {
        self.log.take();
        let done = self.engine.writeback(&self.space, PageIndex(0), PageIndex::LAST);
        done.map_err(|e| e.to_string())?;
        let flushed = |event| match event {
            Event::Flush { from, bytes } => Some((from / PAGE_BYTES, bytes / PAGE_BYTES)),
            Event::Sync => panic!("the engine synced the file instead of flushing dirty entries"),
            _ => None,
        };
        Ok(self.log.take().into_iter().filter_map(flushed).collect())
    }

    /// Reports a write(2) that the kernel has carried out.
    pub fn written(&self, page: u64, pages: u64) -> Result<(), String> {
        let range = range(page, pages);
        let done = self.engine.write_by(&self.space, range, || Ok(range.bytes as usize));
        done.map(drop).map_err(|e| e.to_string())
    }

    /// Revokes the guest's grants of these pages.
    fn revoke(&self, page: u64, pages: u64) -> Result<(), String> {
        for base in [0, WRITABLE] {
            let at = WindowOffset((base + page) * PAGE_BYTES);
            let span = self.engine.span(at, WindowBytes(pages * PAGE_BYTES));
            span.and_then(|span| self.engine.revoke(&[span])).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    pub fn punched(&self, page: u64, pages: u64) -> Result<(), String> {
        self.revoke(page, pages)?;
        self.engine.punch(&self.space, range(page, pages)).map_err(|e| e.to_string())
    }

    pub fn truncated(&self, pages: u64) -> Result<(), String> {
        if pages < MOST_PAGES {
            self.revoke(pages, MOST_PAGES - pages)?;
        }
        let done = self.engine.resized(&self.space);
        done.map(drop).map_err(|e| e.to_string())
    }
}
