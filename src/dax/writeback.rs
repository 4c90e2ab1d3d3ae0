// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: writeback (behaviours 9 to 11). Knows no window and no extents.

use std::io;

use super::engine::{Engine, Space};
use super::entry::{Entry, PAGE_BYTES, PageIndex};
use super::index::Mark;
use super::space::Held;
use super::sync::lock;
use super::trace::trace_dax;
use crate::persist::{LineFlush, Persist};
use crate::support::failpoint;
use crate::window::{FileOffset, FileRange};

/// Entries looked up at once, and tagged at once: how long the index lock is held at most.
/// Linux 4.x fs/dax.c writes back PAGEVEC_SIZE (14) entries at once, and tags 4096.
const BATCH: usize = 64;
const TAG_BATCH: u64 = 4096;

/// An entry whose lines are on their way to the memory: held, and marked as such.
struct Flushing<'a> {
    held: Held<'a>,
    /// It lies under a write grant.
    written: bool,
}

impl Drop for Flushing<'_> {
    fn drop(&mut self) {
        self.held.mark(Mark::Writeback, false);
    }
}

impl Engine {
    /// Makes durable what the guest has stored in `first..=last` before the call.
    ///
    /// Where the kernel knows what is dirty this is one sync, whatever the range. Else it costs by
    /// the dirty entries in the range, and ends even while others go on dirtying.
    ///
    /// # Errors
    /// The first failure, and the same kind of failure in every later call (it is final).
    pub fn writeback(&self, space: &Space, first: PageIndex, last: PageIndex) -> io::Result<()> {
        self.check_failed(space)?;
        let lines = match &space.persist {
            Persist::Kernel(kernel) => return self.sync_by(space, || kernel.sync()),
            Persist::Lines(lines) => &**lines,
        };
        // A punch or truncate beside us would delete entries that we have tagged, and make them
        // anew without the tag.
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
        // Another flusher may have taken on our entries, and failed.
        self.check_failed(space)
    }

    /// Makes durable what the guest has stored in the file, where `sync` does so through another
    /// open file than the space's own for all that the kernel knows to be dirty.
    ///
    /// # Errors
    /// See [`writeback`](Self::writeback).
    pub fn writeback_by(
        &self,
        space: &Space,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if let Persist::Kernel(kernel) = &space.persist {
            // The kernel tells of lost pages once through each open file, and either may be the
            // older one.
            return self.sync_by(space, || sync().and_then(|()| kernel.check()));
        }
        self.writeback(space, PageIndex(0), PageIndex::LAST)?;
        self.sync_by(space, sync)
    }

    /// Lets `sync` make durable what the kernel knows to be dirty, and remembers a failure like one
    /// of our own.
    ///
    /// # Errors
    /// See [`writeback`](Self::writeback).
    fn sync_by(&self, space: &Space, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check_failed(space)?;
        self.counters.syncs.add(1);
        self.note(space, sync())
    }

    /// Behaviour 10: an entry whose ToWrite another flusher cleared after we had tagged, and before
    /// we searched, was not found above; but it may still be at it. (Linux 4.x does not wait here.)
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

    /// Flushes the entries, then fences once for all of them: only then are their lines where they
    /// belong, so all stay locked until then. They are locked in the order of the file, and whoever
    /// else holds an entry waits for no second one: nobody waits in a circle.
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

    /// Behaviour 10, up to the fence. None for what is not to be flushed any more.
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
        // Its block moved, or another flusher was here: done, or not ours any more. A hole has
        // nothing to write, whatever its marks say (behaviour 6).
        let moved = entry.block() != seen.block();
        if moved || !entry.is_real() || !index.is_marked(start, Mark::ToWrite) {
            drop(index);
            entries.pass_on(start);
            return Ok(None);
        }
        let held = entries.hold(&mut index, start, entry);
        // Cleared before the flush, and safe: whoever comes for this entry now waits for its lock.
        index.set_mark(start, Mark::ToWrite, false);
        index.set_mark(start, Mark::Writeback, true);
        drop(index);
        // Behaviour 9: we can't write-protect the guest's view. Under a write grant there may be
        // new dirty lines at once, so the entry stays dirty until the last such grant is gone.
        // Looked up before the flush: a grant that goes during it may have stored behind it.
        let last = entry.order().last(start);
        let written = lock(&space.coverage).any(start, last, |count| count.writes > 0);
        let flushing = Flushing { held, written };
        // All of it, also where only a part was asked for; but where the file has just been cut off
        // there is nothing any more. A failure is noted before the entry is unlocked: whoever waits
        // for it looks at that next.
        let end = FileOffset(space.known_bytes().next_multiple_of(PAGE_BYTES));
        let range = FileRange::between(start.byte(), last.next().byte().min(end));
        if !range.is_empty() {
            self.note(space, lines.flush(range))?;
            self.counters.bytes_written_back.add(range.bytes);
        }
        Ok(Some(flushing))
    }

    /// Entries of `first..=last` that have lost a grant: those without a write grant become clean,
    /// after a last flush, and those without any grant go.
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

    /// Flushes one entry if it is dirty. Where the kernel knows what is dirty, no entry is.
    pub(super) fn clean_one(&self, space: &Space, start: PageIndex) -> io::Result<()> {
        let Some(lines) = space.lines() else { return Ok(()) };
        let entry = {
            let mut index = space.entries.index();
            if !index.is_marked(start, Mark::Dirty) {
                return Ok(());
            }
            // A failure is final: there is nothing to be had of another flush.
            self.check_failed(space)?;
            index.set_mark(start, Mark::ToWrite, true);
            index.get(start)
        };
        match entry {
            Some((start, entry)) => self.writeback_batch(space, lines, &[(start, entry)]),
            None => Ok(()),
        }
    }

    /// Deletes an entry that no grant covers any more. A grant that comes meanwhile is counted
    /// before it looks for entries, so either we see it here, or it finds nothing and makes its
    /// own. One that is dirty (again) belongs to such a grant that has gone, too, and is about to
    /// settle.
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
