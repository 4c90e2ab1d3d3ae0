// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The model: what the guest was granted, what it may have stored, and what of that is durable.
//!
//! The guest is the worst there can be: at every moment it stores to every page it may store to.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES};
use vhost_user_dax::persist::{KernelSync, LineFlush, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset};

use super::op::{FILES, WINDOW_PAGES};
use super::pages::Pages;
use crate::fakes::{StrictMapper, lock};

/// What one page of the window was granted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cell {
    pub file: usize,
    pub page: u64,
    pub write: bool,
}

impl Cell {
    /// The same grant, some pages further.
    pub fn behind(self, pages: u64) -> Self {
        Self { page: self.page + pages, ..self }
    }
}

/// What one file's pages are to the guest.
#[derive(Default)]
pub struct FilePages {
    pub inode: u64,
    /// May have been stored to since they were last made durable.
    pub dirty: Pages,
    /// Granted for writing and shown: stored to at this very moment.
    pub written: Pages,
    /// Granted for writing, shown or not.
    pub wanted: Pages,
    /// Granted for anything.
    pub covered: Pages,
    /// Flushed during this step.
    pub flushed: Pages,
    /// Flushed, and no fence came behind: not durable yet.
    pub unfenced: Pages,
}

pub struct Guest {
    mapper: Arc<StrictMapper>,
    pub cells: Vec<Option<Cell>>,
    pub files: [FilePages; FILES],
    /// The front-end's maps have changed since `written` was found out.
    stale: bool,
    /// What a write grant in the making is for: if it is refused it leaves a last flush behind.
    pub trying: Option<(usize, u64, u64)>,
    /// Window pages that the guest asks something about: until the answer it leaves them alone.
    pub asked: std::ops::Range<u64>,
    /// Flushes that nothing called for.
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

    /// Window pages that show something: window page, file, file page, in runs.
    pub fn shown(&self) -> Vec<(u64, usize, u64, u64)> {
        let file = |inode| self.files.iter().position(|file| file.inode == inode).unwrap();
        let maps = self.mapper.maps();
        let runs = maps.iter().map(|(at, (bytes, inode, from))| {
            (at / PAGE_BYTES, file(*inode), from / PAGE_BYTES, bytes / PAGE_BYTES)
        });
        runs.collect()
    }

    /// The guest stores to all that it may store to.
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

    /// Grants have changed.
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

    /// The guest asks about window pages, or has its answer.
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
        // Of a chunk that has been cut off, what is left is flushed, whichever page of it was
        // dirty.
        let cut = from.is_multiple_of(PMD_PAGES) && end < from + PMD_PAGES;
        let entry_end = if cut { from + PMD_PAGES } else { end };
        if !trying && !pages.dirty.any(from, entry_end) && !pages.wanted.any(from, entry_end) {
            self.needless.push(format!("file {file}: pages {from:#x}..{end:#x}"));
        }
        pages.dirty.remove(from, end);
        pages.flushed.insert(from, end);
        pages.unfenced.insert(from, end);
        // A store comes right behind the flush.
        self.store();
    }
}

/// The strict front-end, which refuses what a step says, message by message.
pub struct FrontEnd {
    pub strict: Arc<StrictMapper>,
    pub guest: Arc<Mutex<Guest>>,
    /// Bit 0: refuse the next message.
    pub refuse: AtomicU64,
    pub refused: AtomicU64,
}

impl FrontEnd {
    fn pass(&self) -> Result<(), MapError> {
        let refuse = self.refuse.load(Ordering::Relaxed);
        // The last bit stands for all that follow.
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

/// One file's disk: what it has been told to make durable.
pub struct Disk {
    pub file: usize,
    pub kernel: bool,
    pub guest: Arc<Mutex<Guest>>,
    pub fails: AtomicBool,
    /// It has failed: what it says from then on counts for nothing.
    pub failed: AtomicBool,
    pub flushes: AtomicU64,
    pub flushed_bytes: AtomicU64,
    pub syncs: AtomicU64,
}

impl Disk {
    fn outcome(&self) -> io::Result<()> {
        assert!(
            !self.failed.load(Ordering::Relaxed),
            "called again after an error, which is final"
        );
        if self.fails.load(Ordering::Relaxed) {
            self.failed.store(true, Ordering::Relaxed);
            return Err(io::Error::other("the disk fails"));
        }
        Ok(())
    }
}

/// The engine's handle of a disk.
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
