// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What kind of file system a file lies on, and what that means for durability.

use std::fs::File;

use nix::sys::statfs::{self, BTRFS_SUPER_MAGIC, HUGETLBFS_MAGIC, TMPFS_MAGIC};

/// What a successful sync is worth on this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// A file system that keeps its blocks in place: allocated blocks stay allocated.
    InPlace,
    /// A file system that writes every block to a new place: a store may need space.
    CopyOnWrite,
    /// Memory: nothing survives power loss.
    Memory,
}

impl Backing {
    /// Asks the file system. One that can't say is taken for an ordinary one.
    pub fn of(file: &File) -> Self {
        match statfs::fstatfs(file).map(|s| s.filesystem_type()) {
            Ok(TMPFS_MAGIC | HUGETLBFS_MAGIC) => Self::Memory,
            Ok(BTRFS_SUPER_MAGIC) => Self::CopyOnWrite,
            _ => Self::InPlace,
        }
    }

    /// What the user must know at start, if anything.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::InPlace => None,
            Self::CopyOnWrite => Some(
                "lies on a copy-on-write file system: even an allocated file needs free space \
                 for each store, and a store that finds none kills the VM; keep space free",
            ),
            Self::Memory => {
                Some("lies in memory: a flush succeeds at once, and nothing survives power loss")
            }
        }
    }
}
