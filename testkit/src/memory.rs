// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory in memfds.

use std::fs::File;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// A guest's RAM.
pub type GuestMem = GuestMemoryMmap<()>;

/// Length of a RAM region, in bytes.
pub const RAM_REGION_BYTES: u64 = 2 << 20;

/// Distance of the guest addresses of two RAM regions, in bytes: regions are never adjacent.
const RAM_REGION_STRIDE: u64 = 256 << 20;

/// RAM of `regions` regions, each in its own memfd. The rings are in the first region.
pub fn guest_ram(regions: u64) -> GuestMem {
    guest_ram_with(RAM_REGION_BYTES, regions)
}

/// RAM of `regions` regions, of which the first has `first_bytes` bytes.
pub fn guest_ram_with(first_bytes: u64, regions: u64) -> GuestMem {
    assert!(first_bytes < RAM_REGION_STRIDE);
    let ranges: Vec<_> = (0..regions)
        .map(|i| {
            let memfd = memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).unwrap();
            let file = File::from(memfd);
            let bytes = if i == 0 { first_bytes } else { RAM_REGION_BYTES };
            file.set_len(bytes).unwrap();
            let start = GuestAddress(i * RAM_REGION_STRIDE);
            (start, bytes as usize, Some(FileOffset::new(file, 0)))
        })
        .collect();
    GuestMem::from_ranges_with_files(&ranges).unwrap()
}
