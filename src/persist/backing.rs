// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a file's bytes lie in, who knows which of them are dirty, and so what makes them durable.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::sys::stat::{major, minor};
use nix::sys::statfs;
use thiserror::Error;

use super::cacheline::Instruction;
use super::file_systems::{FileSystem, Tried};
use super::mapped::{Direct, Lines, maps_sync};
use super::{Fdatasync, Persist};
use crate::support::lock::lock;
use crate::support::units::{PAGE_BYTES, PMD_BYTES};

/// What a file's bytes lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// The page cache, over a file system that keeps its blocks in place, and was tried.
    PageCache,
    /// The page cache, over a file system that writes every block to a new place, and was tried.
    CopyOnWrite,
    /// Persistent memory, under a file system that maps it (`-o dax`): MAP_SYNC works.
    DaxFile,
    /// A device-DAX node (`/dev/dax0.0`): persistent memory with no file system.
    DeviceDax,
    /// Memory: tmpfs, memfd, ramfs, hugetlbfs.
    Memory,
    /// A file system that nobody has tried, and of whose fdatasync nothing is known.
    Unknown(FileSystem),
}

impl Backing {
    /// Asks the kernel.
    pub fn of(file: &File) -> Self {
        if DaxNode::of(file).is_ok_and(|node| node.is_some()) {
            return Self::DeviceDax;
        }
        match Self::of_file_system(file) {
            Self::PageCache if maps_sync(file) => Self::DaxFile,
            backing => backing,
        }
    }

    /// The same of what files in a directory lie in. Nothing is left there.
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

    /// What the user must know at start, if anything.
    pub fn warning(self) -> Option<&'static str> {
        match self {
            Self::PageCache | Self::DaxFile | Self::DeviceDax => None,
            Self::CopyOnWrite => Some(COPY_ON_WRITE),
            Self::Unknown(found) => found.writes_elsewhere().then_some(COPY_ON_WRITE),
            Self::Memory => Some("lies in memory: nothing survives power loss"),
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

    /// What an answered flush is worth.
    fn promise(self) -> &'static str {
        match self {
            Self::PageCache | Self::CopyOnWrite | Self::DaxFile | Self::DeviceDax => {
                "survives this daemon, the VM and power loss"
            }
            Self::Memory => "survives this daemon and the VM, but no power loss",
            Self::Unknown(_) => {
                "is as durable as that file system's own fdatasync makes it: nobody has tried \
                 whether it survives power loss"
            }
        }
    }
}

const COPY_ON_WRITE: &str = "lies on a copy-on-write file system: even an allocated file needs free space \
     for each store, and a store that finds none kills the VM; keep space free";

/// `--persist`: who makes the guest's stores durable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PersistMode {
    /// What the backing asks for.
    #[default]
    Auto,
    /// The kernel.
    Sync,
    /// We, by cache lines.
    Cacheline,
}

/// Why a [`PersistMode`] can't be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PersistError {
    /// `cacheline` on the page cache.
    #[error(
        "--persist=cacheline: the file is in the page cache, where a line that was written back is lost \
         with the power all the same; take auto or sync"
    )]
    PageCache,
    /// `sync` on device-DAX.
    #[error("--persist=sync: a device-DAX node has no sync; take auto or cacheline")]
    DeviceDax,
    /// A processor that has none of the instructions.
    #[error("--persist=cacheline: this processor can't write back cache lines; take sync")]
    NoInstruction,
}

/// What was chosen for a backing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Durability {
    /// What the bytes lie in.
    pub backing: Backing,
    /// What writes them back from user mode; None where the kernel does all.
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
            // In memory nothing is gained by lines: 12 ms for each GiB of them, and no power loss
            // survived.
            (PersistMode::Auto, backing) => backing == Backing::DeviceDax,
        };
        let instruction = lines.then(Instruction::best);
        if instruction == Some(None) {
            return Err(PersistError::NoInstruction);
        }
        Ok(Self { backing, instruction: instruction.flatten() })
    }

    /// For one file of a share, which may lie on another file system than the share: what can't be
    /// had there is the kernel's business.
    pub fn of_file(file: &File, mode: PersistMode) -> Self {
        let backing = Backing::of(file);
        Self::choose(backing, mode).unwrap_or(Self { backing, instruction: None })
    }

    /// One line: what a flush is, and what it promises.
    pub fn promise(self) -> String {
        let flush = match self.instruction {
            Some(instruction) => format!("{instruction} over the dirty lines, and a fence"),
            None => "fdatasync".into(),
        };
        let (name, promise) = (self.backing.name(), self.backing.promise());
        format!("{name}: a flush is {flush}; what it has answered for {promise}")
    }

    /// Whether each page of a file must have its block beforehand ([`Direct::populate_blocks`]).
    pub fn populates_blocks(self) -> bool {
        self.backing == Backing::DaxFile && self.instruction.is_some()
    }

    /// What keeps the promise for one file of `bytes`.
    ///
    /// # Errors
    /// The system's.
    pub fn persist(self, file: &Arc<File>, bytes: u64) -> io::Result<FilePersist> {
        let direct = self
            .instruction
            .map(|instruction| Direct::new(file.clone(), bytes, self.backing, instruction));
        Ok(match direct.transpose()? {
            Some(direct) => {
                FilePersist { persist: Box::new(Lines::of(direct.clone())), direct: Some(direct) }
            }
            None => FilePersist { persist: Box::new(Fdatasync(file.clone())), direct: None },
        })
    }
}

/// What makes one file durable.
pub struct FilePersist {
    /// The seam.
    pub persist: Box<dyn Persist>,
    /// The file's own memory, where cache lines count.
    pub direct: Option<Arc<Direct>>,
}

/// A device-DAX node, as sysfs describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DaxNode {
    /// Its length: a multiple of its alignment, so that a map of all of it is as aligned as it must
    /// be.
    pub bytes: u64,
    /// Its alignment: no smaller piece can be mapped, or taken out of a map.
    pub align: u64,
}

impl DaxNode {
    /// None for anything else.
    ///
    /// # Errors
    /// The system's, and InvalidData where sysfs says no number.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let found = file.metadata()?;
        if !found.file_type().is_char_device() {
            return Ok(None);
        }
        let number = found.rdev();
        // A process that is shut in sees no /sys: what was looked at before is known.
        static KNOWN: Mutex<BTreeMap<u64, DaxNode>> = Mutex::new(BTreeMap::new());
        if let Some(known) = lock(&KNOWN).get(&number) {
            return Ok(Some(*known));
        }
        let node = PathBuf::from(format!("/sys/dev/char/{}:{}", major(number), minor(number)));
        let subsystem = fs::canonicalize(node.join("subsystem")).unwrap_or_default();
        if subsystem.file_name().is_none_or(|name| name != "dax") {
            return Ok(None);
        }
        let value = |name: &str| {
            let text = fs::read_to_string(node.join(name))?;
            text.trim().parse::<u64>().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        // Before Linux 5.10 only the region has one; nearly all have that of a huge page.
        let align = value("align").or_else(|_| value("../dax_region/align"));
        let align = align.ok().filter(|align| align.is_power_of_two()).unwrap_or(PMD_BYTES);
        let known = Self { bytes: value("size")?, align };
        lock(&KNOWN).insert(number, known);
        Ok(Some(known))
    }
}

/// The size of the pages that a map of the file is made of.
///
/// # Errors
/// The system's.
pub(crate) fn page_bytes(file: &File) -> io::Result<u64> {
    if let Some(node) = DaxNode::of(file)? {
        return Ok(node.align);
    }
    let is_huge =
        statfs::fstatfs(file).is_ok_and(|s| s.filesystem_type() == statfs::HUGETLBFS_MAGIC);
    // stat(2) tells it for hugetlbfs only: other file systems have a block size of their own.
    let page = if is_huge { file.metadata()?.blksize() } else { rustix::param::page_size() as u64 };
    Ok(page.max(PAGE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: each backing is met with what keeps its promise, and nothing else can be asked for.
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

    /// Shows: real files are told apart. (A DAX file and a device-DAX node:
    /// tests/direct_access.rs.)
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
