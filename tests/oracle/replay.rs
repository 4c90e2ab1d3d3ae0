// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The engine's side. Its file system is the kernel's file as that is after the kernel has done its
//! part, so both look at the same blocks. An access is a grant, as a guest of virtio-fs has it: to
//! read, of the whole chunk; to write, of the chunk where the kernel took 2 MiB, else of the page.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Entry, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Extent, ExtentSource, FileExtents};
use vhost_user_dax::window::{FileOffset, WindowBytes, WindowOffset};

use crate::fakes::{Event, FakePersist, Log, StrictMapper};
use crate::ops::MOST_PAGES;

/// Fewer than QEMU dies of (Q2).
const MOST_MAPS: usize = 500;

/// Where the window shows what may be written: the same file once more, behind what may be read.
const WRITABLE: u64 = MOST_PAGES;

/// The kernel has allocated, zeroed and cut already.
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

    fn zero(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

pub struct Ours {
    engine: Engine,
    space: Arc<Space>,
    /// What the engine asked of the front-end and of the disk.
    log: Log,
}

impl Ours {
    pub fn new(file: Arc<File>) -> Self {
        let (log, bytes) = (Log::default(), 2 * MOST_PAGES * PAGE_BYTES);
        let mapper = StrictMapper::new(bytes, log.clone());
        let engine = Engine::new(WindowBytes(bytes), mapper, MOST_MAPS);
        let source = Replay(FileExtents::new(file).on_device(true));
        let persist = FakePersist::new(false, log.clone());
        let space = engine.space(Box::new(source), Box::new(persist));
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

    /// The chunk of a page, as far as the file goes.
    fn chunk(&self, page: u64) -> (u64, u64) {
        let start = page / PMD_PAGES * PMD_PAGES;
        (start, (self.file_pages() - start).min(PMD_PAGES))
    }

    /// A load, or the attempt to have the whole chunk. Returns the entry.
    pub fn read(&self, page: u64) -> Result<Entry, String> {
        let (start, pages) = self.chunk(page);
        self.grant(start, pages, Access::Read)?;
        self.entry(page)
    }

    /// A store, by 2 MiB or by page.
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
            Event::Sync => panic!("only entries know what is dirty"),
            _ => None,
        };
        Ok(self.log.take().into_iter().filter_map(flushed).collect())
    }

    /// write(2) has been done by the kernel.
    pub fn written(&self, page: u64, pages: u64) -> Result<(), String> {
        let (from, bytes) = (FileOffset(page * PAGE_BYTES), pages * PAGE_BYTES);
        let done = self.engine.write_by(&self.space, from, bytes, || Ok(bytes as usize));
        done.map(drop).map_err(|e| e.to_string())
    }

    /// The guest gives back what it has of these pages.
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
        let (from, bytes) = (page * PAGE_BYTES, pages * PAGE_BYTES);
        self.engine.punch(&self.space, from, bytes).map_err(|e| e.to_string())
    }

    pub fn truncated(&self, pages: u64) -> Result<(), String> {
        if pages < MOST_PAGES {
            self.revoke(pages, MOST_PAGES - pages)?;
        }
        let done = self.engine.resized(&self.space);
        done.map(drop).map_err(|e| e.to_string())
    }
}
