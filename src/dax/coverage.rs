// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the number of grants of each page of a file. Knows no entries.

use std::collections::BTreeMap;

use super::entry::PageIndex;
use super::extent::Access;

/// The number of grants that cover a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Number of read grants.
    pub reads: u32,
    /// Number of write grants.
    pub writes: u32,
}

impl Count {
    const NONE: Self = Self { reads: 0, writes: 0 };
}

/// Runs of pages with equal counts. A key is the first page of a run; the run ends before the next
/// key.
#[derive(Debug, Default)]
pub(crate) struct Coverage(BTreeMap<PageIndex, Count>);

impl Coverage {
    /// The number of grants that cover `page`.
    pub(crate) fn at(&self, page: PageIndex) -> Count {
        self.0.range(..=page).next_back().map_or(Count::NONE, |(_, count)| *count)
    }

    /// Whether `wanted` is true of the count of any page of `first..=last`.
    pub(crate) fn any(
        &self,
        first: PageIndex,
        last: PageIndex,
        wanted: impl Fn(Count) -> bool,
    ) -> bool {
        wanted(self.at(first)) || self.0.range(first..=last).any(|(_, count)| wanted(*count))
    }

    /// The covered runs of `first..=last`, cut to that range: first page, last page, count.
    pub(crate) fn runs(
        &self,
        first: PageIndex,
        last: PageIndex,
    ) -> Vec<(PageIndex, PageIndex, Count)> {
        let mut runs = Vec::new();
        let mut start = first;
        let mut count = self.at(first);
        for (&key, &next) in self.0.range(first.next()..=last.max(first.next())) {
            if key > last {
                break;
            }
            runs.push((start, PageIndex(key.0 - 1), count));
            (start, count) = (key, next);
        }
        runs.push((start, last, count));
        runs.retain(|(.., count)| *count != Count::NONE);
        runs
    }

    /// Adds one grant of `first..=last`.
    pub(crate) fn add(&mut self, first: PageIndex, last: PageIndex, access: Access) {
        self.change(first, last, |count| match access {
            Access::Read => count.reads += 1,
            Access::Write => count.writes += 1,
        });
    }

    /// Subtracts one grant of `first..=last`.
    pub(crate) fn remove(&mut self, first: PageIndex, last: PageIndex, access: Access) {
        self.change(first, last, |count| match access {
            Access::Read => count.reads = count.reads.saturating_sub(1),
            Access::Write => count.writes = count.writes.saturating_sub(1),
        });
    }

    fn change(&mut self, first: PageIndex, last: PageIndex, change: impl Fn(&mut Count)) {
        let end = last.next();
        let (at_first, at_end) = (self.at(first), self.at(end));
        self.0.entry(first).or_insert(at_first);
        self.0.entry(end).or_insert(at_end);
        self.0.range_mut(first..end).for_each(|(_, count)| change(count));
        // Neighbouring runs with equal counts are merged. Otherwise the map would keep the bounds
        // of every grant that the file ever had.
        let mut before =
            first.0.checked_sub(1).map_or(Count::NONE, |page| self.at(PageIndex(page)));
        let touched: Vec<_> =
            self.0.range(first..=end).map(|(key, count)| (*key, *count)).collect();
        for (key, count) in touched {
            if count == before {
                self.0.remove(&key);
            }
            before = count;
        }
    }

    /// Number of keys in the map.
    pub(crate) fn runs_kept(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: the count of each page is right, and no run is kept of a removed grant.
    #[test]
    fn counts_are_right_page_by_page_and_leave_nothing() {
        let mut coverage = Coverage::default();
        let mut model = vec![Count::NONE; 64];
        let mut live = Vec::new();
        let mut random = 1u64;
        for step in 0..4000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let pick = |n: u64| (random >> 33) % n;
            if live.len() < 20 && step < 3900 && pick(2) == 0 || live.is_empty() {
                let first = pick(60);
                let last = first + (random >> 20) % (64 - first);
                let access = if random & 1 << 40 == 0 { Access::Read } else { Access::Write };
                coverage.add(PageIndex(first), PageIndex(last), access);
                live.push((first, last, access, 1i64));
            } else {
                let (first, last, access, _) = live.swap_remove(pick(live.len() as u64) as usize);
                coverage.remove(PageIndex(first), PageIndex(last), access);
            }
            model.fill(Count::NONE);
            for (first, last, access, _) in &live {
                for count in &mut model[*first as usize..=*last as usize] {
                    *(if *access == Access::Read {
                        &mut count.reads
                    } else {
                        &mut count.writes
                    }) += 1;
                }
            }
            for (page, count) in model.iter().enumerate() {
                assert_eq!(coverage.at(PageIndex(page as u64)), *count);
            }
            let written: Vec<_> = coverage.runs(PageIndex(5), PageIndex(40));
            for page in 5..=40u64 {
                let run =
                    written.iter().find(|(first, last, _)| (first.0..=last.0).contains(&page));
                assert_eq!(run.map_or(Count::NONE, |(.., count)| *count), model[page as usize]);
            }
            assert!(coverage.runs_kept() <= 2 * live.len());
        }
    }
}
