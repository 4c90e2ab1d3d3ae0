// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file whose dirty pages the kernel knows.

#![allow(unsafe_code)] // One system call that no crate has.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use nix::errno::Errno;

use super::KernelSync;

/// A file in the page cache or on a DAX file system: the kernel knows what is dirty.
pub struct Fdatasync(pub Arc<File>);

impl KernelSync for Fdatasync {
    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    /// The kernel tells each open file once of pages that were lost, whoever synced.
    fn check(&self) -> io::Result<()> {
        // SAFETY: a descriptor that is ours, and three numbers.
        let done = unsafe {
            libc::sync_file_range(self.0.as_raw_fd(), 0, 1, libc::SYNC_FILE_RANGE_WAIT_BEFORE)
        };
        Ok(Errno::result(done).map(drop)?)
    }
}
