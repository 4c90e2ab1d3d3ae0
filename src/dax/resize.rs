// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the file changes under live grants: its length, and its holes (behaviours 5 and
//! 12).
//!
//! The guest asks for nothing again when a file grows, and gives nothing back when it shrinks. So
//! the window must follow: a page that is mapped behind the end of the file is SIGBUS in the VMM,
//! and the whole VM dies of it.

use std::io;

use super::engine::{Engine, Space};
use super::entry::{PAGE_BYTES, PageIndex};
use super::extent::Access;
use super::grant::{Grant, GrantError, Window, extent_of};
use super::rw::write_back_pages;

use super::sync::{Arc, CheckedOut, lock};
use crate::window::{FileOffset, FileRange, WindowBytes, WindowOffset, WindowRange};

/// What a change of length did to live grants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resized {
    /// The file's last page is not whole, the front-end can't map it, and a live grant covers it:
    /// the guest must not use that grant.
    pub tail_hidden: bool,
}

impl Engine {
    /// Sets the file's length. The window lets go of what will be behind the end *before* the file
    /// shrinks, and shows what is new after it has grown.
    ///
    /// # Errors
    /// The front-end's or the file system's. The window then shows the file as long as it is, as
    /// far as the front-end lets us.
    pub fn resize(&self, space: &Arc<Space>, bytes: u64) -> Result<Resized, GrantError> {
        self.resize_by(space, bytes, || space.source.set_bytes(bytes)).map(|((), resized)| resized)
    }

    /// The same, where it is `change` that sets the file's length to `bytes`.
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
            return Err(GrantError::Invalid("longer than any file"));
        }
        let _alone = space.invalidate_lock.write();
        let old = space.source.file_bytes()?;
        let mappable = space.source.mappable_bytes(bytes);
        let clipped = if bytes < old { self.unmap_beyond(space, mappable) } else { Ok(()) };
        let done = clipped.and_then(|()| Ok(change()?));
        // Also after an error: what the window let go of in vain comes back.
        let kept = old.min(space.source.file_bytes()?);
        let followed = self.sync_to_length(space, kept, PageIndex::of(FileOffset(kept)).chunk());
        done.and_then(|done| Ok((done, followed?)))
    }

    /// Lets `change` do something to the file's length or blocks that never makes it shorter than
    /// `at_least` bytes. The window and the entries follow.
    ///
    /// # Errors
    /// The change's own, or the front-end's after it.
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
            // What it has grown by was written by the change, and no entry need know of it.
            self.check_failed(space)?;
            let (first, last) = grown.pages();
            self.note(space, write_back_pages(lines, first, last))?;
        }
        Ok(done)
    }

    /// The file has grown or shrunk by other hands (a FUSE WRITE behind the end, another process).
    ///
    /// # Errors
    /// See [`resize`](Self::resize).
    pub fn resized(&self, space: &Arc<Space>) -> Result<Resized, GrantError> {
        let _alone = space.invalidate_lock.write();
        self.unmap_beyond(space, space.source.mappable_bytes(space.source.file_bytes()?))?;
        // How long it was before is not known: look at everything that is granted.
        self.sync_to_length(space, space.source.file_bytes()?, PageIndex(0))
    }

    /// Looks whether somebody else has changed the file's length. If it has become shorter, the
    /// window lets go of every page that is behind the end now: the guest may not have heard of it,
    /// and where it touches such a page the VMM dies. If it has grown again, the window shows it
    /// again.
    ///
    /// # Errors
    /// The front-end's or the file system's.
    pub fn look_again(&self, space: &Arc<Space>) -> Result<(), GrantError> {
        // Mostly it is we who changed it, or nobody: then nothing has to wait.
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

    /// Nothing of the file behind byte `end` (a whole page) is in the window any more.
    fn unmap_beyond(&self, space: &Space, end: u64) -> Result<(), GrantError> {
        let mut window = self.window.take();
        let (file, end) = (space.source.file(), FileOffset(end));
        Ok(window.layout.unmap_beyond(file, end, &*self.mapper, self.most_maps())?)
    }

    /// Window and entries follow the file's new length: entries behind its first `kept` bytes are
    /// deleted, and what grants want from `from` on is faulted in.
    pub(super) fn sync_to_length(
        &self,
        space: &Arc<Space>,
        kept: u64,
        from: PageIndex,
    ) -> Result<Resized, GrantError> {
        let stale = PageIndex::behind(kept);
        space.look()?;
        let mut window = self.window.take();
        // Behaviour 16: blocks, and entries that know what is dirty, before the window shows
        // anything. A growth that nobody told of is not shown yet, either.
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

    /// Shows what a grant has got more of by growth: the new part as a map of its own, so that
    /// what is there already is never away for a moment.
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

    /// Behaviour 12 and 5: makes `range` read as zeros. What no write grant covers becomes a hole;
    /// the rest keeps its blocks, since a store to a hole on a full disk would be SIGBUS in the
    /// VMM.
    ///
    /// # Errors
    /// The file system's.
    pub fn punch(&self, space: &Arc<Space>, range: FileRange) -> Result<(), GrantError> {
        let Some(end) = range.checked_end() else {
            return Err(GrantError::Invalid("longer than any file"));
        };
        if range.is_empty() {
            return Err(GrantError::Invalid("nothing to punch"));
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
        // Under a write grant what is left of a split chunk is dirty as before, and the zeros are
        // new.
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

    /// Deletes what covers a byte of `range`. An entry that sticks out is written back before: the
    /// grant under which the rest of it was stored to may be on its way out, and then nobody makes
    /// that rest anew.
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

    /// Gives blocks to what live write grants cover in `first..=last`.
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

    /// Makes the entries anew that live grants want in `first..=last`, each chunk as far as it is
    /// covered: the guest does not fault again.
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

    /// The same where entries were deleted. If that fails, the guest goes on storing where no entry
    /// says so: then never answer that all is durable.
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

/// What lies behind the page with the last byte of a file of `bytes` bytes.
fn behind(bytes: u64) -> FileRange {
    FileRange::between(PageIndex::behind(bytes).byte(), FileOffset::MAX)
}

/// The live grants of one file. Whoever acts on them holds on to the window's turn until it is
/// done: they may be gone right after.
fn grants_of(window: &Window, space: &Arc<Space>) -> Vec<(WindowOffset, Grant)> {
    let of_space = window.grants.iter().filter(|(_, grant)| Arc::ptr_eq(&grant.space, space));
    of_space.map(|(at, grant)| (*at, grant.clone())).collect()
}

/// What of `first..=last`, inside the file, live grants want: window offset, grant, first and last
/// page.
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

/// The first chunk of the file of which a live grant does not show all.
fn unshown(window: &Window, space: &Arc<Space>) -> Option<PageIndex> {
    let shown = grants_of(window, space).into_iter().map(|(at, grant)| {
        let until = window.layout.shown_until(grant.range(at));
        PageIndex::of(grant.from + (until - at)).chunk()
    });
    shown.min()
}
