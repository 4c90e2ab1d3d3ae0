// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: changes of a file's length and holes under live grants (behaviours 5 and 12).
//!
//! The guest sends no SETUPMAPPING when a file grows, and no REMOVEMAPPING when it shrinks. So the
//! engine changes the window itself: a guest's access to a mapped page behind the end of the file
//! is SIGBUS in the VMM, and kills the VM.

use std::io;

use super::engine::{Engine, Space};
use super::entry::{PAGE_BYTES, PageIndex};
use super::extent::Access;
use super::grant::{Grant, GrantError, Window, extent_of};
use super::rw::write_back_pages;

use super::sync::{Arc, CheckedOut, lock};
use crate::window::{FileOffset, FileRange, WindowBytes, WindowOffset, WindowRange};

/// The effect of a change of length on live grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resized {
    /// The file ends inside a page that a live grant covers, and the front-end maps whole pages
    /// only (docs/front-ends.md Q6). The window does not show that page: the guest must not use
    /// it through the grant.
    pub tail_hidden: bool,
}

impl Engine {
    /// Sets the file's length to `bytes`. Pages that will lie behind the end are unmapped *before*
    /// the file shrinks; new pages are mapped after it has grown.
    ///
    /// # Errors
    /// The front-end refused a map or unmap, or a call on the file failed (ftruncate, fstat,
    /// fallocate, a flush). The window then shows the file's actual length, except for maps and
    /// unmaps that the front-end refused.
    pub fn resize(&self, space: &Arc<Space>, bytes: u64) -> Result<Resized, GrantError> {
        self.resize_by(space, bytes, || space.source.set_bytes(bytes)).map(|((), resized)| resized)
    }

    /// Like [`resize`](Self::resize), but calls `change` to set the file's length to `bytes`.
    ///
    /// # Errors
    /// See [`resize`](Self::resize).
    pub fn resize_by<T>(
        &self,
        space: &Arc<Space>,
        bytes: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> Result<(T, Resized), GrantError> {
        if bytes > i64::MAX as u64 {
            return Err(GrantError::Invalid("the length exceeds the largest file offset"));
        }
        let _alone = space.invalidate_lock.write();
        let old = space.source.file_bytes()?;
        let mappable = space.source.mappable_bytes(bytes);
        let clipped = if bytes < old { self.unmap_beyond(space, mappable) } else { Ok(()) };
        let done = clipped.and_then(|()| Ok(change()?));
        // Also after an error: this maps the pages again that were unmapped in vain.
        let kept = old.min(space.source.file_bytes()?);
        let followed = self.sync_to_length(space, kept, PageIndex::of(FileOffset(kept)).chunk());
        done.and_then(|done| Ok((done, followed?)))
    }

    /// Calls `change`, which may change the file's length and blocks, but must not make the file
    /// shorter than `at_least` bytes. Then updates the window and the entries.
    ///
    /// # Errors
    /// The error of `change`; or the front-end refused a map or unmap, or a call on the file
    /// failed.
    pub fn change<T>(
        &self,
        space: &Arc<Space>,
        at_least: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> Result<T, GrantError> {
        let _alone = space.invalidate_lock.write();
        let old = space.source.file_bytes()?;
        if at_least < old {
            self.unmap_beyond(space, space.source.mappable_bytes(at_least))?;
        }
        let done = change();
        let bytes = space.source.file_bytes()?;
        let followed = self.sync_to_length(space, bytes.min(at_least), PageIndex(0));
        let done = done?;
        followed?;
        let grown = FileRange::between(FileOffset(old), FileOffset(bytes));
        if let Some(lines) = space.lines().filter(|_| !grown.is_empty()) {
            // `change` has written the bytes by which the file has grown. They are flushed here, so
            // no entry has to be dirty.
            self.check_failed(space)?;
            let (first, last) = grown.pages();
            self.note(space, write_back_pages(lines, first, last))?;
        }
        Ok(done)
    }

    /// Updates the window and the entries after the file's length was changed outside of the
    /// engine, for example by another process on the host.
    ///
    /// # Errors
    /// See [`resize`](Self::resize).
    pub fn resized(&self, space: &Arc<Space>) -> Result<Resized, GrantError> {
        let _alone = space.invalidate_lock.write();
        self.unmap_beyond(space, space.source.mappable_bytes(space.source.file_bytes()?))?;
        // The former length is not known: renew the entries of all grants.
        self.sync_to_length(space, space.source.file_bytes()?, PageIndex(0))
    }

    /// Checks whether another program has changed the file's length. If the file has become
    /// shorter, unmaps each page behind its end: the guest may not know the new length yet, and
    /// its access to such a page would kill the VMM. If the file has grown, maps the new pages.
    ///
    /// # Errors
    /// The front-end refused a map or unmap, or a call on the file failed (fstat, fallocate, a
    /// flush).
    pub fn look_again(&self, space: &Arc<Space>) -> Result<(), GrantError> {
        // Nearly always no other program has changed the length. Then the invalidate lock, for
        // which requests would wait, is not taken.
        if space.source.file_bytes()? == space.known_bytes() {
            return Ok(());
        }
        let _alone = space.invalidate_lock.write();
        let known = space.known_bytes();
        let bytes = space.look()?;
        if bytes > known {
            self.sync_to_length(space, known, PageIndex::of(FileOffset(known)).chunk())?;
        } else if bytes < known {
            self.unmap_beyond(space, bytes.next_multiple_of(PAGE_BYTES))?;
            self.delete_entries(space, behind(bytes))?;
        }
        Ok(())
    }

    /// Unmaps each page of the file from byte `end`, a multiple of the page size, on.
    fn unmap_beyond(&self, space: &Space, end: u64) -> Result<(), GrantError> {
        let mut window = self.window.take();
        let (file, end) = (space.source.file(), FileOffset(end));
        Ok(window.layout.unmap_beyond(file, end, &*self.mapper, self.most_maps())?)
    }

    /// Updates the window and the entries to the file's new length: deletes the entries behind its
    /// first `kept` bytes, and faults in the granted pages from `from` on.
    pub(super) fn sync_to_length(
        &self,
        space: &Arc<Space>,
        kept: u64,
        from: PageIndex,
    ) -> Result<Resized, GrantError> {
        let stale = PageIndex::behind(kept);
        space.look()?;
        let mut window = self.window.take();
        // Behaviour 16: pages get blocks, and entries that track dirty pages, before the window
        // shows them. This includes pages by which another program has extended the file: the
        // window does not show them yet.
        let from = unshown(&window, space).map_or(from, |page| page.min(from));
        let allocated = self.allocate(&window, space, from, PageIndex::LAST);
        let deleted = self.delete_entries(space, behind(kept));
        let last = if allocated.is_ok() {
            Some(PageIndex::LAST)
        } else {
            stale.0.checked_sub(1).map(PageIndex)
        };
        if let Some(last) = last {
            self.renew(&window, space, from, last)?;
        }
        allocated?;
        let mut tail_hidden = false;
        for (at, grant) in grants_of(&window, space) {
            match extent_of(&grant) {
                Ok((_, mapped)) => self.show_grant(&mut window, at, &grant, mapped)?,
                Err(GrantError::PastEof) => continue,
                Err(GrantError::Tail) => {
                    tail_hidden = true;
                    let mappable = space.source.mappable_bytes(space.source.file_bytes()?);
                    let mapped = FileRange::between(grant.from, FileOffset(mappable)).bytes;
                    let mapped = WindowBytes(mapped).min(grant.bytes);
                    self.show_grant(&mut window, at, &grant, mapped)?;
                }
                Err(e) => return Err(e),
            }
        }
        deleted?;
        Ok(Resized { tail_hidden })
    }

    /// Shows the part of a grant by which the file has grown. That part gets a map of its own, so
    /// that the part which is mapped already stays mapped all the time.
    fn show_grant(
        &self,
        window: &mut CheckedOut<'_, Window>,
        at: WindowOffset,
        grant: &Grant,
        mapped: WindowBytes,
    ) -> Result<(), GrantError> {
        let shown = window.layout.shown_until(grant.range(at));
        if let Some(new) = WindowRange::between(shown, at + mapped) {
            self.show_piece(window, new, Some((&grant.part(at, new), new.bytes)))?;
        }
        Ok(())
    }

    /// Makes `range` of the file read as zeros (behaviours 5 and 12). Pages without a write grant
    /// become holes. Pages with a write grant keep their blocks, since the guest's store to a hole
    /// on a full disk would be SIGBUS in the VMM.
    ///
    /// # Errors
    /// [`GrantError::Invalid`] if the range is empty or ends behind the largest file offset;
    /// [`GrantError::Source`] if fstat, fallocate or a flush failed.
    pub fn punch(&self, space: &Arc<Space>, range: FileRange) -> Result<(), GrantError> {
        let Some(end) = range.checked_end() else {
            return Err(GrantError::Invalid("the range ends behind the largest file offset"));
        };
        if range.is_empty() {
            return Err(GrantError::Invalid("the range to punch is empty"));
        }
        let _alone = space.invalidate_lock.write();
        let inside = end.min(FileOffset(space.source.file_bytes()?));
        let range = FileRange::between(range.from, inside);
        if range.is_empty() {
            return Ok(());
        }
        let (first, last) = range.pages();
        let (first, last) = (first.chunk(), last.chunk_last());
        self.allocate(&self.window.take(), space, first, last)?;
        self.zero(space, range)?;
        let deleted = self.delete_entries(space, range);
        // Under a write grant the new entries are dirty: the remaining parts of a deleted PMD entry
        // as before, and the zeroed pages.
        self.renew(&self.window.take(), space, first, last)?;
        Ok(deleted?)
    }

    fn zero(&self, space: &Space, range: FileRange) -> io::Result<()> {
        let (first, last) = range.pages();
        let runs = lock(&space.coverage).runs(first, last);
        let (mut at, end) = (range.from, range.end());
        for (start, stop, count) in runs {
            if count.writes > 0 {
                let kept = FileRange::of_pages(start, stop);
                let (from, until) = (kept.from.max(range.from), kept.end().min(end));
                space.source.zero(FileRange::between(at, from), false)?;
                space.source.zero(FileRange::between(from, until), true)?;
                at = until;
            }
        }
        space.source.zero(FileRange::between(at, end), false)
    }

    /// Deletes the entries that cover a byte of `range`. An entry that extends beyond `range` is
    /// written back first: another thread may be releasing the grant under which the guest stored
    /// to the part beyond, and then no new dirty entry is made for that part.
    fn delete_entries(&self, space: &Space, range: FileRange) -> io::Result<()> {
        let (first, last) = range.pages();
        let mut result = Ok(());
        let mut at = first;
        loop {
            let Some((start, entry)) = space.entries.index().next(at, last, None) else { break };
            at = start + entry.order().pages();
            if start.byte() < range.from || at.byte() > range.end() {
                result = result.and(self.clean_one(space, start));
            }
            space.entries.delete(start);
        }
        result
    }

    /// Allocates blocks for the pages of `first..=last` that live write grants cover.
    pub(super) fn allocate(
        &self,
        window: &Window,
        space: &Arc<Space>,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        for (_, grant, first, last) in wanted(window, space, first, last)? {
            if grant.access == Access::Write {
                space.source.allocate(first, last)?;
            }
        }
        Ok(())
    }

    /// Re-creates the entries of the pages of `first..=last` that live grants cover: the guest
    /// sends no further SETUPMAPPING for them.
    pub(super) fn refault(
        &self,
        window: &Window,
        space: &Arc<Space>,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        wanted(window, space, first, last)?
            .iter()
            .try_for_each(|(at, grant, first, last)| self.fault(grant, *at, *first, *last))
    }

    /// Like [`refault`](Self::refault), after entries were deleted. If it fails, no entry tracks
    /// the guest's later stores. Then every later writeback fails, so that no flush is answered
    /// with success.
    fn renew(
        &self,
        window: &Window,
        space: &Arc<Space>,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        let done = self.refault(window, space, first, last);
        if space.tracks() { self.note(space, done) } else { done }
    }
}

/// The range behind the last page of a file of `bytes` bytes.
fn behind(bytes: u64) -> FileRange {
    FileRange::between(PageIndex::behind(bytes).byte(), FileOffset::MAX)
}

/// The live grants of one file, with their window offsets. The caller holds the checkout of the
/// window for as long as it uses them, since another thread may remove them afterwards.
fn grants_of(window: &Window, space: &Arc<Space>) -> Vec<(WindowOffset, Grant)> {
    let of_space = window.grants.iter().filter(|(_, grant)| Arc::ptr_eq(&grant.space, space));
    of_space.map(|(at, grant)| (*at, grant.clone())).collect()
}

/// The live grants that cover pages of `first..=last` inside the file: window offset, grant, first
/// and last covered page.
fn wanted(
    window: &Window,
    space: &Arc<Space>,
    first: PageIndex,
    last: PageIndex,
) -> io::Result<Vec<(WindowOffset, Grant, PageIndex, PageIndex)>> {
    let Some(end) = space.end()?.0.checked_sub(1) else { return Ok(Vec::new()) };
    let wanted = grants_of(window, space).into_iter().map(|(at, grant)| {
        let (start, stop) = (grant.first().max(first), grant.last().min(last).min(PageIndex(end)));
        (at, grant, start, stop)
    });
    Ok(wanted.filter(|(.., start, stop)| start <= stop).collect())
}

/// The first chunk of the file that a live grant does not show completely.
fn unshown(window: &Window, space: &Arc<Space>) -> Option<PageIndex> {
    let shown = grants_of(window, space).into_iter().map(|(at, grant)| {
        let until = window.layout.shown_until(grant.range(at));
        PageIndex::of(grant.from + (until - at)).chunk()
    });
    shown.min()
}
