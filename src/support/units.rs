// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages, chunks, offsets and ranges. Offsets into the file and into the window are different types
//! from the guest's message to the front-end's map.

use std::ops::{Add, Sub};

/// log2 of the bytes in a page, which a PTE entry covers.
pub const PAGE_SHIFT: u32 = 12;
/// Bytes in a page.
pub const PAGE_BYTES: u64 = 1 << PAGE_SHIFT;
/// log2 of the pages in a chunk, which a PMD entry covers: the order of a PMD entry.
pub const PMD_ORDER: u32 = 9;
/// Pages in a chunk.
pub const PMD_PAGES: u64 = 1 << PMD_ORDER;
/// Bytes in a chunk: 2 MiB.
pub const PMD_BYTES: u64 = PAGE_BYTES * PMD_PAGES;

/// The number of a 4 KiB page of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// The last page that a file can have: a file's length is at most `i64::MAX` bytes.
    pub const LAST: Self = Self::of(FileOffset::MAX);

    /// The first page of this page's chunk.
    pub const fn chunk(self) -> Self {
        Self(self.0 & !(PMD_PAGES - 1))
    }

    /// The last page of this page's chunk.
    pub const fn chunk_last(self) -> Self {
        Self(self.0 | (PMD_PAGES - 1))
    }

    /// The page after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The offset of the page's first byte.
    pub const fn byte(self) -> FileOffset {
        FileOffset(self.0 << PAGE_SHIFT)
    }

    /// The page that contains byte `byte` of the file.
    pub const fn of(byte: FileOffset) -> Self {
        Self(byte.0 >> PAGE_SHIFT)
    }

    /// The first page after a file of `bytes` bytes.
    pub const fn behind(bytes: u64) -> Self {
        Self(bytes.div_ceil(PAGE_BYTES))
    }
}

/// The page that is `pages` pages after this one.
impl Add<u64> for PageIndex {
    type Output = Self;

    fn add(self, pages: u64) -> Self {
        Self(self.0 + pages)
    }
}

/// The number of pages from `before` to this page.
impl Sub for PageIndex {
    type Output = u64;

    fn sub(self, before: Self) -> u64 {
        self.0 - before.0
    }
}

/// A byte offset into the file that is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct FileOffset(pub u64);

impl FileOffset {
    /// The largest length of a file, in bytes.
    pub const MAX: Self = Self(i64::MAX as u64);
}

/// The offset `bytes` bytes after this one.
impl Add<u64> for FileOffset {
    type Output = Self;

    fn add(self, bytes: u64) -> Self {
        Self(self.0 + bytes)
    }
}

/// The file offset that a map shows `bytes` bytes of the window after this one.
impl Add<WindowBytes> for FileOffset {
    type Output = Self;

    fn add(self, bytes: WindowBytes) -> Self {
        Self(self.0 + bytes.0)
    }
}

/// The number of bytes from `before` to this offset.
impl Sub for FileOffset {
    type Output = u64;

    fn sub(self, before: Self) -> u64 {
        self.0 - before.0
    }
}

/// A range of bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileRange {
    /// The first byte.
    pub from: FileOffset,
    /// The number of bytes.
    pub bytes: u64,
}

impl FileRange {
    /// `bytes` bytes from `from` on.
    pub const fn new(from: FileOffset, bytes: u64) -> Self {
        Self { from, bytes }
    }

    /// The bytes from `from` on that are before `end`; empty if `end` is not after `from`.
    pub const fn between(from: FileOffset, end: FileOffset) -> Self {
        Self { from, bytes: end.0.saturating_sub(from.0) }
    }

    /// The pages `first..=last`.
    pub const fn of_pages(first: PageIndex, last: PageIndex) -> Self {
        Self::between(first.byte(), last.next().byte())
    }

    /// The offset after the last byte; None if it is above [`FileOffset::MAX`]. To be called before
    /// [`end`](Self::end) for a range that the guest has named.
    pub fn checked_end(self) -> Option<FileOffset> {
        let end = self.from.0.checked_add(self.bytes).map(FileOffset);
        end.filter(|end| *end <= FileOffset::MAX)
    }

    /// The offset after the last byte.
    pub fn end(self) -> FileOffset {
        self.from + self.bytes
    }

    /// Whether the range has no byte.
    pub const fn is_empty(self) -> bool {
        self.bytes == 0
    }

    /// The first and the last page that contain a byte of the range, which must not be empty.
    pub const fn pages(self) -> (PageIndex, PageIndex) {
        let last = FileOffset(self.from.0 + self.bytes - 1);
        (PageIndex::of(self.from), PageIndex::of(last))
    }
}

/// A byte offset into the window (shared memory region 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowOffset(pub u64);

/// The offset `bytes` bytes after this one.
impl Add<WindowBytes> for WindowOffset {
    type Output = Self;

    fn add(self, bytes: WindowBytes) -> Self {
        Self(self.0 + bytes.0)
    }
}

/// The number of bytes from `before` to this offset.
impl Sub for WindowOffset {
    type Output = WindowBytes;

    fn sub(self, before: Self) -> WindowBytes {
        WindowBytes(self.0 - before.0)
    }
}

/// A number of bytes of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct WindowBytes(pub u64);

/// A range of bytes of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowRange {
    /// The first byte.
    pub at: WindowOffset,
    /// The number of bytes.
    pub bytes: WindowBytes,
}

impl WindowRange {
    /// `bytes` bytes from `at` on.
    pub const fn new(at: WindowOffset, bytes: WindowBytes) -> Self {
        Self { at, bytes }
    }

    /// The bytes from `at` on that are before `end`; None if there is no such byte.
    pub fn between(at: WindowOffset, end: WindowOffset) -> Option<Self> {
        (at < end).then(|| Self { at, bytes: end - at })
    }

    /// The offset after the last byte.
    pub fn end(self) -> WindowOffset {
        self.at + self.bytes
    }

    /// The bytes that are in both ranges.
    pub fn overlap(self, other: Self) -> Option<Self> {
        Self::between(self.at.max(other.at), self.end().min(other.end()))
    }

    /// The parts of this range that are not in `other`: before `other`, and after it.
    pub fn without(self, other: Self) -> impl Iterator<Item = Self> {
        let before = Self::between(self.at, self.end().min(other.at));
        let behind = Self::between(self.at.max(other.end()), self.end());
        before.into_iter().chain(behind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: for two ranges in every position, `overlap` and `without` split the first range.
    #[test]
    fn an_overlap_and_what_is_left_make_up_the_range() {
        let bytes = |range: WindowRange| range.at.0..range.end().0;
        let all = |n: u64| {
            let range = |at, end| WindowRange::between(WindowOffset(at), WindowOffset(end));
            (0..n).flat_map(move |at| (at + 1..=n).filter_map(move |end| range(at, end)))
        };
        for (one, other) in all(6).flat_map(|one| all(6).map(move |other| (one, other))) {
            let shared: Vec<_> = one.overlap(other).into_iter().flat_map(bytes).collect();
            let left: Vec<_> = one.without(other).flat_map(bytes).collect();
            assert!(shared.iter().all(|byte| bytes(other).contains(byte)), "{one:?} {other:?}");
            assert!(!left.iter().any(|byte| bytes(other).contains(byte)), "{one:?} {other:?}");
            let mut joined = [shared, left].concat();
            joined.sort_unstable();
            assert_eq!(joined, bytes(one).collect::<Vec<_>>(), "{one:?} {other:?}");
        }
    }

    /// Shows: checked_end() is None above the largest file length, and Some at that length.
    #[test]
    fn a_range_ends_within_the_largest_file() {
        let end = |from, bytes| FileRange::new(FileOffset(from), bytes).checked_end();
        assert_eq!(end(u64::MAX, 2), None);
        assert_eq!(end(FileOffset::MAX.0, 1), None);
        assert_eq!(end(FileOffset::MAX.0 - 1, 1), Some(FileOffset::MAX));
        assert_eq!(PageIndex::LAST, PageIndex((i64::MAX as u64) >> PAGE_SHIFT));
    }
}
