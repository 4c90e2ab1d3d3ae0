// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: one address space: the entries of one host file, and their locks (behaviours 2 to 5
//! and 8). Knows no window and no disk.

use super::entry::{Entry, Order, PageIndex};
use super::index::{Index, Mark, Occupied};
use super::sync::{Arc, Mutex, MutexGuard, lock, ranked};
use super::wait::{Key, SpaceId, WaitTable, Wake};
use crate::support::lock::Rank;

/// The entries of one file.
pub struct Entries {
    id: SpaceId,
    index: Mutex<Index>,
    waits: Arc<WaitTable>,
}

/// An entry that is locked by whoever has this. It is unlocked, and the next waiter woken, on drop.
#[must_use = "dropping it unlocks the entry"]
pub struct Held<'a> {
    entries: &'a Entries,
    start: PageIndex,
    entry: Entry,
    split: bool,
}

impl Entries {
    /// No entries yet. `id` must be unique among those who share `waits`.
    pub fn new(id: SpaceId, waits: Arc<WaitTable>) -> Self {
        Self { id, index: ranked(Rank::Index, Index::default()), waits }
    }

    /// The index, for a look or a mark. Not to be held over anything slow.
    pub(crate) fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    /// The first entry that covers a page of `from..=last`, or with `mark` the first so marked.
    pub fn next(
        &self,
        from: PageIndex,
        last: PageIndex,
        mark: Option<Mark>,
    ) -> Option<(PageIndex, Entry)> {
        self.index().next(from, last, mark)
    }

    /// Whether the entry that covers `page` has `mark`.
    pub fn is_marked(&self, page: PageIndex, mark: Mark) -> bool {
        self.index().is_marked(page, mark)
    }

    /// How many entries there are.
    pub fn len(&self) -> u64 {
        self.index().len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.index().is_empty()
    }

    /// See [`Index::steps`].
    pub fn steps(&self) -> u64 {
        self.index().steps()
    }

    /// See [`Index::bytes`].
    pub fn bytes(&self) -> usize {
        self.index().bytes()
    }

    fn wake(&self, start: PageIndex, how_many: Wake) {
        self.waits.wake(Key { space: self.id, start }, how_many);
    }

    /// The entry that covers `page`, once nobody holds it. If the caller does not lock it then,
    /// it must [pass the wake-up on](Self::pass_on): there may be others who wait for it.
    pub(crate) fn look<'a>(
        &'a self,
        mut index: MutexGuard<'a, Index>,
        page: PageIndex,
    ) -> (MutexGuard<'a, Index>, Option<(PageIndex, Entry)>) {
        loop {
            match index.get(page) {
                Some((start, entry)) if entry.is_locked() => {
                    let waiter = self.waits.join(Key { space: self.id, start });
                    drop(index);
                    waiter.sleep();
                    index = self.index();
                }
                found => return (index, found),
            }
        }
    }

    /// Behaviour 4: whoever looked and did not lock gives the wake-up that it may have used to the
    /// next one.
    pub(crate) fn pass_on(&self, start: PageIndex) {
        self.wake(start, Wake::One);
    }

    pub(crate) fn hold(&self, index: &mut Index, start: PageIndex, entry: Entry) -> Held<'_> {
        index.replace(start, entry.locked());
        Held { entries: self, start, entry, split: false }
    }

    /// Behaviour 3: the entry that covers `page`, locked; an empty one of `order` if there is none.
    ///
    /// A PTE request splits a PMD that is a hole or empty (`unmap` is called first for a hole, with
    /// no lock of ours held but the entry's own), and gets a PMD that has blocks as it is.
    ///
    /// # Errors
    /// [`Occupied`] for a PMD request where PTE entries are: the caller falls back to PTEs.
    pub fn grab(
        &self,
        page: PageIndex,
        order: Order,
        unmap: &mut dyn FnMut(PageIndex, Order),
    ) -> Result<Held<'_>, Occupied> {
        let (mut index, found) = self.look(self.index(), page);
        let Some((start, entry)) = found else {
            let start = order.start(page);
            index.insert(start, Entry::empty(order).locked())?;
            return Ok(Held { entries: self, start, entry: Entry::empty(order), split: false });
        };
        match (order, entry.order()) {
            (Order::Pmd, Order::Pte) => {
                drop(index);
                self.pass_on(start);
                Err(Occupied)
            }
            (Order::Pte, Order::Pmd) if !entry.is_real() => {
                let whole = self.hold(&mut index, start, entry);
                drop(index);
                if entry.is_zero() {
                    unmap(start, Order::Pmd);
                }
                Ok(whole.split(page))
            }
            _ => Ok(self.hold(&mut index, start, entry)),
        }
    }

    /// Behaviour 5: waits for the entry that covers `page` and deletes it, whatever it is.
    pub fn delete(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        self.remove_if(page, |_, _| true)
    }

    /// Behaviour 5: deletes the entry that covers `page` unless it is dirty or a writeback is
    /// to come. Returns whether it did.
    pub fn invalidate_clean(&self, page: PageIndex) -> bool {
        let clean = |index: &Index, start| {
            !index.is_marked(start, Mark::Dirty) && !index.is_marked(start, Mark::ToWrite)
        };
        self.remove_if(page, clean).is_some()
    }

    fn remove_if(
        &self,
        page: PageIndex,
        condition: impl Fn(&Index, PageIndex) -> bool,
    ) -> Option<(PageIndex, Entry)> {
        let (mut index, found) = self.look(self.index(), page);
        let (start, _) = found?;
        if condition(&index, start) {
            let removed = index.remove(start);
            drop(index);
            self.wake(start, Wake::All);
            removed
        } else {
            drop(index);
            self.pass_on(start);
            None
        }
    }
}

impl Held<'_> {
    /// The entry's first page.
    pub fn start(&self) -> PageIndex {
        self.start
    }

    /// The entry, without its lock bit.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// Whether a PMD was split to get it.
    pub fn was_split(&self) -> bool {
        self.split
    }

    /// Behaviour 8: puts what is now known in the place of a hole or of nothing. An entry that has
    /// blocks is left as it is. `unmap` is called first where a hole gets blocks.
    pub fn fill(&mut self, new: Entry, unmap: &mut dyn FnMut(PageIndex, Order)) {
        if self.entry.is_real() || self.entry.order() != new.order() {
            return;
        }
        if self.entry.is_zero() && new.is_real() {
            unmap(self.start, self.entry.order());
        }
        self.entry = new;
        self.entries.index().replace(self.start, new.locked());
    }

    /// Sets or clears a mark.
    pub fn mark(&self, mark: Mark, on: bool) {
        self.entries.index().set_mark(self.start, mark, on);
    }

    /// Deletes the entry, and wakes all who waited for it.
    pub fn delete(self) {
        self.entries.index().remove(self.start);
        self.entries.wake(self.start, Wake::All);
        std::mem::forget(self); // Nothing is left to unlock.
    }

    /// Behaviour 3: in the place of a PMD comes one empty PTE, locked; the rest of the chunk is
    /// vacant.
    fn split(self, page: PageIndex) -> Self {
        let entry = Entry::empty(Order::Pte);
        {
            let mut index = self.entries.index();
            index.remove(self.start);
            // The chunk has just become vacant, under this very lock.
            let vacant = index.insert(page, entry.locked());
            debug_assert!(vacant.is_ok());
        }
        self.entries.wake(self.start, Wake::All);
        let split = Self { entries: self.entries, start: page, entry, split: true };
        std::mem::forget(self); // The PMD is gone: nothing to unlock.
        split
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.entries.index().replace(self.start, self.entry);
        self.entries.wake(self.start, Wake::One);
    }
}
