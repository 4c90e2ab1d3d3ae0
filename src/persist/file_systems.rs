// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file systems that this daemon was tried on, and what is known of others. Knows no file.

use nix::libc;

/// A file system, by the number that statfs(2) has for it (`f_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// 0 where the kernel has not told it.
    pub magic: u32,
}

/// What was found by trying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tried {
    /// An fdatasync that has succeeded outlives a power loss. Blocks stay in place.
    InPlace,
    /// The same, but each store is written to a new place.
    CopyOnWrite,
    /// Nothing outlives a power loss.
    Memory,
}

/// ext4 has its number from ext2, as ext3 has.
const EXT: u32 = 0xef53;
const XFS: u32 = 0x5846_5342;
const BTRFS: u32 = 0x9123_683e;
const TMPFS: u32 = 0x0102_1994;
const RAMFS: u32 = 0x8584_58f6;
const HUGETLBFS: u32 = 0x9584_58f6;

/// Tried: ext4, xfs and btrfs by tests/guest/crash.rs, which takes the power away; what is in
/// memory by tests/process/cli.rs and start.rs beside it.
const TRIED: [(u32, Tried); 6] = [
    (EXT, Tried::InPlace),
    (XFS, Tried::InPlace),
    (BTRFS, Tried::CopyOnWrite),
    (TMPFS, Tried::Memory),
    (RAMFS, Tried::Memory),
    (HUGETLBFS, Tried::Memory),
];

/// Not tried: what it is called, and whether each store needs a new block there. (linux/magic.h,
/// and the sources of ZFS.)
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
        Self { magic: magic as u32 } // All of them have 32 bits; some machines' words are signed.
    }

    /// None: nobody has tried it.
    pub(super) fn tried(self) -> Option<Tried> {
        TRIED.iter().find(|(magic, _)| *magic == self.magic).map(|(_, tried)| *tried)
    }

    /// Whether it is known that each store needs a new block.
    pub(super) fn writes_elsewhere(self) -> bool {
        self.tried() == Some(Tried::CopyOnWrite)
            || KNOWN.iter().any(|(magic, _, elsewhere)| *magic == self.magic && *elsewhere)
    }

    /// As a user may know it.
    pub(super) fn name(self) -> String {
        let known = KNOWN.iter().find(|(magic, ..)| *magic == self.magic);
        let name = known.map(|(_, name, _)| format!(" ({name})")).unwrap_or_default();
        format!("{:#x}{name}", self.magic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: what was tried keeps what was found, and nothing else is promised anything.
    #[test]
    fn only_what_was_tried_is_promised_anything() {
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
        let nobodys = FileSystem { magic: 0x1234 };
        assert_eq!((nobodys.tried(), nobodys.name()), (None, "0x1234".into()));
    }
}
