// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the extents of a file whose pages are the memory itself (behaviour 12): parts of
//! pages are zeroed past the processor's cache. Knows no entries.

use std::fs::File;
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use super::entry::{PAGE_BYTES, PageIndex};
use super::extent::{Access, Backed, Extent, ExtentSource};
use crate::persist::Direct;

/// A file that is mapped directly. What its file system has to do it does as for any other file.
pub struct DirectExtents<S> {
    file_system: S,
    direct: Arc<Direct>,
}

impl<S: ExtentSource> DirectExtents<S> {
    /// `direct` is the file of `file_system`.
    pub fn new(file_system: S, direct: Arc<Direct>) -> Self {
        Self { file_system, direct }
    }

    /// Whether each byte of the range has a block already, and lies inside the file: a store to
    /// anything else is the file system's business.
    fn has_blocks(&self, from: u64, bytes: u64) -> io::Result<bool> {
        let end = from.checked_add(bytes).ok_or(Errno::EINVAL)?;
        if bytes == 0 || end > self.file_bytes()? {
            return Ok(false);
        }
        let (mut page, last) = (PageIndex::of_byte(from), PageIndex::of_byte(end - 1));
        while page <= last {
            let extent = self.extent(page, last.0 - page.0 + 1, Access::Read)?;
            if !extent.holds(page, 1) || !matches!(extent.backed, Backed::Mapped(_)) {
                return Ok(false);
            }
            page = PageIndex(extent.start.0 + extent.pages);
        }
        Ok(true)
    }

    /// Behaviour 12: a part of a page. One that has no block reads as zeros as it is.
    fn zero_part(&self, from: u64, end: u64) -> io::Result<()> {
        let bytes = end - from;
        if bytes > 0 && self.has_blocks(from, bytes)? {
            self.direct.zero(from, bytes)
        } else {
            Ok(())
        }
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

    /// Whole pages are the file system's; what sticks out at both ends is cleared through the map.
    fn zero(&self, from: u64, bytes: u64, keep: bool) -> io::Result<()> {
        let end = from.checked_add(bytes).ok_or(Errno::EINVAL)?.min(self.file_bytes()?.max(from));
        let (first, last) = (from.next_multiple_of(PAGE_BYTES), end / PAGE_BYTES * PAGE_BYTES);
        if first < last {
            self.zero_part(from, first)?;
            self.file_system.zero(first, last - first, keep)?;
            self.zero_part(last, end)?;
        } else {
            let middle = first.clamp(from, end);
            self.zero_part(from, middle)?;
            self.zero_part(middle, end)?;
        }
        self.direct.fence();
        Ok(())
    }

    fn read_at(&self, from: u64, to: &mut [u8]) -> io::Result<usize> {
        self.file_system.read_at(from, to)
    }

    fn write_at(&self, from: u64, bytes: &[u8]) -> io::Result<usize> {
        self.file_system.write_at(from, bytes)
    }
}
