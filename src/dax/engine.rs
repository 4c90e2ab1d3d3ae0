// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: grants: SETUPMAPPING as a fault over a range (behaviours 6, 8, 9, 14 to 16).
//! Knows no FUSE: a grant is a range of a file, an offset in the window, and an access.

use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use log::warn;

use super::counters::Counters;
use super::coverage::Coverage;
use super::entry::{Entry, PAGE_BYTES, PageIndex};
use super::extent::{Access, ExtentSource};
use super::grant::{Grant, Window, extent_of};
pub use super::grant::{GrantError, Span};
use super::index::Mark;
use super::space::Entries;
use super::sync::{Arc, CheckedOut, Checkout, InvalidateLock, Mutex, lock};
use super::wait::{SpaceId, WaitTable};
use crate::persist::{LineFlush, Persist};
use crate::support::lock::Rank;
use crate::window::layout::{Piece, ShowError};
use crate::window::{
    FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset, WindowRange,
};

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

/// The engine of one device.
pub struct Engine {
    pub(super) bytes: WindowBytes,
    pub(super) mapper: Arc<dyn Mapper>,
    most_maps: AtomicUsize,
    pub(super) window: Checkout<Window>,
    waits: Arc<WaitTable>,
    next_space: AtomicU64,
    pub(super) counters: Counters,
}

impl Engine {
    /// An engine without grants, over a window of `bytes` bytes, with at most `most_maps` maps.
    pub fn new(bytes: WindowBytes, mapper: Arc<dyn Mapper>, most_maps: usize) -> Self {
        Self {
            bytes,
            mapper,
            most_maps: AtomicUsize::new(most_maps),
            window: Checkout::new(Rank::Window, Window::default()),
            waits: Arc::new(WaitTable::default()),
            next_space: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// A new space for a file that has none yet in this engine.
    pub fn space(&self, source: Box<dyn ExtentSource>, persist: Persist) -> Arc<Space> {
        let id = SpaceId(self.next_space.fetch_add(1, Ordering::Relaxed));
        Arc::new(Space {
            id,
            entries: Entries::new(id, self.waits.clone()),
            source,
            persist,
            invalidate_lock: InvalidateLock::default(),
            known_bytes: AtomicU64::new(0),
            coverage: Mutex::default(),
            failed: Mutex::default(),
        })
    }

    /// Largest number of maps in the window.
    pub fn most_maps(&self) -> usize {
        self.most_maps.load(Ordering::Relaxed)
    }

    /// Sets the largest number of maps: the maps of all devices of the VM share one limit
    /// (docs/front-ends.md Q2). Maps above a lowered limit stay.
    pub fn set_most_maps(&self, most_maps: usize) {
        self.most_maps.store(most_maps, Ordering::Relaxed);
    }

    /// The grant that covers byte `at` of the window: its space, and the granted range of the file
    /// from that byte to the grant's end.
    pub fn granted_at(&self, at: WindowOffset) -> Option<(Arc<Space>, FileRange)> {
        let window = self.window.take();
        let (start, grant) = window.grants.range(..=at).next_back()?;
        let left = WindowRange::between(at, grant.range(*start).end())?;
        Some((grant.space.clone(), grant.part(*start, left).of_file()))
    }

    /// The engine's counters.
    pub fn counters(&self) -> &Counters {
        self.counters.waits.set(self.waits.joined());
        &self.counters
    }

    /// Number of grants and number of maps.
    pub fn sizes(&self) -> (usize, usize) {
        let window = self.window.take();
        (window.grants.len(), window.layout.len())
    }

    /// Checks a range of the window: `bytes` bytes from `at` on.
    ///
    /// # Errors
    /// [`GrantError::Invalid`] if the range is empty, is not whole pages, or ends past the window.
    pub fn span(&self, at: WindowOffset, bytes: WindowBytes) -> Result<Span, GrantError> {
        let whole = |n: u64| n.is_multiple_of(PAGE_BYTES);
        if bytes.0 == 0 || !whole(at.0) || !whole(bytes.0) {
            return Err(GrantError::Invalid("the window range is not whole pages of 4 KiB"));
        }
        match at.0.checked_add(bytes.0) {
            Some(end) if end <= self.bytes.0 => Ok(Span(WindowRange::new(at, bytes))),
            _ => Err(GrantError::Invalid("the range ends past the end of the window")),
        }
    }

    /// SETUPMAPPING: grants `span` of the window, which then shows `space`'s file from `from` on.
    /// Earlier grants in `span` are replaced. `may` returns false if the request belongs to an
    /// earlier life of the device (it was reset or unmounted since); it is called under the
    /// checkout of the window, so no other grant comes in between.
    ///
    /// # Errors
    /// See [`GrantError`].
    pub fn grant(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        span: Span,
        access: Access,
        may: impl Fn() -> bool,
    ) -> Result<(), GrantError> {
        let done = self.try_grant(space, from, span, access, may);
        match &done {
            Ok(()) => self.counters.grants.add(1),
            Err(_) => self.counters.grants_failed.add(1),
        }
        done
    }

    fn try_grant(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        span: Span,
        access: Access,
        may: impl Fn() -> bool,
    ) -> Result<(), GrantError> {
        let range = span.0;
        let grant = Grant { space: space.clone(), from, bytes: range.bytes, access };
        if !from.0.is_multiple_of(PAGE_BYTES) || grant.of_file().checked_end().is_none() {
            return Err(GrantError::Invalid("the file range is not whole pages of 4 KiB"));
        }
        let shared = space.invalidate_lock.read();
        let (last, mapped) = extent_of(&grant)?;
        if access == Access::Write {
            // Behaviour 16: blocks are allocated before the grant.
            self.counters.allocations.add(1);
            space.source.allocate(grant.first(), last)?;
        }
        // Counted before the fault: a thread that releases another grant of these pages at the same
        // time must see that this grant covers them, and keep the entries.
        lock(&space.coverage).add(grant.first(), grant.last(), access);
        let shown = self
            .fault(&grant, range.at, grant.first(), last)
            .map_err(GrantError::from)
            .and_then(|()| self.show(range, &grant, mapped, may));
        drop(shared);
        match shown {
            Ok(replaced) => {
                self.release(&replaced);
                Ok(())
            }
            Err(e) => {
                self.release(&[grant]);
                Err(e)
            }
        }
    }

    fn show(
        &self,
        range: WindowRange,
        grant: &Grant,
        mapped: WindowBytes,
        may: impl Fn() -> bool,
    ) -> Result<Vec<Grant>, GrantError> {
        let mut window = self.window.take();
        if !may() {
            return Err(GrantError::Unwanted);
        }
        self.show_piece(&mut window, range, Some((grant, mapped)))?;
        let replaced = window.cut_out(range);
        window.grants.insert(range.at, grant.clone());
        Ok(replaced)
    }

    pub(super) fn show_piece(
        &self,
        window: &mut CheckedOut<'_, Window>,
        range: WindowRange,
        new: Option<(&Grant, WindowBytes)>,
    ) -> Result<(), ShowError> {
        let piece = new.map(|(grant, mapped)| Piece {
            file: grant.space.source.file().clone(),
            from: grant.from,
            bytes: mapped,
        });
        window.layout.show(range, piece.as_ref(), &*self.mapper, self.most_maps())
    }

    /// REMOVEMAPPING: removes the grants in `spans`, of any files, in the order of `spans`. A span
    /// without a grant is no error.
    ///
    /// # Errors
    /// [`GrantError::Window`]: the front-end refused an unmap, and that span and all later spans
    /// are unchanged. Or a span lies in the middle of a map, whose two remaining parts would be
    /// too many maps ([`ShowError::TooMany`]): then only that span is unchanged.
    pub fn revoke(&self, spans: &[Span]) -> Result<(), GrantError> {
        self.revoke_if(spans, || true)
    }

    fn revoke_if(&self, spans: &[Span], may: impl Fn() -> bool) -> Result<(), GrantError> {
        let mut result = Ok(());
        for Span(range) in spans {
            let removed = {
                let mut window = self.window.take();
                if !may() {
                    return result;
                }
                match self.show_piece(&mut window, *range, None) {
                    Ok(()) => {}
                    Err(e @ ShowError::TooMany(_)) => {
                        result = result.and(Err(e.into()));
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                }
                window.cut_out(*range)
            };
            self.release(&removed);
        }
        result
    }

    /// Removes all grants if `may` returns true. `may` is called under the checkout of the window,
    /// so no grant comes in between.
    ///
    /// # Errors
    /// See [`revoke`](Self::revoke).
    pub fn revoke_all(&self, may: impl Fn() -> bool) -> Result<(), GrantError> {
        self.revoke_if(&[self.whole()], may)
    }

    /// Sends every map again, and keeps the grants: for a front-end that has dropped all maps, or a
    /// new front-end.
    ///
    /// # Errors
    /// See [`MapError`]: the error of the first map that fails. The later maps are not sent. The
    /// grants stay, and the next call sends their maps. Until then call only this function or
    /// [`reset`](Self::reset).
    pub fn map_again(&self) -> Result<(), MapError> {
        let window = self.window.take();
        window
            .layout
            .maps()
            .try_for_each(|(at, piece)| self.mapper.map(at, &piece.file, piece.from, piece.bytes))
    }

    /// Drops all grants and maps without a message: the driver has reset the device, and the
    /// front-end has dropped all maps by itself (docs/front-ends.md Q10).
    pub fn reset(&self) {
        let removed: Vec<_> = {
            let mut window = self.window.take();
            window.layout.forget();
            std::mem::take(&mut window.grants).into_values().collect()
        };
        self.release(&removed);
    }

    /// Releases removed grants: entries without another write grant are written back a last time,
    /// and entries without another grant are deleted (behaviour 9).
    pub(super) fn release(&self, removed: &[Grant]) {
        for grant in removed {
            // Another thread must not truncate the file during the last flush: the flush would
            // touch pages behind the end of the file.
            let _shared = grant.space.tracks().then(|| grant.space.invalidate_lock.read());
            lock(&grant.space.coverage).remove(grant.first(), grant.last(), grant.access);
            if let Err(e) = self.clean_or_drop(&grant.space, grant.first(), grant.last()) {
                warn!("the last write-back of a removed grant failed, its stores may be lost: {e}");
            }
        }
    }
}
