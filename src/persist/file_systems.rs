// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file systems on which this daemon was tested, and known properties of others. Knows no file.

use nix::libc;

/// A file system, by its `f_type` of statfs(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// `f_type`. 0 if statfs(2) failed.
    pub magic: u32,
}

/// The result of the tests on a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// Data survives a power loss after a successful fdatasync. A block is rewritten in place.
    InPlace,
    /// Data survives a power loss after a successful fdatasync. Each store is written to a new
    /// block.
    CopyOnWrite,
    /// No data survives a power loss.
    Memory,
}

/// ext2, ext3 and ext4 have the same number.
const EXT: u32 = 0xef53;
const XFS: u32 = 0x5846_5342;
const BTRFS: u32 = 0x9123_683e;
const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58f6;
const HUGETLBFS: u32 = 0x9584_58f6;

/// Tested file systems: ext4, xfs and btrfs by tests/guest/crash.rs, which simulates power loss;
/// file systems in memory by tests/process/cli.rs and tests/process/start.rs.
const TRIED: [(u32, Tried); 6] = [
    (EXT, Tried::InPlace),
    (XFS, Tried::InPlace),
    (BTRFS, Tried::CopyOnWrite),
    (TMPFS, Tried::Memory),
    (RAMFS, Tried::Memory),
    (HUGETLBFS, Tried::Memory),
];

/// Untested file systems: number, name, and whether each store needs a new block. From
/// linux/magic.h and the sources of ZFS.
const KNOWN: [(u32, &str, bool); 15] = [
    (0xca45_1a4e, "bcachefs", true),
    (0x2fc1_2fc1, "ZFS", true),
    (0x3434, "nilfs2", true),
    (0xf2f5_2010, "f2fs", false),
    (0x794c_7630, "overlayfs", false),
    (0x6573_5546, "FUSE", false),
    (0x6969, "NFS", false),
    (0xff53_4d42, "SMB", false),
    (0xfe53_4d42, "SMB", false),
    (0x00c3_6400, "Ceph", false),
    (0x0102_1997, "9p", false),
    (0x0bd0_0bd0, "Lustre", false),
    (0x4d44, "vfat", false),
    (0x2011_bab0, "exfat", false),
    (0x0116_1970, "gfs2", false),
];

impl FileSystem {
    pub(super) fn of(magic: libc::__fsword_t) -> Self {
        // `f_type` has 32 significant bits; its C type is signed or unsigned by architecture.
        Self { magic: magic as u32 }
    }

    /// The result of the tests. None if the file system was not tested.
    pub(super) fn tried(self) -> Option<Tried> {
        TRIED.iter().find(|(magic, _)| *magic == self.magic).map(|(_, tried)| *tried)
    }

    /// Whether each store is known to need a new block. False if that is not known.
    pub(super) fn writes_elsewhere(self) -> bool {
        self.tried() == Some(Tried::CopyOnWrite)
            || KNOWN.iter().any(|(magic, _, elsewhere)| *magic == self.magic && *elsewhere)
    }

    /// The number in hexadecimal and, if known, the name: for the log.
    pub(super) fn name(self) -> String {
        let known = KNOWN.iter().find(|(magic, ..)| *magic == self.magic);
        let name = known.map(|(_, name, _)| format!(" ({name})")).unwrap_or_default();
        format!("{:#x}{name}", self.magic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: each tested file system has the result of its tests, and no other has any.
    #[test]
    fn only_tested_file_systems_have_a_result() {
        let tried = |magic| FileSystem { magic }.tried();
        assert_eq!(tried(0xef53), Some(Tried::InPlace));
        assert_eq!(tried(0x5846_5342), Some(Tried::InPlace));
        assert_eq!(tried(0x9123_683e), Some(Tried::CopyOnWrite));
        for memory in [0x0102_1994, 0x8584_58f6, 0x9584_58f6] {
            assert_eq!(tried(memory), Some(Tried::Memory));
        }
        for (magic, name, elsewhere) in KNOWN {
            let found = FileSystem { magic };
            assert_eq!(found.tried(), None, "{name}");
            assert_eq!(found.writes_elsewhere(), elsewhere, "{name}");
            assert!(found.name().ends_with(&format!(" ({name})")));
        }
        let untested = FileSystem { magic: 0x1234 };
        assert_eq!((untested.tried(), untested.name()), (None, "0x1234".into()));
    }
}
