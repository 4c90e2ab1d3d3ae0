// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the place of a file's bytes on its device (FS_IOC_FIEMAP). Used only on a DAX file
//! system, where a PMD entry needs blocks that are aligned to 2 MiB on the device.

#![allow(unsafe_code)] // nix generates ioctls as unsafe functions.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use crate::window::{FileOffset, FileRange};

/// struct fiemap of linux/fiemap.h, with room for one extent.
#[repr(C)]
pub struct Fiemap {
    fm_start: u64,
    fm_length: u64,
    fm_flags: u32,
    fm_mapped_extents: u32,
    fm_extent_count: u32,
    fm_reserved: u32,
    extent: FiemapExtent,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct FiemapExtent {
    fe_logical: u64,
    fe_physical: u64,
    fe_length: u64,
    fe_reserved64: [u64; 2],
    fe_flags: u32,
    fe_reserved: [u32; 3],
}

const FIEMAP_EXTENT_UNKNOWN: u32 = 1 << 1;
const FIEMAP_EXTENT_ENCODED: u32 = 1 << 3;
const FIEMAP_EXTENT_UNWRITTEN: u32 = 1 << 11;

/// Size in bytes of `struct fiemap` without extents, as in FS_IOC_FIEMAP = _IOWR('f', 11, struct
/// fiemap).
const HEADER_BYTES: usize = size_of::<Fiemap>() - size_of::<FiemapExtent>();

nix::ioctl_readwrite_bad!(
    fs_ioc_fiemap,
    nix::request_code_readwrite!(b'f', 11, HEADER_BYTES),
    Fiemap
);

/// A range of a file whose bytes are consecutive on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// The range of the file.
    pub logical: FileRange,
    /// The offset of its first byte on the device, in bytes. None if the file system does not
    /// report it (FIEMAP_EXTENT_UNKNOWN), or stores the bytes encoded (FIEMAP_EXTENT_ENCODED).
    pub physical: Option<u64>,
    /// The blocks are allocated, and read as zeros until they are written.
    pub unwritten: bool,
}

/// The first piece that overlaps `range`. None if all of `range` is a hole.
///
/// # Errors
/// The error of ioctl(FS_IOC_FIEMAP): EOPNOTSUPP if the file system has no FIEMAP.
pub fn first_piece(file: &File, range: FileRange) -> io::Result<Option<Piece>> {
    let mut map = Fiemap {
        fm_start: range.from.0,
        fm_length: range.bytes,
        // Not FIEMAP_FLAG_SYNC: it would sync the file at each call, and a DAX file system has no
        // delayed allocation.
        fm_flags: 0,
        fm_mapped_extents: 0,
        fm_extent_count: 1,
        fm_reserved: 0,
        extent: FiemapExtent::default(),
    };
    // SAFETY: the descriptor is open, and `map` has room for the one extent (fm_extent_count) that
    // the kernel may write.
    unsafe { fs_ioc_fiemap(file.as_raw_fd(), &mut map)? };
    if map.fm_mapped_extents == 0 {
        return Ok(None);
    }
    let FiemapExtent { fe_logical, fe_physical, fe_length, fe_flags, .. } = map.extent;
    let known = fe_flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_ENCODED) == 0;
    Ok(Some(Piece {
        logical: FileRange::new(FileOffset(fe_logical), fe_length),
        physical: known.then_some(fe_physical),
        unwritten: fe_flags & FIEMAP_EXTENT_UNWRITTEN != 0,
    }))
}
