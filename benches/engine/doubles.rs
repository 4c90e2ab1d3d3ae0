// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What stands around the engine here: a front-end, a file system and a disk that cost nothing.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Block, Order, PAGE_BYTES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Backed, Extent, ExtentSource};
use vhost_user_dax::persist::Persist;
use vhost_user_dax::window::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};

/// More maps than any bench makes.
pub const MOST_MAPS: usize = 1 << 30;

/// A front-end that agrees to everything.
pub struct AnyMapper;

impl Mapper for AnyMapper {
    fn map(
        &self,
        _at: WindowOffset,
        _file: &File,
        _from: FileOffset,
        _bytes: WindowBytes,
    ) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, _at: WindowOffset, _bytes: WindowBytes) -> Result<(), MapError> {
        Ok(())
    }
}

/// A file of any length without holes, whose blocks are numbered as its pages.
pub struct Flat {
    file: Arc<File>,
    bytes: u64,
    maps_pmd: bool,
}

impl ExtentSource for Flat {
    fn file(&self) -> &Arc<File> {
        &self.file
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn maps_pmd(&self) -> bool {
        self.maps_pmd
    }

    fn allocate(&self, _first: PageIndex, _last: PageIndex) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, page: PageIndex, pages: u64, _access: Access) -> io::Result<Extent> {
        let block = Block::new(page.0).ok_or(io::ErrorKind::FileTooLarge)?;
        Ok(Extent { start: page, pages, backed: Backed::Mapped(block) })
    }

    fn set_bytes(&self, _bytes: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn zero(&self, _from: u64, _bytes: u64, _keep: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

thread_local! {
    static FLUSHED: Cell<u64> = const { Cell::new(0) };
}

/// Flushes that the calling thread has made so far.
pub fn flushed_by_this_thread() -> u64 {
    FLUSHED.get()
}

/// A disk on which everything is durable at once. It counts, and does nothing else.
pub struct InlineWork {
    /// As [`Persist::kernel_tracks`].
    pub kernel_tracks: bool,
}

impl Persist for InlineWork {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn kernel_tracks(&self) -> bool {
        self.kernel_tracks
    }

    fn flush(&self, _from: u64, _bytes: u64) -> io::Result<()> {
        FLUSHED.set(FLUSHED.get() + 1);
        Ok(())
    }
}

/// An engine with one file on a backing of which only the engine knows what is dirty.
pub struct Loaded {
    /// The engine.
    pub engine: Engine,
    /// The file.
    pub space: Arc<Space>,
    /// The file's last page.
    pub last: PageIndex,
}

impl Loaded {
    /// A file that has room for `entries` entries of `order`; nothing is granted yet.
    pub fn empty(entries: u64, order: Order) -> Self {
        let bytes = entries * order.pages() * PAGE_BYTES;
        let engine = Engine::new(WindowBytes(bytes), Arc::new(AnyMapper), MOST_MAPS);
        let file = Arc::new(tempfile::tempfile().unwrap());
        let source = Flat { file, bytes, maps_pmd: order == Order::Pmd };
        let space = engine.space(Box::new(source), Box::new(InlineWork { kernel_tracks: false }));
        Self { engine, space, last: PageIndex(entries * order.pages() - 1) }
    }

    /// The same, with a write grant over all of it: every entry is there, and dirty for good.
    pub fn dirty(entries: u64, order: Order) -> Self {
        let loaded = Self::empty(entries, order);
        loaded.grant(PageIndex(0), loaded.last.0 + 1, Access::Write);
        loaded
    }

    /// Grants pages, at the place in the window that is their place in the file.
    pub fn grant(&self, first: PageIndex, pages: u64, access: Access) {
        let (at, bytes) = (WindowOffset(first.byte()), WindowBytes(pages * PAGE_BYTES));
        let span = self.engine.span(at, bytes).unwrap();
        self.engine.grant(&self.space, FileOffset(first.byte()), span, access, || true).unwrap();
    }

    /// Writes back everything.
    pub fn writeback(&self) {
        self.engine.writeback(&self.space, PageIndex(0), self.last).unwrap();
    }

    /// Nodes of the index that were visited so far, by whomever.
    pub fn steps(&self) -> u64 {
        self.space.entries().steps()
    }
}
