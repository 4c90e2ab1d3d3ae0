// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: writeback (behaviours 9 to 11). Knows no window and no extents.

use std::io;

use super::engine::{Engine, Space};
use super::entry::{Entry, PageIndex};
use super::index::Mark;
use super::sync::lock;
use super::trace::trace_dax;

/// Entries looked up at once, and tagged at once: how long the index lock is held at most.
/// The kernel's PAGEVEC_SIZE of the seed is 14; tagging goes by 4096.
const BATCH: usize = 64;
const TAG_BATCH: u64 = 4096;

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
        if space.persist.kernel_tracks() {
            return self.sync_by(space, || space.persist.sync());
        }
        // A punch or truncate beside us would delete entries that we have tagged, and make them anew
        // without the tag.
        let _shared = space.gate.share();
        trace_dax!(writeback_range, space, first, "last={:#x}", last.0);
        self.tag(space, first, last);
        let mut at = first;
        loop {
            // Behaviour 11: each batch starts behind the last entry of the one before.
            let batch = self.batch(space, at, last);
            let Some((start, entry)) = batch.last() else { break };
            at = PageIndex(start.0 + entry.order().pages());
            for (start, entry) in &batch {
                self.writeback_one(space, *start, *entry)?;
            }
        }
        self.wait_for_others(space, first, last);
        trace_dax!(writeback_range_done, space, first, "last={:#x}", last.0);
        // Another flusher may have taken on our entries, and failed.
        self.check_failed(space)
    }

    /// Lets `sync` make durable what the kernel knows to be dirty, and remembers a failure like one of
    /// our own.
    ///
    /// # Errors
    /// See [`writeback`](Self::writeback).
    pub fn sync_by(&self, space: &Space, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        self.check_failed(space)?;
        self.counters.syncs.add(1);
        self.note(space, sync())
    }

    /// Behaviour 10: an entry whose ToWrite another flusher cleared after we had tagged, and before we
    /// searched, was not found above; but it may still be at it. (The seed does not wait here.)
    fn wait_for_others(&self, space: &Space, first: PageIndex, last: PageIndex) {
        let mut at = first;
        loop {
            let index = space.entries.index();
            let Some((start, entry)) = index.next(at, last, Some(Mark::Writeback)) else { break };
            drop(space.entries.look(index, start));
            space.entries.pass_on(start);
            at = PageIndex(start.0 + entry.order().pages());
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
            at = PageIndex(start.0 + entry.order().pages());
        }
        batch
    }

    /// Behaviour 10.
    fn writeback_one(&self, space: &Space, page: PageIndex, seen: Entry) -> io::Result<()> {
        let entries = &space.entries;
        let (mut index, found) = entries.look(entries.index(), page);
        let Some((start, entry)) = found else { return Ok(()) };
        // Its block moved, or another flusher was here: done, or not ours any more. A hole has
        // nothing to write, whatever its marks say (behaviour 6).
        let moved = entry.block() != seen.block();
        if moved || !entry.is_real() || !index.is_marked(start, Mark::ToWrite) {
            drop(index);
            entries.pass_on(start);
            return Ok(());
        }
        let held = entries.hold(&mut index, start, entry);
        // Cleared before the flush, and safe: whoever comes for this entry now waits for its lock.
        index.set_mark(start, Mark::ToWrite, false);
        index.set_mark(start, Mark::Writeback, true);
        drop(index);
        // Behaviour 9: we can't write-protect the guest's view. Under a write grant there may be
        // new dirty lines at once, so the entry stays dirty until the last such grant is gone.
        // Looked up before the flush: a grant that goes during it may have stored behind it.
        let written = {
            let last = PageIndex(start.0 + entry.order().pages() - 1);
            lock(&space.coverage).any(start, last, |count| count.writes > 0)
        };
        // All of it, also where only a part was asked for.
        let bytes = entry.order().pages() * super::entry::PAGE_BYTES;
        // A failure is noted before the entry is unlocked: whoever waits for it looks at that next.
        let flushed = self.note(space, space.persist.flush(start.byte(), bytes));
        held.mark(Mark::Writeback, false);
        flushed?;
        self.counters.flushes.add(1);
        self.counters.bytes_written_back.add(bytes);
        trace_dax!(writeback_one, space, start, "pages={}", entry.order().pages());
        if !written {
            held.mark(Mark::Dirty, false);
        }
        drop(held);
        Ok(())
    }

    /// Entries of `first..=last` that have lost a grant: those without a write grant become clean,
    /// after a last flush, and those without any grant go.
    pub(super) fn settle(
        &self,
        space: &Space,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        let mut result = Ok(());
        let mut at = first;
        loop {
            let Some((start, entry)) = space.entries.index().next(at, last, None) else { break };
            let end = PageIndex(start.0 + entry.order().pages() - 1);
            at = end.next();
            let (covered, written) = {
                let coverage = lock(&space.coverage);
                (
                    coverage.any(start, end, |count| count.reads + count.writes > 0),
                    coverage.any(start, end, |count| count.writes > 0),
                )
            };
            if !written && space.tracks() {
                let last_flush = self.clean_one(space, start);
                result = result.and(last_flush);
            }
            if !covered {
                self.forget(space, start);
            }
        }
        result
    }

    /// Flushes one entry if it is dirty.
    pub(super) fn clean_one(&self, space: &Space, start: PageIndex) -> io::Result<()> {
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
            Some((start, entry)) => self.writeback_one(space, start, entry),
            None => Ok(()),
        }
    }

    /// Deletes an entry that no grant covers any more. A grant that comes meanwhile is counted
    /// before it looks for entries, so either we see it here, or it finds nothing and makes its own.
    /// One that is dirty (again) belongs to such a grant that has gone, too, and is about to settle.
    fn forget(&self, space: &Space, start: PageIndex) {
        let entries = &space.entries;
        let (mut index, found) = entries.look(entries.index(), start);
        if let Some((start, entry)) = found {
            let dirty = index.is_marked(start, Mark::Dirty) && !*lock(&space.failed);
            let held = entries.hold(&mut index, start, entry);
            drop(index);
            let end = PageIndex(start.0 + entry.order().pages() - 1);
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
