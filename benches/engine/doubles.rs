// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Test doubles around the engine: a front-end, a file system and a disk without costs.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::sync::Arc;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Block, Order, PAGE_BYTES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Backed, Extent, ExtentSource};
use vhost_user_dax::persist::{KernelSync, LineFlush, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset};

/// Above the number of maps of any benchmark.
pub const MOST_MAPS: usize = 1 << 30;

/// A front-end that accepts every map and unmap.
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

/// A file of any length without holes, whose block numbers equal its page numbers.
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

    fn zero(&self, _range: FileRange, _keep: bool) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

thread_local! {
    static FLUSHED: Cell<u64> = const { Cell::new(0) };
}

/// Number of flushes by the calling thread so far.
pub fn flushed_by_this_thread() -> u64 {
    FLUSHED.get()
}

/// A disk on which everything is durable at once. It counts flushes, and does nothing else.
pub struct InstantDisk;

impl KernelSync for InstantDisk {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl LineFlush for InstantDisk {
    fn flush(&self, _range: FileRange) -> io::Result<()> {
        FLUSHED.set(FLUSHED.get() + 1);
        Ok(())
    }

    fn fence(&self) {}
}

/// An engine with one file, whose dirty pages only the engine tracks.
pub struct Loaded {
    /// The engine.
    pub engine: Engine,
    /// The file.
    pub space: Arc<Space>,
    /// The file's last page.
    pub last: PageIndex,
}

impl Loaded {
    /// A file with room for `entries` entries of `order`, without a grant.
    pub fn empty(entries: u64, order: Order) -> Self {
        let bytes = entries * order.pages() * PAGE_BYTES;
        let engine = Engine::new(WindowBytes(bytes), Arc::new(AnyMapper), MOST_MAPS);
        let file = Arc::new(tempfile::tempfile().unwrap());
        let source = Flat { file, bytes, maps_pmd: order == Order::Pmd };
        let space = engine.space(Box::new(source), Persist::lines(InstantDisk));
        Self { engine, space, last: PageIndex(entries * order.pages() - 1) }
    }

    /// As `empty`, with a write grant of the whole file: all entries exist, and stay dirty.
    pub fn dirty(entries: u64, order: Order) -> Self {
        let loaded = Self::empty(entries, order);
        loaded.grant(PageIndex(0), loaded.last.0 + 1, Access::Write);
        loaded
    }

    /// Grants pages, at a window offset equal to their file offset.
    pub fn grant(&self, first: PageIndex, pages: u64, access: Access) {
        let (at, bytes) = (WindowOffset(first.byte().0), WindowBytes(pages * PAGE_BYTES));
        let span = self.engine.span(at, bytes).unwrap();
        self.engine.grant(&self.space, first.byte(), span, access, || true).unwrap();
    }

    /// Writes back the whole file.
    pub fn writeback(&self) {
        self.engine.writeback(&self.space, PageIndex(0), self.last).unwrap();
    }

    /// Number of index nodes visited so far, by all threads.
    pub fn steps(&self) -> u64 {
        self.space.entries().steps()
    }
}
