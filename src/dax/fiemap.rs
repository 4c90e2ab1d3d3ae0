// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: where a file's bytes lie on its device (FS_IOC_FIEMAP). Only of interest on a DAX
//! file system: whether 2 MiB can be one entry depends on it.

#![allow(unsafe_code)] // An ioctl has no safe form.

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

/// FS_IOC_FIEMAP is _IOWR('f', 11, struct fiemap), where that has no extents.
const HEADER_BYTES: usize = size_of::<Fiemap>() - size_of::<FiemapExtent>();

nix::ioctl_readwrite_bad!(
    fs_ioc_fiemap,
    nix::request_code_readwrite!(b'f', 11, HEADER_BYTES),
    Fiemap
);

/// A piece of a file that lies on its device in one piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Where in the file it lies.
    pub logical: FileRange,
    /// Its first byte on the device; None where the file system does not say, or it is not as it is
    /// read.
    pub physical: Option<u64>,
    /// It has blocks, and reads as zeros until they are written.
    pub unwritten: bool,
}

/// The first piece that has a byte of `range`, if there is one.
///
/// # Errors
/// The system's: EOPNOTSUPP where the file system can't say.
pub fn first_piece(file: &File, range: FileRange) -> io::Result<Option<Piece>> {
    let mut map = Fiemap {
        fm_start: range.from.0,
        fm_length: range.bytes,
        // Not FIEMAP_FLAG_SYNC: a DAX file system delays no allocation, and each look would sync
        // the file.
        fm_flags: 0,
        fm_mapped_extents: 0,
        fm_extent_count: 1,
        fm_reserved: 0,
        extent: FiemapExtent::default(),
    };
    // SAFETY: the kernel writes one extent at most, for which there is room.
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
