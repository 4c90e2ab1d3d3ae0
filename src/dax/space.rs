// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the engine's state of one file. Knows no window.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::coverage::Coverage;
use super::entries::Entries;
use super::entry::{Entry, PageIndex};
use super::extent::ExtentSource;
use super::index::Mark;
use super::sync::{InvalidateLock, Mutex, lock};
use super::wait::SpaceId;
use crate::persist::{LineFlush, Persist};
use crate::window::FileRange;

/// The engine's state of one host file that is or was granted: the kernel's `struct address_space`.
pub struct Space {
    pub(super) id: SpaceId,
    pub(super) entries: Entries,
    pub(super) source: Box<dyn ExtentSource>,
    pub(super) persist: Persist,
    /// Read-locked by grants, reads, writes and writebacks; write-locked by changes of the file's
    /// length or blocks. It is the kernel's `invalidate_lock`. The thread that holds it may make
    /// file-system calls and front-end round trips.
    pub(super) invalidate_lock: InvalidateLock,
    /// The file's length in bytes at the last look, which was made under the invalidate lock. If
    /// the file has another length now, another program has changed it.
    pub(super) known_bytes: AtomicU64,
    pub(super) coverage: Mutex<Coverage>,
    /// Whether a writeback has failed. The first failure is final (see [`Persist`]).
    pub(super) failed: Mutex<bool>,
}

impl Space {
    /// The entries, to be read.
    pub fn entries(&self) -> &Entries {
        &self.entries
    }

    /// Number of entries.
    pub fn entry_count(&self) -> u64 {
        self.entries.index().len()
    }

    /// Memory of the entries, in bytes.
    pub fn index_bytes(&self) -> usize {
        self.entries.index().bytes()
    }

    /// Whether no page of the file is granted.
    pub fn is_idle(&self) -> bool {
        self.granted_runs() == 0
    }

    /// The file whose pages the entries describe.
    pub fn source(&self) -> &dyn ExtentSource {
        &*self.source
    }

    /// Number of runs of pages that the coverage keeps. 0 if no page is granted.
    pub fn granted_runs(&self) -> usize {
        lock(&self.coverage).runs_kept()
    }

    /// Whether `range` lies inside the file and live write grants cover all of it. If so, it has
    /// blocks (behaviour 16) as long as the caller holds the invalidate lock.
    ///
    /// # Errors
    /// The error of fstat(2) on the file.
    pub(crate) fn may_be_stored_to(&self, range: FileRange) -> io::Result<bool> {
        let file_bytes = self.source.file_bytes()?;
        let end = range.checked_end().filter(|end| end.0 <= file_bytes);
        if range.is_empty() || end.is_none() {
            return Ok(false);
        }
        let (first, last) = range.pages();
        let runs = lock(&self.coverage).runs(first, last);
        let mut next = first;
        for (start, end, count) in runs {
            if start > next || count.writes == 0 {
                return Ok(false);
            }
            next = end.next();
        }
        Ok(next > last)
    }

    /// Read-locks the invalidate lock: until the guard is dropped, no request shortens the file.
    /// None if another thread has write-locked it or waits to.
    pub(crate) fn keep_length(&self) -> Option<impl Drop + '_> {
        self.invalidate_lock.try_read()
    }

    /// Clears the failure of an earlier writeback. Call it only once that failure was reported for
    /// each open file whose data may be lost.
    pub fn forgive(&self) {
        *lock(&self.failed) = false;
    }

    /// Whether a writeback has failed, or the engine no longer knows which pages are dirty. Every
    /// later writeback then fails.
    pub fn has_failed(&self) -> bool {
        *lock(&self.failed)
    }

    /// The first entry that covers `page` or a later page: its first page, the entry, and whether
    /// it is dirty.
    pub fn next_entry(&self, page: PageIndex) -> Option<(PageIndex, Entry, bool)> {
        let index = self.entries.index();
        let (start, entry) = index.next(page, PageIndex::LAST, None)?;
        Some((start, entry, index.is_marked(start, Mark::Dirty)))
    }

    /// The flush by cache lines. None where the kernel tracks dirty pages.
    pub(super) fn lines(&self) -> Option<&dyn LineFlush> {
        match &self.persist {
            Persist::Lines(lines) => Some(&**lines),
            Persist::Kernel(_) => None,
        }
    }

    /// Whether the entries, and not the kernel, track what is dirty.
    pub(super) fn tracks(&self) -> bool {
        self.lines().is_some()
    }

    /// The page behind the file's last page.
    pub(super) fn end(&self) -> io::Result<PageIndex> {
        Ok(PageIndex::behind(self.look()?))
    }

    /// The file's length in bytes at the last [`look`](Self::look).
    pub(super) fn known_bytes(&self) -> u64 {
        self.known_bytes.load(Ordering::Relaxed)
    }

    /// Reads the file's length in bytes, and keeps it as [`known_bytes`](Self::known_bytes).
    pub(super) fn look(&self) -> io::Result<u64> {
        let bytes = self.source.file_bytes()?;
        self.known_bytes.store(bytes, Ordering::Relaxed);
        Ok(bytes)
    }
}
