// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 6 of 6: which pages of a file are dirty, and how they become clean without a sync.

#![allow(unsafe_code)] // Two system calls that no crate has.

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

/// How many pages of the page cache are dirty in `range` of `file`. Those that are on their way to
/// the disk are not.
///
/// A file on a DAX file system has no page cache: cachestat(2) takes its entries for those of
/// evicted pages, and brings the kernel down (seen with Linux 6.12).
///
/// # Errors
/// The system's: ENOSYS before Linux 6.5; EOPNOTSUPP on a DAX file system.
pub fn dirty_pages(file: &File, range: FileRange) -> io::Result<u64> {
    let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    if found.stx_attributes.contains(StatxAttributes::DAX) {
        return Err(Errno::EOPNOTSUPP.into());
    }
    let range = Range { from: range.from.0, bytes: range.bytes };
    let mut counts = Counts::default();
    // SAFETY: a descriptor that is open for as long as it is borrowed, which is this call; the
    // kernel reads `range`, and writes `counts`, which have the layouts that it knows.
    let done = unsafe {
        let (range, counts) = (&raw const range, &raw mut counts);
        libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), range, counts, 0)
    };
    Errno::result(done)?;
    Ok(counts.dirty)
}

/// Starts to write the dirty pages of the range to the disk. When it returns they are clean, and
/// the next store to one is seen by the file system; they are not durable. A page that is under
/// writeback and was made dirty anew meanwhile is left out: see [`wait_for_writeback`].
///
/// # Errors
/// The file system's. Pages may be lost then, and the kernel may have told nobody else.
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
    // SAFETY: a descriptor that is open for as long as it is borrowed, and three numbers.
    let done = unsafe { libc::sync_file_range(file.as_raw_fd(), from, bytes, flags) };
    Ok(Errno::result(done).map(drop)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::support::units::{PAGE_BYTES, PageIndex};

    /// Shows: what was written is dirty, in its range and in no other, until it is written out.
    /// (The page cache may have it in pieces that are larger than a page.)
    #[test]
    fn written_pages_are_dirty_until_they_are_written_out() {
        let file = tempfile::tempfile_in(".").unwrap();
        let pages = |first, count: u64| FileRange::new(PageIndex(first).byte(), count * PAGE_BYTES);
        let unknown = dirty_pages(&file, pages(0, 1));
        if unknown.is_err_and(|e| e.raw_os_error() == Some(libc::EOPNOTSUPP)) {
            return; // A DAX file system: no page is dirty, or may be asked for.
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
