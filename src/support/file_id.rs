// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The identity of a host file, independent of the path, descriptor or node id that led to it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, StatxFlags, makedev, statx};

/// The identity of a host file: its inode number and its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId {
    /// Inode number. The first field, so that files of one inode number are adjacent in a sorted
    /// map.
    pub(crate) ino: u64,
    pub(crate) dev: u64,
}

impl FileId {
    /// The identity of an open file. Only the inode number is queried: a passthrough file's other
    /// attributes would cost a request to its FUSE server.
    ///
    /// # Errors
    /// The errno of statx(2).
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
        let dev = makedev(found.stx_dev_major, found.stx_dev_minor);
        Ok(Self { ino: found.stx_ino, dev })
    }

    /// The lowest identity of an inode number, in the sort order.
    pub(crate) const fn first_of(ino: u64) -> Self {
        Self { ino, dev: 0 }
    }
}

impl From<Metadata> for FileId {
    fn from(found: Metadata) -> Self {
        Self { ino: found.ino(), dev: found.dev() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: a descriptor and a path of one file have the same identity; two files have different
    /// ones.
    #[test]
    fn of_a_descriptor_and_of_a_path() {
        let of = |path: &str| {
            let by_path = FileId::from(std::fs::metadata(path).unwrap());
            assert_eq!(FileId::of(&File::open(path).unwrap()).unwrap(), by_path, "{path}");
            by_path
        };
        let all = [of("/dev/null"), of("/dev/shm"), of("/proc/self"), of("."), of("Cargo.toml")];
        assert!((1..all.len()).all(|i| !all[..i].contains(&all[i])), "{all:?}");
    }
}
