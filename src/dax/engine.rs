// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: grants: SETUPMAPPING as a fault over a range (behaviours 6, 8, 9, 14 to 16).
//! Knows no FUSE: a grant is a piece of a file, a place in the window, and an access.

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

/// One host file that is or was mapped.
pub struct Space {
    pub(super) id: SpaceId,
    pub(super) entries: Entries,
    pub(super) source: Box<dyn ExtentSource>,
    pub(super) persist: Persist,
    /// Shared by grants; alone for what changes the file's length or blocks. The kernel's
    /// `i_mmap_sem`: whoever has it may do file system calls and front-end round trips.
    pub(super) invalidate_lock: InvalidateLock,
    /// The file's length when we last looked, with the gate in hand: another one now is somebody
    /// else's doing.
    pub(super) known_bytes: AtomicU64,
    pub(super) coverage: Mutex<Coverage>,
    /// The first failure to write back is final (see [`Persist`]).
    pub(super) failed: Mutex<bool>,
}

impl Space {
    /// The entries, for a look.
    pub fn entries(&self) -> &Entries {
        &self.entries
    }

    /// How many entries there are.
    pub fn entry_count(&self) -> u64 {
        self.entries.index().len()
    }

    /// Bytes of memory that the entries take.
    pub fn index_bytes(&self) -> usize {
        self.entries.index().bytes()
    }

    /// Whether nothing of the file is granted.
    pub fn is_idle(&self) -> bool {
        self.granted_runs() == 0
    }

    /// The file behind the entries.
    pub fn source(&self) -> &dyn ExtentSource {
        &*self.source
    }

    /// How many runs of pages are counted as granted.
    pub fn granted_runs(&self) -> usize {
        lock(&self.coverage).runs_kept()
    }

    /// Whether `range` lies inside the file, and live write grants cover all of it: then it has
    /// blocks (behaviour 16), for as long as the caller is in the gate.
    ///
    /// # Errors
    /// The system's.
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

    /// While what this returns is there, no request makes the file shorter. None if one does.
    pub(crate) fn keep_length(&self) -> Option<impl Drop + '_> {
        self.invalidate_lock.try_read()
    }

    /// Forgets that a writeback has failed: all who were promised something have been told.
    pub fn forgive(&self) {
        *lock(&self.failed) = false;
    }

    /// Whether a writeback has failed, or what is dirty is no longer known: every later one fails.
    pub fn has_failed(&self) -> bool {
        *lock(&self.failed)
    }

    /// The first entry at or behind `page`, and whether it is dirty: for a look.
    pub fn next_entry(&self, page: PageIndex) -> Option<(PageIndex, Entry, bool)> {
        let index = self.entries.index();
        let (start, entry) = index.next(page, PageIndex::LAST, None)?;
        Some((start, entry, index.is_marked(start, Mark::Dirty)))
    }

    /// What makes lines durable, where only our entries know what is dirty.
    pub(super) fn lines(&self) -> Option<&dyn LineFlush> {
        match &self.persist {
            Persist::Lines(lines) => Some(&**lines),
            Persist::Kernel(_) => None,
        }
    }

    /// Whether only our entries know what is dirty.
    pub(super) fn tracks(&self) -> bool {
        self.lines().is_some()
    }

    /// The page behind the file's last one.
    pub(super) fn end(&self) -> io::Result<PageIndex> {
        Ok(PageIndex::behind(self.look()?))
    }

    /// The file's length when we last looked.
    pub(super) fn known_bytes(&self) -> u64 {
        self.known_bytes.load(Ordering::Relaxed)
    }

    /// The file's length, from now on the known one.
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
    /// An engine without grants, over a window of `bytes`. It never has more than `most_maps` maps.
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

    /// An address space for a file that has none yet in this engine.
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

    /// How many maps there may be at most.
    pub fn most_maps(&self) -> usize {
        self.most_maps.load(Ordering::Relaxed)
    }

    /// Changes how many maps there may be: other devices of the VM use up the same number (Q2).
    /// Those that are too many already stay.
    pub fn set_most_maps(&self, most_maps: usize) {
        self.most_maps.store(most_maps, Ordering::Relaxed);
    }

    /// What is granted from byte `at` of the window on: of which file, and which bytes of it.
    pub fn granted_at(&self, at: WindowOffset) -> Option<(Arc<Space>, FileRange)> {
        let window = self.window.take();
        let (start, grant) = window.grants.range(..=at).next_back()?;
        let left = WindowRange::between(at, grant.range(*start).end())?;
        Some((grant.space.clone(), grant.part(*start, left).of_file()))
    }

    /// What the engine has done.
    pub fn counters(&self) -> &Counters {
        self.counters.waits.set(self.waits.joined());
        &self.counters
    }

    /// Grants and maps at this moment.
    pub fn sizes(&self) -> (usize, usize) {
        let window = self.window.take();
        (window.grants.len(), window.layout.len())
    }

    /// Checks a range of the window.
    ///
    /// # Errors
    /// [`GrantError::Invalid`].
    pub fn span(&self, at: WindowOffset, bytes: WindowBytes) -> Result<Span, GrantError> {
        let whole = |n: u64| n.is_multiple_of(PAGE_BYTES);
        if bytes.0 == 0 || !whole(at.0) || !whole(bytes.0) {
            return Err(GrantError::Invalid("not whole pages of the window"));
        }
        match at.0.checked_add(bytes.0) {
            Some(end) if end <= self.bytes.0 => Ok(Span(WindowRange::new(at, bytes))),
            _ => Err(GrantError::Invalid("past the end of the window")),
        }
    }

    /// SETUPMAPPING: lets the guest touch `span` of the window, which then shows `space`'s file
    /// from `from` on. What was granted there before is replaced. `may` says whether the guest still
    /// wants it, in the moment in which nothing else can be granted.
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
            return Err(GrantError::Invalid("not whole pages of a file"));
        }
        let shared = space.invalidate_lock.read();
        let (last, mapped) = extent_of(&grant)?;
        if access == Access::Write {
            // Behaviour 16: before anything is promised.
            self.counters.allocations.add(1);
            space.source.allocate(grant.first(), last)?;
        }
        // Counted before it is faulted in: a removal that runs beside it must see that it is
        // wanted.
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

    /// REMOVEMAPPING: takes away what is granted in `spans`, of whatever files, in this order.
    /// Ranges in which nothing is granted are fine.
    ///
    /// # Errors
    /// The front-end's refusal: that range and those behind it are as they were. Or there was no
    /// room for what would be left of a map on both sides of a range: that one is as it was.
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

    /// Takes away all that is granted, if `may` says so in the moment in which nothing else can be.
    ///
    /// # Errors
    /// See [`revoke`](Self::revoke).
    pub fn revoke_all(&self, may: impl Fn() -> bool) -> Result<(), GrantError> {
        self.revoke_if(&[self.whole()], may)
    }

    /// The front-end has dropped all maps, or is a new one, and the grants stay: sends every map
    /// again.
    ///
    /// # Errors
    /// The front-end's, at the first map that it refuses; those behind it are not sent. The grants
    /// stay all the same, so that the next call can send them: until then only that, or a
    /// [reset](Self::reset), makes sense.
    pub fn map_again(&self) -> Result<(), MapError> {
        let window = self.window.take();
        window
            .layout
            .maps()
            .try_for_each(|(at, piece)| self.mapper.map(at, &piece.file, piece.from, piece.bytes))
    }

    /// The front-end has dropped all maps and the guest all grants (a virtio reset, row Q10).
    pub fn reset(&self) {
        let removed: Vec<_> = {
            let mut window = self.window.take();
            window.layout.forget();
            std::mem::take(&mut window.grants).into_values().collect()
        };
        self.release(&removed);
    }

    /// Grants that the guest does not have any more: what only they covered is written back a last
    /// time and forgotten (behaviour 9).
    pub(super) fn release(&self, removed: &[Grant]) {
        for grant in removed {
            // A truncation beside us would take the memory away from under a last flush.
            let _shared = grant.space.tracks().then(|| grant.space.invalidate_lock.read());
            lock(&grant.space.coverage).remove(grant.first(), grant.last(), grant.access);
            if let Err(e) = self.clean_or_drop(&grant.space, grant.first(), grant.last()) {
                warn!("a last write-back failed: {e}");
            }
        }
    }
}
