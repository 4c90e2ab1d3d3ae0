// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The reference for the index: the standard library's ordered map with the same operations.

use std::collections::{BTreeMap, BTreeSet};

use vhost_user_dax::dax::entry::{Entry, Order, PMD_PAGES, PageIndex};

/// Entries by first page, and the first pages of the dirty entries.
#[derive(Default)]
pub struct OrderedMap {
    entries: BTreeMap<PageIndex, Entry>,
    dirty: BTreeSet<PageIndex>,
}

impl OrderedMap {
    /// The entry that covers `page`.
    pub fn get(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        let (start, entry) = self.entries.range(..=page).next_back()?;
        (page.0 < start.0 + entry.order().pages()).then_some((*start, *entry))
    }

    /// Adds a dirty entry, unless another entry overlaps it.
    pub fn insert_dirty(&mut self, page: PageIndex, entry: Entry) -> bool {
        let end = PageIndex(page.0 + PMD_PAGES);
        if self.get(page).is_some()
            || entry.order() == Order::Pmd && self.entries.range(page..end).next().is_some()
        {
            return false;
        }
        self.entries.insert(page, entry);
        self.dirty.insert(page)
    }

    /// Marks an entry clean.
    pub fn clean(&mut self, page: PageIndex) {
        self.dirty.remove(&page);
    }

    /// At most `most` dirty entries of `first..=last`.
    pub fn dirty_batch(
        &self,
        first: PageIndex,
        last: PageIndex,
        most: usize,
    ) -> Vec<(PageIndex, Entry)> {
        let mut batch = Vec::with_capacity(most);
        let dirty = self.dirty.range(first..=last).take(most);
        batch.extend(dirty.filter_map(|page| Some((*page, *self.entries.get(page)?))));
        batch
    }
}
