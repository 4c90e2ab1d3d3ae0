// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the entries of one host file, and their lock bits (behaviours 2 to 5 and 8). Knows
//! no window and no disk.

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

/// A locked entry. Drop unlocks it and wakes the thread that has waited longest for it.
#[must_use = "dropping it unlocks the entry"]
pub struct Held<'a> {
    entries: &'a Entries,
    start: PageIndex,
    entry: Entry,
    split: bool,
}

impl Entries {
    /// No entries yet. `id` must be unique among the spaces that share `waits`.
    pub fn new(id: SpaceId, waits: Arc<WaitTable>) -> Self {
        Self { id, index: ranked(Rank::Index, Index::default()), waits }
    }

    /// Locks the index. Hold it over no system call, no front-end round trip and no flush.
    pub(crate) fn index(&self) -> MutexGuard<'_, Index> {
        lock(&self.index)
    }

    /// See [`Index::next`].
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

    /// Number of entries.
    pub fn len(&self) -> u64 {
        self.index().len()
    }

    /// Whether the file has no entries.
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

    /// Waits until no thread holds the entry that covers `page`, and returns its first page and the
    /// entry, with the index locked. A caller that does not lock the entry must
    /// [pass the wake-up on](Self::pass_on): other threads may wait for the entry.
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

    /// Wakes the next waiter of the entry (behaviour 4): for a thread that has looked at the entry,
    /// may have been woken for it, and has not locked it.
    pub(crate) fn pass_on(&self, start: PageIndex) {
        self.wake(start, Wake::One);
    }

    pub(crate) fn hold(&self, index: &mut Index, start: PageIndex, entry: Entry) -> Held<'_> {
        index.replace(start, entry.locked());
        Held { entries: self, start, entry, split: false }
    }

    /// Behaviour 3: locks the entry that covers `page`. If no entry covers it, adds an empty one of
    /// `order`.
    ///
    /// A PTE request splits a PMD that is a hole or empty. For a hole, `unmap` is called before the
    /// split, while this function holds only the entry's lock bit. A PTE request gets a PMD with
    /// blocks unsplit.
    ///
    /// # Errors
    /// [`Occupied`] for a PMD request in a chunk with PTE entries: the caller falls back to PTEs.
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

    /// Behaviour 5: waits until no thread holds the entry that covers `page`, and deletes it.
    /// Returns its first page and the entry.
    pub fn delete(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        self.remove_if(page, |_, _| true)
    }

    /// Behaviour 5: deletes the entry that covers `page`, unless it is marked Dirty or ToWrite.
    /// Returns whether an entry was deleted.
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

    /// Whether [`Entries::grab`] split a PMD to make this entry.
    pub fn was_split(&self) -> bool {
        self.split
    }

    /// Behaviour 8: replaces a hole or an empty entry by `new`, which must have the same order. An
    /// entry with blocks is not changed. If a hole gets blocks, `unmap` is called first.
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

    /// Deletes the entry, and wakes all threads that wait for it.
    pub fn delete(self) {
        self.entries.index().remove(self.start);
        self.entries.wake(self.start, Wake::All);
        std::mem::forget(self); // The entry was removed: its drop has nothing to unlock.
    }

    /// Behaviour 3: replaces a PMD by one empty, locked PTE for `page`. The other pages of the
    /// chunk get no entry.
    fn split(self, page: PageIndex) -> Self {
        let entry = Entry::empty(Order::Pte);
        {
            let mut index = self.entries.index();
            index.remove(self.start);
            // The chunk has no entry: the PMD was removed under this hold of the index lock.
            let vacant = index.insert(page, entry.locked());
            debug_assert!(vacant.is_ok());
        }
        self.entries.wake(self.start, Wake::All);
        let split = Self { entries: self.entries, start: page, entry, split: true };
        std::mem::forget(self); // The PMD was removed: its drop has nothing to unlock.
        split
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.entries.index().replace(self.start, self.entry);
        self.entries.wake(self.start, Wake::One);
    }
}
