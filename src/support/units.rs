// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages, chunks, and the offsets that must not be confused: each is a type of its own.

/// log2 of a page: what a PTE entry covers.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes of a page.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// log2 of the pages in a chunk: the order of a PMD entry.
pub const PMD_ORDER: u32 = 9;
/// Pages of a chunk: what a PMD entry covers.
pub const PMD_PAGES: u64 = 1 << PMD_ORDER;
/// Bytes of a chunk.
pub const PMD_BYTES: u64 = PAGE_BYTES * PMD_PAGES;

/// The number of a 4 KiB page of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// No file has a page behind this one (its length is at most `i64::MAX` bytes).
    pub const LAST: Self = Self((i64::MAX as u64) >> PAGE_SHIFT);

    /// The first page of the chunk that this page is in.
    pub const fn chunk(self) -> Self {
        Self(self.0 & !(PMD_PAGES - 1))
    }

    /// The page behind this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The byte in the file at which the page begins.
    pub const fn byte(self) -> u64 {
        self.0 << PAGE_SHIFT
    }

    /// The page that holds a byte of the file.
    pub const fn of_byte(byte: u64) -> Self {
        Self(byte >> PAGE_SHIFT)
    }
}

/// A byte offset into the window (shared memory region 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowOffset(pub u64);

/// A byte offset into the file that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileOffset(pub u64);

/// A length in bytes, of the window or of a piece of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowBytes(pub u64);
