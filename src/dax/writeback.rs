// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: writeback (behaviours 9 to 11). Knows no window and no extents.

use std::io;

use super::engine::{Engine, Space};
use super::entries::Held;
use super::entry::{Entry, PAGE_BYTES, PageIndex};
use super::index::Mark;
use super::sync::lock;
use super::trace::trace_dax;
use crate::persist::{LineFlush, Persist};
use crate::support::failpoint;
use crate::window::{FileOffset, FileRange};

/// Number of entries that one batch writes back, looked up under one hold of the index lock. (Linux
/// 4.x fs/dax.c writes back PAGEVEC_SIZE entries, 14, at once.)
const BATCH: usize = 64;
/// Number of entries that are tagged under one hold of the index lock. (Linux 4.x fs/dax.c tags
/// 4096 at once.)
const TAG_BATCH: u64 = 4096;

/// A locked entry that is marked [`Mark::Writeback`] until this value is dropped.
struct Flushing<'a> {
    held: Held<'a>,
    /// A write grant covers a page of the entry.
    written: bool,
}

impl Drop for Flushing<'_> {
    fn drop(&mut self) {
        self.held.mark(Mark::Writeback, false);
    }
}

impl Engine {
    /// Makes durable what the guest has stored to pages `first..=last` before the call.
    ///
    /// Where the kernel tracks dirty pages this is one sync of the whole file. Else its cost is
    /// proportional to the number of dirty entries in the range, and it ends even if other threads
    /// dirty entries meanwhile.
    ///
    /// # Errors
    /// The error of the sync or flush. It is final: every later call fails too.
    pub fn writeback(&self, space: &Space, first: PageIndex, last: PageIndex) -> io::Result<()> {
        self.check_failed(space)?;
        let lines = match &space.persist {
            Persist::Kernel(kernel) => return self.sync_by(space, || kernel.sync()),
            Persist::Lines(lines) => &**lines,
        };
        // The read lock excludes a punch or truncation by another thread, which would delete
        // entries that this thread has tagged, and re-create them without the tag.
        let _shared = space.invalidate_lock.read();
        trace_dax!(writeback_range, space, first, "last={:#x}", last.0);
        self.tag(space, first, last);
        let mut at = first;
        loop {
            // Behaviour 11: each batch starts behind the last entry of the one before.
            let mut batch = self.batch(space, at, last);
            let Some((start, entry)) = batch.last() else { break };
            at = *start + entry.order().pages();
            if failpoint::is_on("skips-the-last-entry") {
                batch.pop();
            }
            self.writeback_batch(space, lines, &batch)?;
        }
        self.wait_for_others(space, first, last);
        trace_dax!(writeback_range_done, space, first, "last={:#x}", last.0);
        // Another thread's writeback may have taken entries that this thread tagged, and failed.
        self.check_failed(space)
    }

    /// Makes durable what the guest has stored to the file. `sync` syncs what the kernel knows to
    /// be dirty, through an open file description other than the space's own.
    ///
    /// # Errors
    /// See [`writeback`](Self::writeback).
    pub fn writeback_by(
        &self,
        space: &Space,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if let Persist::Kernel(kernel) = &space.persist {
            // The kernel reports lost pages once through each open file description that was open
            // before the loss. Either of the two may be the older one, so both are checked.
            return self.sync_by(space, || sync().and_then(|()| kernel.check()));
        }
        self.writeback(space, PageIndex(0), PageIndex::LAST)?;
        self.sync_by(space, sync)
    }

    /// Calls `sync`, which makes durable what the kernel knows to be dirty. Notes its failure as
    /// final.
    ///
    /// # Errors
    /// See [`writeback`](Self::writeback).
    fn sync_by(&self, space: &Space, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check_failed(space)?;
        self.counters.syncs.add(1);
        self.note(space, sync())
    }

    /// Behaviour 10: waits for entries that other threads write back. Thread A tags an entry;
    /// thread B, also in a writeback, clears ToWrite and begins to flush; then A searches for
    /// ToWrite and does not find the entry, although B has not fenced it yet. (Linux 4.x does not
    /// wait here.)
    fn wait_for_others(&self, space: &Space, first: PageIndex, last: PageIndex) {
        let mut at = first;
        loop {
            let index = space.entries.index();
            let Some((start, entry)) = index.next(at, last, Some(Mark::Writeback)) else { break };
            drop(space.entries.look(index, start));
            space.entries.pass_on(start);
            at = start + entry.order().pages();
        }
    }

    fn tag(&self, space: &Space, first: PageIndex, last: PageIndex) {
        let mut at = Some(first);
        while let Some(from) = at {
            (_, at) = space.entries.index().tag_for_writeback(from, last, TAG_BATCH);
        }
    }

    fn batch(&self, space: &Space, first: PageIndex, last: PageIndex) -> Vec<(PageIndex, Entry)> {
        let mut batch = Vec::with_capacity(BATCH);
        let index = space.entries.index();
        let mut at = first;
        while batch.len() < BATCH
            && let Some((start, entry)) = index.next(at, last, Some(Mark::ToWrite))
        {
            batch.push((start, entry));
            at = start + entry.order().pages();
        }
        batch
    }

    /// Flushes the entries, then fences once for all of them. Their lines are durable only after
    /// the fence, so all entries stay locked until then. This causes no deadlock: all writebacks
    /// lock their entries in the order of the file, and any other thread holds one entry at most.
    fn writeback_batch(
        &self,
        space: &Space,
        lines: &dyn LineFlush,
        batch: &[(PageIndex, Entry)],
    ) -> io::Result<()> {
        let mut flushing = Vec::with_capacity(batch.len());
        for (start, entry) in batch {
            flushing.extend(self.begin_writeback(space, lines, *start, *entry)?);
        }
        if flushing.is_empty() {
            return Ok(());
        }
        if !failpoint::is_on("dropped-fence") {
            lines.fence();
        }
        self.counters.fences.add(1);
        for Flushing { held, written } in &flushing {
            let pages = held.entry().order().pages();
            self.counters.flushes.add(1);
            trace_dax!(writeback_one, space, held.start(), "pages={pages}");
            if !written {
                held.mark(Mark::Dirty, false);
            }
        }
        Ok(())
    }

    /// Behaviour 10, up to the fence. None if the entry needs no flush any more.
    fn begin_writeback<'a>(
        &self,
        space: &'a Space,
        lines: &dyn LineFlush,
        page: PageIndex,
        seen: Entry,
    ) -> io::Result<Option<Flushing<'a>>> {
        let entries = &space.entries;
        let (mut index, found) = entries.look(entries.index(), page);
        let Some((start, entry)) = found else { return Ok(None) };
        // Nothing to flush if the entry was replaced by one of another block, or if another
        // thread's writeback has cleared ToWrite. A hole is never flushed, whatever its marks
        // (behaviour 6).
        let moved = entry.block() != seen.block();
        if moved || !entry.is_real() || !index.is_marked(start, Mark::ToWrite) {
            drop(index);
            entries.pass_on(start);
            return Ok(None);
        }
        let held = entries.hold(&mut index, start, entry);
        // ToWrite can be cleared before the flush: another thread's writeback that comes to this
        // entry waits for its lock, and so for the fence.
        index.set_mark(start, Mark::ToWrite, false);
        index.set_mark(start, Mark::Writeback, true);
        drop(index);
        // Behaviour 9: the daemon can't write-protect the guest's view. Under a write grant the
        // guest may store again at once, so the entry stays dirty until its last write grant is
        // released. The coverage is read before the flush: under a grant that is released during
        // the flush, the guest may have stored to a line after it was flushed.
        let last = entry.order().last(start);
        let written = lock(&space.coverage).any(start, last, |count| count.writes > 0);
        let flushing = Flushing { held, written };
        // The whole entry is flushed, also if the range of the writeback covers only a part of it;
        // but nothing behind the end of a file that was truncated. A failure is noted before the
        // entry is unlocked: a thread in wait_for_others() reads it after the unlock.
        let end = FileOffset(space.known_bytes().next_multiple_of(PAGE_BYTES));
        let range = FileRange::between(start.byte(), last.next().byte().min(end));
        if !range.is_empty() {
            self.note(space, lines.flush(range))?;
            self.counters.bytes_written_back.add(range.bytes);
        }
        Ok(Some(flushing))
    }

    /// Updates the entries of `first..=last`, which have lost a grant: flushes and cleans those
    /// without a write grant, and deletes those without any grant.
    pub(super) fn clean_or_drop(
        &self,
        space: &Space,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        let mut result = Ok(());
        let mut at = first;
        loop {
            let Some((start, entry)) = space.entries.index().next(at, last, None) else { break };
            let end = entry.order().last(start);
            at = end.next();
            let (covered, written) = {
                let coverage = lock(&space.coverage);
                (
                    coverage.any(start, end, |count| count.reads + count.writes > 0),
                    coverage.any(start, end, |count| count.writes > 0),
                )
            };
            if !written {
                let last_flush = self.clean_one(space, start);
                result = result.and(last_flush);
            }
            if !covered {
                self.drop_uncovered(space, start);
            }
        }
        result
    }

    /// Flushes one entry if it is dirty. Where the kernel tracks dirty pages, no entry is dirty.
    pub(super) fn clean_one(&self, space: &Space, start: PageIndex) -> io::Result<()> {
        let Some(lines) = space.lines() else { return Ok(()) };
        let entry = {
            let mut index = space.entries.index();
            if !index.is_marked(start, Mark::Dirty) {
                return Ok(());
            }
            // An earlier failure is final, so no flush is tried.
            self.check_failed(space)?;
            index.set_mark(start, Mark::ToWrite, true);
            index.get(start)
        };
        match entry {
            Some((start, entry)) => self.writeback_batch(space, lines, &[(start, entry)]),
            None => Ok(()),
        }
    }

    /// Deletes an entry if no grant covers it. Another thread may make a grant of its pages at the
    /// same time: that thread counts the grant before it grabs entries. So either this thread sees
    /// the count and keeps the entry, or the other thread finds no entry and makes a new one. An
    /// entry that is dirty here was dirtied by such a grant, which has been removed since; the
    /// thread that releases that grant flushes and deletes the entry.
    fn drop_uncovered(&self, space: &Space, start: PageIndex) {
        let entries = &space.entries;
        let (mut index, found) = entries.look(entries.index(), start);
        if let Some((start, entry)) = found {
            let dirty = index.is_marked(start, Mark::Dirty) && !*lock(&space.failed);
            let held = entries.hold(&mut index, start, entry);
            drop(index);
            let end = entry.order().last(start);
            let wanted =
                lock(&space.coverage).any(start, end, |count| count.reads + count.writes > 0);
            if !wanted && !dirty {
                held.delete();
            }
        }
    }

    pub(super) fn note(&self, space: &Space, done: io::Result<()>) -> io::Result<()> {
        if done.is_err() {
            *lock(&space.failed) = true;
        }
        done
    }

    pub(super) fn check_failed(&self, space: &Space) -> io::Result<()> {
        if space.has_failed() {
            return Err(io::Error::other("an earlier write-back of this file failed"));
        }
        Ok(())
    }
}
