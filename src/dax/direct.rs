// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the extents of a file on persistent memory or in memory that this process maps
//! (behaviour 12). Parts of pages are zeroed by stores that are written back from the processor's
//! cache. Knows no entries.

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::entry::{PAGE_BYTES, PageIndex};
use super::extent::{Access, Backed, Extent, ExtentSource};
use crate::persist::Direct;
use crate::window::{FileOffset, FileRange};

/// A file that this process maps. All but the zeroing of parts of pages is done by `file_system`.
pub struct DirectExtents<S> {
    file_system: S,
    direct: Arc<Direct>,
}

impl<S: ExtentSource> DirectExtents<S> {
    /// `direct` must be a map of the file of `file_system`.
    pub fn new(file_system: S, direct: Arc<Direct>) -> Self {
        Self { file_system, direct }
    }

    /// Whether each byte of the range lies inside the file and has a block, so that this process
    /// may store to it.
    fn has_blocks(&self, range: FileRange) -> io::Result<bool> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?;
        if range.is_empty() || end.0 > self.file_bytes()? {
            return Ok(false);
        }
        let (mut page, last) = range.pages();
        while page <= last {
            let extent = self.extent(page, last - page + 1, Access::Read)?;
            if !extent.holds(page, 1) || !matches!(extent.backed, Backed::Mapped(_)) {
                return Ok(false);
            }
            page = extent.start + extent.pages;
        }
        Ok(true)
    }

    /// Zeroes a part of a page (behaviour 12). A page without a block reads as zeros already.
    fn zero_part(&self, range: FileRange) -> io::Result<()> {
        if self.has_blocks(range)? { self.direct.zero(range) } else { Ok(()) }
    }
}

impl<S: ExtentSource> ExtentSource for DirectExtents<S> {
    fn file(&self) -> &Arc<File> {
        self.file_system.file()
    }

    fn file_bytes(&self) -> io::Result<u64> {
        self.file_system.file_bytes()
    }

    fn mappable_bytes(&self, file_bytes: u64) -> u64 {
        self.file_system.mappable_bytes(file_bytes)
    }

    fn maps_pmd(&self) -> bool {
        self.file_system.maps_pmd()
    }

    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()> {
        self.file_system.allocate(first, last)
    }

    fn extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent> {
        self.file_system.extent(page, pages, access)
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.file_system.set_bytes(bytes)
    }

    /// The file system zeroes the whole pages; the parts of pages at both ends are zeroed through
    /// the map.
    fn zero(&self, range: FileRange, keep: bool) -> io::Result<()> {
        let bytes = FileOffset(self.file_bytes()?);
        let end = range.checked_end().ok_or(Errno::EINVAL)?.min(bytes.max(range.from));
        // The first page's start and the last page's end, as far as they lie in the range.
        let first = FileOffset(range.from.0.next_multiple_of(PAGE_BYTES)).min(end);
        let last = PageIndex::of(end).byte().max(first);
        self.zero_part(FileRange::between(range.from, first))?;
        self.file_system.zero(FileRange::between(first, last), keep)?;
        self.zero_part(FileRange::between(last, end))?;
        self.direct.fence();
        Ok(())
    }

    fn read_at(&self, from: FileOffset, to: &mut [u8]) -> io::Result<usize> {
        self.file_system.read_at(from, to)
    }

    fn write_at(&self, from: FileOffset, bytes: &[u8]) -> io::Result<usize> {
        self.file_system.write_at(from, bytes)
    }
}
