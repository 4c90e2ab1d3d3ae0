// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which file it is: whatever path, descriptor or number of a guest led to it.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{AtFlags, StatxFlags, makedev, statx};

/// A file of the host: the number of its inode, and the device that this number is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct FileId {
    /// Inode number. First, so that those of one number stand together.
    pub(crate) ino: u64,
    pub(crate) dev: u64,
}

impl FileId {
    /// That of an open file. No attribute is asked for, which for a passthrough file would be a
    /// request to its server.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn of(file: &File) -> io::Result<Self> {
        let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO)?;
        let dev = makedev(found.stx_dev_major, found.stx_dev_minor);
        Ok(Self { ino: found.stx_ino, dev })
    }

    /// The first one of an inode number, on whatever device.
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

    /// Shows: a descriptor and a path lead to the same identity, two files to two.
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
