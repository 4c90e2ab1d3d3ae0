// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory in memfds, and the one place of the tests that is opened for `unsafe`.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// A guest's RAM.
pub type GuestMem = GuestMemoryMmap<()>;

/// Bytes in each RAM region.
pub const RAM_REGION_BYTES: u64 = 2 << 20;

/// The guest-physical distance from one RAM region to the next: they never touch.
const RAM_REGION_STRIDE: u64 = 256 << 20;

/// RAM of `regions` regions, each in its own memfd; the rings live in the first one.
pub fn guest_ram(regions: u64) -> GuestMem {
    let ranges: Vec<_> = (0..regions)
        .map(|i| {
            let memfd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).unwrap();
            let file = File::from(memfd);
            file.set_len(RAM_REGION_BYTES).unwrap();
            let start = GuestAddress(i * RAM_REGION_STRIDE);
            (start, RAM_REGION_BYTES as usize, Some(FileOffset::new(file, 0)))
        })
        .collect();
    GuestMem::from_ranges_with_files(&ranges).unwrap()
}

/// A descriptor of our own for an fd that vhost only lends to its request handler.
pub fn own_fd(lent: &dyn AsRawFd) -> File {
    // SAFETY: `lent` is an open file for as long as we borrow it, which is this function.
    let borrowed = unsafe { BorrowedFd::borrow_raw(lent.as_raw_fd()) };
    let owned: OwnedFd = borrowed.as_fd().try_clone_to_owned().unwrap();
    File::from(owned)
}
