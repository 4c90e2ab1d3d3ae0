// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the fault over a range of one file: a PMD entry for each chunk that permits one,
//! else PTE entries (behaviours 6, 8, 9 and 15).

use std::io;

use super::engine::{Engine, Space};
use super::entries::Held;
use super::entry::{Entry, Order, PAGE_BYTES, PMD_PAGES, PageIndex};
use super::extent::{Access, Backed, Extent};
use super::grant::Grant;
use super::index::Mark;
use super::trace::trace_dax;
use crate::window::{WindowBytes, WindowOffset};

/// The reason why a chunk got no PMD entry (behaviour 15).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fallback {
    /// The grant covers only a part of the chunk.
    Partial,
    /// The file ends in the chunk.
    Eof,
    /// File offset and window offset differ modulo 2 MiB.
    Window,
    /// The backing can't be mapped by 2 MiB.
    Backing,
    /// The chunk has PTE entries.
    Pte,
    /// The chunk has several extents, or blocks that are not aligned to 2 MiB.
    Extent,
}

/// A fault over pages `first..=last`, which lie inside the file.
struct Fault<'a> {
    engine: &'a Engine,
    space: &'a Space,
    first: PageIndex,
    last: PageIndex,
    access: Access,
    /// File offset and window offset are equal modulo 2 MiB.
    agrees: bool,
    /// The extent that was looked up last.
    extent: Option<Extent>,
}

impl Engine {
    /// Makes entries for pages `first..=last` of a grant that begins at `at` in the window. The
    /// pages must lie inside the file and, for a write grant, have blocks.
    ///
    /// # Errors
    /// The extent look-up failed, or its result is inconsistent. Entries that were made before
    /// stay: the caller releases the grant.
    pub(super) fn fault(
        &self,
        grant: &Grant,
        at: WindowOffset,
        first: PageIndex,
        last: PageIndex,
    ) -> io::Result<()> {
        let (space, access, agrees) = (&*grant.space, grant.access, grant.agrees(at));
        Fault { engine: self, space, first, last, access, agrees, extent: None }.run()
    }

    /// Behaviour 8: unmaps what the window shows for a hole (see [`Mapper::unmap_hole`]).
    ///
    /// [`Mapper::unmap_hole`]: crate::window::Mapper::unmap_hole
    fn unmap_hole(&self, space: &Space, start: PageIndex, order: Order) {
        let bytes = WindowBytes(order.pages() * PAGE_BYTES);
        self.mapper.unmap_hole(space.source.file(), start.byte(), bytes);
    }

    fn count_fallback(&self, why: Fallback) {
        let counters = &self.counters;
        match why {
            Fallback::Partial => &counters.fallback_partial,
            Fallback::Eof => &counters.fallback_eof,
            Fallback::Window => &counters.fallback_window,
            Fallback::Backing => &counters.fallback_backing,
            Fallback::Pte => &counters.fallback_pte,
            Fallback::Extent => &counters.fallback_extent,
        }
        .add(1);
    }
}

impl Fault<'_> {
    fn run(mut self) -> io::Result<()> {
        // The caller has read the file's length to cut `last`, so the known length is up to date.
        let eof = PageIndex::behind(self.space.known_bytes());
        let mut page = self.first;
        while page <= self.last {
            let until = page.chunk_last().min(self.last);
            trace_dax!(pmd_fault, self.space, page, "access={:?} eof={:#x}", self.access, eof.0);
            match self.pmd_fault(page.chunk(), eof)? {
                Ok(()) => {
                    self.engine.counters.pmd.add(1);
                    trace_dax!(pmd_fault_done, self.space, page, "mapped");
                }
                Err(why) => {
                    self.engine.count_fallback(why);
                    trace_dax!(pmd_fault_done, self.space, page, "fallback={why:?}");
                    self.pte_faults(page, until)?;
                }
            }
            page = until.next();
        }
        Ok(())
    }

    /// Makes or finds the PMD entry of a chunk, or returns why it can't. Checks the conditions of
    /// behaviour 15 in the order of the kernel's `dax_iomap_pmd_fault`.
    fn pmd_fault(&mut self, chunk: PageIndex, eof: PageIndex) -> io::Result<Result<(), Fallback>> {
        if chunk < self.first || chunk.chunk_last() > self.last {
            let past = chunk.chunk_last() >= eof && self.last.next() == eof && chunk >= self.first;
            return Ok(Err(if past { Fallback::Eof } else { Fallback::Partial }));
        }
        if !self.agrees {
            return Ok(Err(Fallback::Window));
        }
        if !self.space.source.maps_pmd() {
            return Ok(Err(Fallback::Backing));
        }
        let (engine, space) = (self.engine, self.space);
        let Ok(mut held) = space.entries.grab(chunk, Order::Pmd, &mut |at, order| {
            engine.unmap_hole(space, at, order);
        }) else {
            return Ok(Err(Fallback::Pte));
        };
        let extent = self.extent(chunk, PMD_PAGES);
        let new = extent.as_ref().ok().and_then(|extent| pmd_entry(extent, chunk));
        // A PMD entry with blocks is not changed, whatever the extent is now.
        match new {
            Some(new) => self.fill(&mut held, new),
            None if held.entry().is_real() => self.dirty(&held),
            None => {
                let found = held.entry();
                trace_dax!(pmd_insert_mapping_fallback, space, chunk, "{extent:?} over {found:?}");
                if found.is_empty() {
                    held.delete();
                }
                return extent.map(|_| Err(Fallback::Extent));
            }
        }
        if held.entry().is_zero() {
            trace_dax!(pmd_load_hole, space, chunk, "entry={:?}", held.entry());
        } else {
            trace_dax!(pmd_insert_mapping, space, chunk, "entry={:?}", held.entry());
        }
        Ok(Ok(()))
    }

    fn pte_faults(&mut self, first: PageIndex, last: PageIndex) -> io::Result<()> {
        let (engine, space) = (self.engine, self.space);
        let mut page = first;
        while page <= last {
            let mut unmap = |at, order| engine.unmap_hole(space, at, order);
            let Ok(held) = space.entries.grab(page, Order::Pte, &mut unmap) else {
                unreachable!("only a PMD request can be refused as occupied")
            };
            engine.counters.splits.add(u64::from(held.was_split()));
            if held.entry().order() == Order::Pmd {
                // Behaviour 3: a PMD with blocks is not split, and a write grant dirties all of it.
                trace_dax!(pte_fault, space, page, "access={:?}", self.access);
                self.dirty(&held);
                trace_dax!(insert_mapping, space, page, "entry={:?}", held.entry());
                trace_dax!(pte_fault_done, space, page, "mapped");
                page = page.chunk_last().next();
                continue;
            }
            page = self.pte_fault(held, last)?;
            engine.counters.pte.add(1);
        }
        Ok(())
    }

    /// Fills one PTE entry. Returns the page behind it.
    fn pte_fault(&mut self, mut held: Held<'_>, last: PageIndex) -> io::Result<PageIndex> {
        let (space, page) = (self.space, held.start());
        // Behaviour 9: a write grant over an entry with blocks only marks the entry dirty, as the
        // kernel's pfn_mkwrite does.
        let mkwrite = held.entry().is_real() && self.access == Access::Write;
        if !mkwrite {
            trace_dax!(pte_fault, space, page, "access={:?}", self.access);
        }
        let extent = match self.extent(page, last - page + 1) {
            Ok(extent) => extent,
            Err(e) => {
                if held.entry().is_empty() {
                    held.delete();
                }
                trace_dax!(pte_fault_done, space, page, "error={e}");
                return Err(e);
            }
        };
        let zero = Entry::zero(Order::Pte);
        let new = extent.block(page).map_or(zero, |block| Entry::real(Order::Pte, block));
        self.fill(&mut held, new);
        if mkwrite {
            trace_dax!(pfn_mkwrite, space, page, "entry={:?}", held.entry());
            return Ok(page.next());
        }
        if held.entry().is_zero() {
            trace_dax!(load_hole, space, page, "entry={:?}", held.entry());
        } else {
            trace_dax!(insert_mapping, space, page, "entry={:?}", held.entry());
        }
        trace_dax!(pte_fault_done, space, page, "mapped");
        Ok(page.next())
    }

    fn fill(&self, held: &mut Held<'_>, new: Entry) {
        if new.is_zero() && !held.entry().is_real() {
            self.engine.counters.holes.add(1);
        }
        held.fill(new, &mut |at, order| self.engine.unmap_hole(self.space, at, order));
        self.dirty(held);
    }

    /// Behaviour 9: marks the entry dirty under a write grant, since the engine does not see the
    /// guest's stores. Where the kernel tracks dirty pages, no entry is marked.
    fn dirty(&self, held: &Held<'_>) {
        if self.access == Access::Write && held.entry().is_real() && self.space.tracks() {
            held.mark(Mark::Dirty, true);
        }
    }

    fn extent(&mut self, page: PageIndex, pages: u64) -> io::Result<Extent> {
        // For a whole chunk the last extent is used only if it holds the whole chunk: it may have
        // been cut to the shorter range of an earlier look-up.
        let needed = if pages == PMD_PAGES { pages } else { 1 };
        if let Some(extent) = self.extent
            && extent.holds(page, needed)
        {
            return Ok(extent);
        }
        let extent = self.space.source.extent(page, pages, self.access)?;
        if !extent.holds(page, 1) {
            return Err(io::Error::other("the file system returned the extent of another page"));
        }
        if self.access == Access::Write && !matches!(extent.backed, Backed::Mapped(_)) {
            return Err(io::Error::other("the file system allocated no block for a write grant"));
        }
        self.extent = Some(extent);
        Ok(extent)
    }
}

/// The PMD entry of a chunk. None if the chunk has several extents, or its blocks are not aligned
/// to 2 MiB.
fn pmd_entry(extent: &Extent, chunk: PageIndex) -> Option<Entry> {
    if !extent.holds(chunk, PMD_PAGES) {
        return None;
    }
    match extent.block(chunk) {
        Some(block) if block.number().is_multiple_of(PMD_PAGES) => {
            Some(Entry::real(Order::Pmd, block))
        }
        Some(_) => None,
        None => Some(Entry::zero(Order::Pmd)),
    }
}
