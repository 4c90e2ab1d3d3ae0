// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A sync by fdatasync(2), for a file whose dirty pages the kernel tracks.

#![allow(unsafe_code)] // sync_file_range(2), which nix and rustix lack.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::KernelSync;

/// A file in the page cache or on a DAX file system.
pub struct Fdatasync(pub Arc<File>);

impl KernelSync for Fdatasync {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    /// The kernel reports lost pages once through each open file description, whichever process
    /// has synced. sync_file_range(2) with SYNC_FILE_RANGE_WAIT_BEFORE returns that report without
    /// a sync.
    fn check(&self) -> io::Result<()> {
        // SAFETY: the descriptor is owned by `self`, so it is open; the other arguments are
        // numbers.
        let done = unsafe {
            libc::sync_file_range(self.0.as_raw_fd(), 0, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
        };
        Ok(Errno::result(done).map(drop)?)
    }
}
