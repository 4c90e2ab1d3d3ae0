// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 6 of 6: the number of dirty pages of a file, and their write-out without a sync.

#![allow(unsafe_code)] // cachestat(2) and sync_file_range(2), which nix and rustix lack.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, statx};

use crate::support::units::FileRange;

/// cachestat(2), the same number on every architecture (linux/include/uapi/asm-generic/unistd.h).
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct Range {
    from: u64,
    bytes: u64,
}

/// `struct cachestat` of linux/mman.h.
#[repr(C)]
#[derive(Default)]
struct Counts {
    cached: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Number of dirty pages of the page cache in `range` of `file`. Pages under writeback are not
/// counted.
///
/// A file on a DAX file system has no page cache. There cachestat(2) reads DAX entries as entries
/// of evicted pages, and crashes the kernel (seen with Linux 6.12), so it is not called.
///
/// # Errors
/// EOPNOTSUPP on a DAX file system; the error of cachestat(2): ENOSYS before Linux 6.5.
pub fn dirty_pages(file: &File, range: FileRange) -> io::Result<u64> {
    let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    if found.stx_attributes.contains(StatxAttributes::DAX) {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let range = Range { from: range.from.0, bytes: range.bytes };
    let mut counts = Counts::default();
    // SAFETY: the descriptor is borrowed for this call, so it is open. The kernel reads `range` and
    // writes `counts`, whose layouts are those of linux/mman.h.
    let done = unsafe {
        let (range, counts) = (&raw const range, &raw mut counts);
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range, counts, 0)
    };
    Errno::result(done)?;
    Ok(counts.dirty)
}

/// Starts to write the dirty pages of the range to the disk. On return they are clean, but not
/// durable, and the file system notices the next store to one of them. A page that is under
/// writeback and was dirtied again is left out: see [`wait_for_writeback`].
///
/// # Errors
/// The error of sync_file_range(2), usually EIO. Pages may be lost then, and the kernel may report
/// that to no later call.
pub fn write_out(file: &File, range: FileRange) -> io::Result<()> {
    sync_file_range(file, range, libc::SYNC_FILE_RANGE_WRITE)
}

/// Waits until no page of the range is under writeback.
///
/// # Errors
/// See [`write_out`].
pub fn wait_for_writeback(file: &File, range: FileRange) -> io::Result<()> {
    sync_file_range(file, range, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
}

fn sync_file_range(file: &File, range: FileRange, flags: libc::c_uint) -> io::Result<()> {
    let (from, bytes) = (range.from.0.cast_signed(), range.bytes.cast_signed());
    // SAFETY: the descriptor is borrowed for this call, so it is open; the other arguments are
    // numbers.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), from, bytes, flags) };
    Ok(Errno::result(done).map(drop)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::support::units::{PAGE_BYTES, PageIndex};

    /// Shows: written pages are dirty, and no pages of other ranges are, until they are written
    /// out. (A folio of the page cache may be larger than a page.)
    #[test]
    fn written_pages_are_dirty_until_they_are_written_out() {
        let file = tempfile::tempfile_in(".").unwrap();
        let pages = |first, count: u64| FileRange::new(PageIndex(first).byte(), count * PAGE_BYTES);
        let unknown = dirty_pages(&file, pages(0, 1));
        if unknown.is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            return; // A DAX file system has no page cache.
        }
        let dirty = |first, count| dirty_pages(&file, pages(first, count)).unwrap();
        file.write_all_at(&[1; 3 * 4096], 512 * 4096).unwrap();
        assert!(dirty(512, 3) >= 3 && dirty(0, 512) == 0 && dirty(1024, 512) == 0);
        write_out(&file, pages(0, 512)).unwrap();
        assert!(dirty(512, 3) >= 3, "another range was written out");
        write_out(&file, pages(0, 1 << 18)).unwrap();
        assert_eq!(dirty(0, 1024), 0);
    }
}
