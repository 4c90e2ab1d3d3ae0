// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The model: the guest's grants, the pages that it may have stored to, and the durable pages.
//!
//! The modelled guest is the worst case: at every moment it stores to every page that it may write.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES};
use vhost_user_dax::persist::{KernelSync, LineFlush, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset};

use super::op::{FILES, WINDOW_PAGES};
use super::pages::Pages;
use crate::fakes::{StrictMapper, lock};

/// The grant of one window page: the file, the file's page, and whether it may be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub file: usize,
    pub page: u64,
    pub write: bool,
}

impl Cell {
    /// The same grant, `pages` pages further on.
    pub fn behind(self, pages: u64) -> Self {
        Self { page: self.page + pages, ..self }
    }
}

/// The state of one file's pages.
#[derive(Default)]
pub struct FilePages {
    pub inode: u64,
    /// Pages that may have been stored to since they were last made durable.
    pub dirty: Pages,
    /// Pages granted for writing and shown in the window: the guest stores to them all the time.
    pub written: Pages,
    /// Pages granted for writing, shown in the window or not.
    pub wanted: Pages,
    /// Pages granted for reading or writing.
    pub covered: Pages,
    /// Pages flushed during this step.
    pub flushed: Pages,
    /// Pages flushed without a fence afterwards: not durable yet.
    pub unfenced: Pages,
}

pub struct Guest {
    mapper: Arc<StrictMapper>,
    pub cells: Vec<Option<Cell>>,
    pub files: [FilePages; FILES],
    /// The front-end's maps have changed since `written` was computed.
    stale: bool,
    /// The file and page range of the write grant that is being made. If it is refused, its pages
    /// get a last flush.
    pub trying: Option<(usize, u64, u64)>,
    /// Window pages of a request in progress: the guest does not access them until the answer.
    pub asked: std::ops::Range<u64>,
    /// Flushes of clean pages, which nothing required.
    pub needless: Vec<String>,
}

impl Guest {
    pub fn new(mapper: Arc<StrictMapper>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            mapper,
            cells: vec![None; WINDOW_PAGES as usize],
            files: Default::default(),
            stale: true,
            trying: None,
            asked: 0..0,
            needless: Vec::new(),
        }))
    }

    /// The runs of shown window pages: window page, file, file page, number of pages.
    pub fn shown(&self) -> Vec<(u64, usize, u64, u64)> {
        let file = |inode| self.files.iter().position(|file| file.inode == inode).unwrap();
        let maps = self.mapper.maps();
        let runs = maps.iter().map(|(at, (bytes, inode, from))| {
            (at / PAGE_BYTES, file(*inode), from / PAGE_BYTES, bytes / PAGE_BYTES)
        });
        runs.collect()
    }

    /// The guest stores to all pages that it may write.
    pub fn store(&mut self) {
        if std::mem::take(&mut self.stale) {
            self.files.iter_mut().for_each(|file| file.written = Pages::default());
            for (at, file, page, pages) in self.shown() {
                let mut start = 0;
                for n in 0..=pages {
                    let may = Cell { file, page: page + n, write: true };
                    let stores = n < pages
                        && self.cells[(at + n) as usize] == Some(may)
                        && !self.asked.contains(&(at + n));
                    if !stores {
                        self.files[file].written.insert(page + start, page + n);
                        start = n + 1;
                    }
                }
            }
        }
        self.files.iter_mut().for_each(|file| file.dirty.add(&file.written));
    }

    /// Sets the grants of window pages.
    pub fn set_cells(&mut self, at: u64, pages: u64, cell: impl Fn(u64) -> Option<Cell>) {
        for n in 0..pages {
            self.cells[(at + n) as usize] = cell(n);
        }
        for file in &mut self.files {
            (file.wanted, file.covered) = Default::default();
        }
        let mut at = 0;
        while at < self.cells.len() {
            let start = at;
            at += 1;
            let Some(first) = self.cells[start] else { continue };
            while at < self.cells.len() && self.cells[at] == Some(first.behind((at - start) as u64))
            {
                at += 1;
            }
            let (file, end) = (&mut self.files[first.file], first.page + (at - start) as u64);
            file.covered.insert(first.page, end);
            if first.write {
                file.wanted.insert(first.page, end);
            }
        }
        self.stale = true;
    }

    /// The front-end has dropped all maps.
    pub fn dropped(&mut self) {
        self.stale = true;
    }

    /// A request about these window pages begins; an empty range: it has ended.
    pub fn ask(&mut self, pages: std::ops::Range<u64>) {
        self.asked = pages;
        self.stale = true;
    }

    fn synced(&mut self, file: usize) {
        self.files[file].dirty = Pages::default();
        self.store();
    }

    fn flushed(&mut self, file: usize, from: u64, end: u64) {
        self.store();
        let pages = &mut self.files[file];
        let trying = self
            .trying
            .is_some_and(|(of, first, behind)| of == file && first < end && from < behind);
        // The flush of a PMD entry that the end of the file cuts covers all remaining pages of the
        // entry, whichever of them was dirty.
        let cut = from.is_multiple_of(PMD_PAGES) && end < from + PMD_PAGES;
        let entry_end = if cut { from + PMD_PAGES } else { end };
        if !trying && !pages.dirty.any(from, entry_end) && !pages.wanted.any(from, entry_end) {
            self.needless.push(format!("file {file}: pages {from:#x}..{end:#x}"));
        }
        pages.dirty.remove(from, end);
        pages.flushed.insert(from, end);
        pages.unfenced.insert(from, end);
        // The guest stores again right after the flush.
        self.store();
    }
}

/// The strict front-end, which refuses the messages that a step selects.
pub struct FrontEnd {
    pub strict: Arc<StrictMapper>,
    pub guest: Arc<Mutex<Guest>>,
    /// Bit n: refuse the n-th message from now on.
    pub refuse: AtomicU64,
    pub refused: AtomicU64,
}

impl FrontEnd {
    fn pass(&self) -> Result<(), MapError> {
        let refuse = self.refuse.load(Ordering::Relaxed);
        // Bit 63 applies to all later messages, too.
        let rest = (refuse >> 1) | (refuse & 1 << 63);
        self.refuse.store(rest, Ordering::Relaxed);
        if refuse & 1 != 0 {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(MapError::Refused);
        }
        lock(&self.guest).stale = true;
        Ok(())
    }
}

impl Mapper for FrontEnd {
    fn map(
        &self,
        at: WindowOffset,
        file: &std::fs::File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        self.pass()?;
        self.strict.map(at, file, from, bytes)
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.pass()?;
        self.strict.unmap(at, bytes)
    }

    fn unmap_hole(&self, file: &std::fs::File, from: FileOffset, bytes: WindowBytes) {
        self.strict.unmap_hole(file, from, bytes);
    }
}

/// One file's disk: counts the flushes and syncs of the engine.
pub struct Disk {
    pub file: usize,
    pub kernel: bool,
    pub guest: Arc<Mutex<Guest>>,
    pub fails: AtomicBool,
    /// A call has failed. The engine must not call again.
    pub failed: AtomicBool,
    pub flushes: AtomicU64,
    pub flushed_bytes: AtomicU64,
    pub syncs: AtomicU64,
}

impl Disk {
    fn outcome(&self) -> io::Result<()> {
        assert!(!self.failed.load(Ordering::Relaxed), "the engine called again after an error");
        if self.fails.load(Ordering::Relaxed) {
            self.failed.store(true, Ordering::Relaxed);
            return Err(io::Error::other("the disk fails"));
        }
        Ok(())
    }
}

/// The engine's handle to a disk.
pub struct DiskOf(pub Arc<Disk>);

impl DiskOf {
    pub fn persist(self) -> Persist {
        if self.0.kernel { Persist::kernel(self) } else { Persist::lines(self) }
    }
}

impl KernelSync for DiskOf {
    fn sync(&self) -> io::Result<()> {
        self.0.syncs.fetch_add(1, Ordering::Relaxed);
        self.0.outcome()?;
        lock(&self.0.guest).synced(self.0.file);
        Ok(())
    }
}

impl LineFlush for DiskOf {
    fn flush(&self, range: FileRange) -> io::Result<()> {
        self.0.outcome()?;
        self.0.flushes.fetch_add(1, Ordering::Relaxed);
        self.0.flushed_bytes.fetch_add(range.bytes, Ordering::Relaxed);
        let (from, end) = (range.from.0 / PAGE_BYTES, range.end().0 / PAGE_BYTES);
        lock(&self.0.guest).flushed(self.0.file, from, end);
        Ok(())
    }

    fn fence(&self) {
        lock(&self.0.guest).files[self.0.file].unfenced = Pages::default();
    }
}
