// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: one word per entry (behaviour 1). Only this file knows the bits of the word.

use std::fmt;

pub use crate::support::units::{
    PAGE_BYTES, PAGE_SHIFT, PMD_BYTES, PMD_ORDER, PMD_PAGES, PageIndex,
};

/// The number of pages that an entry covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Order {
    /// One page of 4 KiB.
    Pte,
    /// A chunk of 2 MiB, aligned to 2 MiB in the file.
    Pmd,
}

impl Order {
    /// Number of 4 KiB pages that an entry of this order covers.
    pub const fn pages(self) -> u64 {
        match self {
            Self::Pte => 1,
            Self::Pmd => PMD_PAGES,
        }
    }

    /// The first page of the entry of this order that covers `page`.
    pub const fn start(self, page: PageIndex) -> PageIndex {
        match self {
            Self::Pte => page,
            Self::Pmd => page.chunk(),
        }
    }

    /// The last page of the entry of this order that covers `page`.
    pub const fn last(self, page: PageIndex) -> PageIndex {
        match self {
            Self::Pte => page,
            Self::Pmd => page.chunk_last(),
        }
    }
}

/// The number of a 4 KiB block of the backing (of the file itself in the page cache).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(u64);

impl Block {
    /// The block with this number. None if the number does not fit into an entry (58 bits).
    pub const fn new(number: u64) -> Option<Self> {
        if number <= Entry::PAYLOAD_MAX { Some(Self(number)) } else { None }
    }

    /// The block number.
    pub const fn number(self) -> u64 {
        self.0
    }
}

/// The state of one page or chunk of a file. Bit 0 is always clear: [`Index`](super::index::Index)
/// uses it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    const LOCKED: u64 = 1 << 1;
    const PMD: u64 = 1 << 2;
    const ZERO: u64 = 1 << 3;
    const EMPTY: u64 = 1 << 4;
    /// Set in every entry, so that no entry is 0.
    const PRESENT: u64 = 1 << 5;
    const PAYLOAD_SHIFT: u32 = 6;
    const PAYLOAD_MAX: u64 = u64::MAX >> Self::PAYLOAD_SHIFT;

    const fn with(order: Order, bits: u64, payload: u64) -> Self {
        let pmd = match order {
            Order::Pte => 0,
            Order::Pmd => Self::PMD,
        };
        Self(Self::PRESENT | pmd | bits | payload << Self::PAYLOAD_SHIFT)
    }

    /// A placeholder that a thread has locked and not filled yet.
    pub const fn empty(order: Order) -> Self {
        Self::with(order, Self::EMPTY, 0)
    }

    /// A hole that the window shows as zeros.
    pub const fn zero(order: Order) -> Self {
        Self::with(order, Self::ZERO, 0)
    }

    /// Backed by `block`; a PMD by `block` and the 511 blocks behind it.
    pub const fn real(order: Order, block: Block) -> Self {
        Self::with(order, 0, block.0)
    }

    /// One page or one chunk.
    pub const fn order(self) -> Order {
        if self.0 & Self::PMD == 0 { Order::Pte } else { Order::Pmd }
    }

    /// Whether the entry is a hole.
    pub const fn is_zero(self) -> bool {
        self.0 & Self::ZERO != 0
    }

    /// Whether the entry is a placeholder that was not filled yet.
    pub const fn is_empty(self) -> bool {
        self.0 & Self::EMPTY != 0
    }

    /// Whether a block backs the entry: it is neither a hole nor empty.
    pub const fn is_real(self) -> bool {
        self.0 & (Self::ZERO | Self::EMPTY) == 0
    }

    /// Whether a thread has locked the entry.
    pub const fn is_locked(self) -> bool {
        self.0 & Self::LOCKED != 0
    }

    /// The entry with its lock bit set.
    #[must_use]
    pub const fn locked(self) -> Self {
        Self(self.0 | Self::LOCKED)
    }

    /// The entry with its lock bit clear.
    #[must_use]
    pub const fn unlocked(self) -> Self {
        Self(self.0 & !Self::LOCKED)
    }

    /// The backing block of a real entry.
    pub const fn block(self) -> Option<Block> {
        if self.is_real() { Some(Block(self.0 >> Self::PAYLOAD_SHIFT)) } else { None }
    }

    pub(super) const fn word(self) -> u64 {
        self.0
    }

    /// The entry that `word` encodes. None if `word` is 0 or a node's number in the index.
    pub(super) const fn from_word(word: u64) -> Option<Self> {
        if word & Self::PRESENT != 0 && word & 1 == 0 { Some(Self(word)) } else { None }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:", self.order())?;
        match self.block() {
            Some(block) => write!(f, "{:#x}", block.number())?,
            None if self.is_zero() => f.write_str("zero")?,
            None => f.write_str("empty")?,
        }
        if self.is_locked() { f.write_str(":locked") } else { Ok(()) }
    }
}

/// Behaviour 1: one word.
const _: () = assert!(size_of::<Entry>() == 8);

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: every kind of entry survives the way to its word and back (behaviour 1).
    #[test]
    fn row_01_an_entry_is_one_word() {
        let block = Block::new(Entry::PAYLOAD_MAX).unwrap();
        assert_eq!(Block::new(Entry::PAYLOAD_MAX + 1), None);
        for order in [Order::Pte, Order::Pmd] {
            for (entry, zero, empty, real) in [
                (Entry::zero(order), true, false, None),
                (Entry::empty(order), false, true, None),
                (Entry::real(order, block), false, false, Some(block)),
                (Entry::real(order, Block(0)), false, false, Some(Block(0))),
            ] {
                for entry in [entry, entry.locked(), entry.locked().unlocked()] {
                    let back = Entry::from_word(entry.word()).unwrap();
                    assert_eq!(back, entry);
                    assert_eq!(back.order(), order);
                    assert_eq!(
                        (back.is_zero(), back.is_empty(), back.block()),
                        (zero, empty, real)
                    );
                    assert_eq!(back.is_real(), real.is_some());
                }
                assert!(entry.locked().is_locked() && !entry.is_locked());
                assert_eq!(entry.locked().unlocked(), entry);
            }
        }
        assert_eq!(Entry::from_word(0), None);
    }
}
