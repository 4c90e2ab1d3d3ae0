// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The backing of a file, and the choice of how its bytes become durable.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use nix::sys::statfs;
use thiserror::Error;

use super::cacheline::Instruction;
use super::device_dax::DaxNode;
use super::file_systems::{FileSystem, Tried};
use super::mapped::{Direct, Lines, maps_sync};
use super::{Fdatasync, Persist};

/// What a file lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// The page cache, over a tested file system that rewrites a block in place.
    PageCache,
    /// The page cache, over a tested file system that writes each store to a new block.
    CopyOnWrite,
    /// Persistent memory, under a file system that maps it (`-o dax`): MAP_SYNC works.
    DaxFile,
    /// A device-DAX node (`/dev/dax0.0`): persistent memory without a file system.
    DeviceDax,
    /// Memory: tmpfs, memfd, ramfs, hugetlbfs.
    Memory,
    /// A file system that was not tested: whether its fdatasync survives a power loss is not known.
    Unknown(FileSystem),
}

impl Backing {
    /// The backing of `file`, by sysfs, fstatfs(2) and a trial of mmap(2) with MAP_SYNC.
    pub fn of(file: &File) -> Self {
        if DaxNode::of(file).is_ok_and(|node| node.is_some()) {
            return Self::DeviceDax;
        }
        match Self::of_file_system(file) {
            Self::PageCache if maps_sync(file) => Self::DaxFile,
            backing => backing,
        }
    }

    /// The backing of files in the directory `dir`, by an unnamed file (O_TMPFILE) that is closed
    /// again.
    pub fn of_dir(dir: &Path) -> Self {
        let unnamed = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_TMPFILE)
            .mode(0o600)
            .open(dir);
        match unnamed {
            Ok(file) => Self::of(&file),
            Err(_) => match File::open(dir) {
                Ok(dir) => Self::of_file_system(&dir),
                Err(_) => Self::Unknown(FileSystem { magic: 0 }),
            },
        }
    }

    fn of_file_system(file: &File) -> Self {
        let found = statfs::fstatfs(file).map(|found| FileSystem::of(found.filesystem_type().0));
        let found = found.unwrap_or(FileSystem { magic: 0 });
        match found.tried() {
            Some(Tried::InPlace) => Self::PageCache,
            Some(Tried::CopyOnWrite) => Self::CopyOnWrite,
            Some(Tried::Memory) => Self::Memory,
            None => Self::Unknown(found),
        }
    }

    /// The warning that the daemon logs at start for this backing, if any.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::PageCache | Self::DaxFile | Self::DeviceDax => None,
            Self::CopyOnWrite => Some(COPY_ON_WRITE),
            Self::Unknown(found) => found.writes_elsewhere().then_some(COPY_ON_WRITE),
            Self::Memory => Some("lies in memory: no data survives a power loss"),
        }
    }

    fn name(self) -> String {
        match self {
            Self::PageCache | Self::CopyOnWrite => "the page cache".into(),
            Self::DaxFile => "a DAX file system".into(),
            Self::DeviceDax => "device-DAX".into(),
            Self::Memory => "memory".into(),
            Self::Unknown(found) => format!("an unknown file system, {}", found.name()),
        }
    }

    /// What the data that an answered flush covers survives, as a sentence with the data as
    /// subject.
    fn promise(self) -> &'static str {
        match self {
            Self::PageCache | Self::CopyOnWrite | Self::DaxFile | Self::DeviceDax => {
                "survives this daemon, the VM and power loss"
            }
            Self::Memory => "survives this daemon and the VM, but no power loss",
            Self::Unknown(_) => {
                "is as durable as that file system's fdatasync makes it: this daemon was not \
                 tested on it with power loss"
            }
        }
    }
}

const COPY_ON_WRITE: &str = "lies on a copy-on-write file system: even an allocated file needs \
     free space for each store, and a store without free space kills the VM; keep space free";

/// `--persist`: how the guest's stores become durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PersistMode {
    /// Cache lines on device-DAX, else fdatasync(2).
    #[default]
    Auto,
    /// By fdatasync(2).
    Sync,
    /// By cache lines, which the daemon writes back.
    Cacheline,
}

/// Why a [`PersistMode`] is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PersistError {
    /// `cacheline` for a file in the page cache.
    #[error(
        "--persist=cacheline: the file is in the page cache: cache lines that are written back \
         there do not survive a power loss; take auto or sync"
    )]
    PageCache,
    /// `sync` on device-DAX.
    #[error("--persist=sync: a device-DAX node has no sync; take auto or cacheline")]
    DeviceDax,
    /// The processor has no instruction that writes a cache line back from user mode.
    #[error("--persist=cacheline: this processor can't write back cache lines; take sync")]
    NoInstruction,
}

/// How flushes are done for a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durability {
    /// What the file lies on.
    pub backing: Backing,
    /// The instruction that writes cache lines back. None if a flush is an fdatasync(2).
    pub instruction: Option<Instruction>,
}

impl Durability {
    /// # Errors
    /// See [`PersistError`].
    pub fn choose(backing: Backing, mode: PersistMode) -> Result<Self, PersistError> {
        let lines = match (mode, backing) {
            (PersistMode::Sync, Backing::DeviceDax) => return Err(PersistError::DeviceDax),
            (
                PersistMode::Cacheline,
                Backing::PageCache | Backing::CopyOnWrite | Backing::Unknown(_),
            ) => {
                return Err(PersistError::PageCache);
            }
            (PersistMode::Sync, _) => false,
            (PersistMode::Cacheline, _) => true,
            // Not for memory: writing lines back takes 12 ms for each GiB, and the data does not
            // survive a power loss.
            (PersistMode::Auto, backing) => backing == Backing::DeviceDax,
        };
        let instruction = lines.then(Instruction::best);
        if instruction == Some(None) {
            return Err(PersistError::NoInstruction);
        }
        Ok(Self { backing, instruction: instruction.flatten() })
    }

    /// The choice for one file of a share, which may lie on another file system than the share's
    /// directory. Where `mode` is refused, a flush is an fdatasync(2).
    pub fn of_file(file: &File, mode: PersistMode) -> Self {
        let backing = Backing::of(file);
        Self::choose(backing, mode).unwrap_or(Self { backing, instruction: None })
    }

    /// One line for the log: how a flush is done, and what an answered flush survives.
    pub fn promise(self) -> String {
        let flush = match self.instruction {
            Some(instruction) => format!("{instruction} over the dirty lines, and a fence"),
            None => "fdatasync".into(),
        };
        let (name, promise) = (self.backing.name(), self.backing.promise());
        format!("{name}: a flush is {flush}; data of an answered flush {promise}")
    }

    /// Whether each page of a file needs a block before the guest stores to it
    /// ([`Direct::populate_blocks`]).
    pub fn populates_blocks(self) -> bool {
        self.backing == Backing::DaxFile && self.instruction.is_some()
    }

    /// The [`Persist`] of one file of `bytes` bytes.
    ///
    /// # Errors
    /// See [`Direct::new`].
    pub fn persist(self, file: &Arc<File>, bytes: u64) -> io::Result<FilePersist> {
        let direct = self
            .instruction
            .map(|instruction| Direct::new(file.clone(), bytes, self.backing, instruction));
        Ok(match direct.transpose()? {
            Some(direct) => {
                FilePersist { persist: Persist::lines(Lines(direct.clone())), direct: Some(direct) }
            }
            None => FilePersist { persist: Persist::kernel(Fdatasync(file.clone())), direct: None },
        })
    }
}

/// The durability of one file.
pub struct FilePersist {
    /// How its stores become durable.
    pub persist: Persist,
    /// This process's map of the file. None if a flush is an fdatasync(2).
    pub direct: Option<Arc<Direct>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: for each backing, whether each `--persist` mode flushes by cache lines, by fdatasync
    /// or is refused.
    #[test]
    fn each_backing_has_its_means() {
        let lines = |backing, mode| {
            Durability::choose(backing, mode).map(|chosen| chosen.instruction.is_some())
        };
        use {Backing as B, PersistMode as M};
        for (backing, auto, sync, cacheline) in [
            (B::PageCache, Ok(false), Ok(false), Err(PersistError::PageCache)),
            (B::CopyOnWrite, Ok(false), Ok(false), Err(PersistError::PageCache)),
            (
                B::Unknown(FileSystem { magic: 1 }),
                Ok(false),
                Ok(false),
                Err(PersistError::PageCache),
            ),
            (B::DaxFile, Ok(false), Ok(false), Ok(true)),
            (B::DeviceDax, Ok(true), Err(PersistError::DeviceDax), Ok(true)),
            (B::Memory, Ok(false), Ok(false), Ok(true)),
        ] {
            assert_eq!(lines(backing, M::Auto), auto, "{backing:?}");
            assert_eq!(lines(backing, M::Sync), sync, "{backing:?}");
            assert_eq!(lines(backing, M::Cacheline), cacheline, "{backing:?}");
        }
    }

    /// Shows: the backing of real files on a disk and in memory. (A DAX file and a device-DAX node:
    /// tests/process/direct_access.rs.)
    #[test]
    fn what_files_lie_in() {
        let on_disk = tempfile::tempfile_in(".").unwrap();
        assert!(!matches!(Backing::of(&on_disk), Backing::DeviceDax | Backing::Memory));
        assert_eq!(Backing::of_dir(Path::new(".")), Backing::of(&on_disk));
        let memory = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(Backing::of(&memory), Backing::Memory);
        assert_eq!(Backing::of_dir(Path::new("/dev/shm")), Backing::Memory);
        let null = File::open("/dev/null").unwrap();
        assert_eq!(DaxNode::of(&null).unwrap(), None);
    }
}
