// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A set of page numbers.

use std::collections::BTreeMap;

/// Number of pages per element of the map.
const CHUNK: u64 = 512;

/// A set of page numbers: chunk number -> one bit per page of the chunk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pages(BTreeMap<u64, [u64; 8]>);

/// A mask of the bits of `from..end` in the word whose first bit is `base`.
fn bits(base: u64, from: u64, end: u64) -> u64 {
    let (low, high) = (from.max(base) - base, end.min(base + 64).saturating_sub(base));
    if low >= high {
        return 0;
    }
    (u64::MAX >> (64 - (high - low))) << low
}

impl Pages {
    pub fn has(&self, page: u64) -> bool {
        self.0
            .get(&(page / CHUNK))
            .is_some_and(|words| words[(page % CHUNK / 64) as usize] >> (page % 64) & 1 != 0)
    }

    pub fn insert(&mut self, from: u64, end: u64) {
        if from >= end {
            return;
        }
        let mut chunk = from / CHUNK;
        while chunk * CHUNK < end {
            let words = self.0.entry(chunk).or_default();
            for (n, word) in words.iter_mut().enumerate() {
                *word |= bits(chunk * CHUNK + n as u64 * 64, from, end);
            }
            chunk += 1;
        }
    }

    pub fn remove(&mut self, from: u64, end: u64) {
        for (chunk, words) in self.0.range_mut(from / CHUNK..) {
            if chunk * CHUNK >= end {
                break;
            }
            for (n, word) in words.iter_mut().enumerate() {
                *word &= !bits(chunk * CHUNK + n as u64 * 64, from, end);
            }
        }
    }

    pub fn add(&mut self, other: &Self) {
        for (chunk, words) in &other.0 {
            let mine = self.0.entry(*chunk).or_default();
            mine.iter_mut().zip(words).for_each(|(mine, word)| *mine |= word);
        }
    }

    /// The first page of `from..end` that is in this set and not in `other`.
    pub fn first_missing(&self, other: &Self, from: u64, end: u64) -> Option<u64> {
        for (chunk, words) in self.0.range(from / CHUNK..) {
            let theirs = other.0.get(chunk).copied().unwrap_or_default();
            for (n, (word, their)) in words.iter().zip(theirs).enumerate() {
                let base = chunk * CHUNK + n as u64 * 64;
                let missing = word & !their & bits(base, from, end);
                if missing != 0 {
                    return Some(base + u64::from(missing.trailing_zeros()));
                }
            }
            if chunk * CHUNK >= end {
                break;
            }
        }
        None
    }

    /// Whether any page of `from..end` is in this set.
    pub fn any(&self, from: u64, end: u64) -> bool {
        self.first_missing(&Self::default(), from, end).is_some()
    }
}
