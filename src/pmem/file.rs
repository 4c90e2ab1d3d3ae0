// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file behind a virtio-pmem device: found or created, checked, and locked.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::libc;

use crate::config::{ConfigError, PmemSize, Size};
use crate::persist::{Backing, DaxNode, Direct, Durability};

/// `st_blocks` counts in units of 512 bytes, whatever the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Which file, and what to do if it is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemFileSpec {
    /// The file.
    pub path: PathBuf,
    /// Its size: to create it with, or to check it against.
    pub size: Option<PmemSize>,
    /// Leave holes in a file that is created, and accept them in one that exists.
    pub sparse: bool,
}

impl PmemFileSpec {
    /// What the file lies in, or will if it is missing.
    pub fn backing(&self) -> Backing {
        match open_both_ways(&self.path) {
            Ok(file) => Backing::of(&file),
            Err(_) => Backing::of_dir(self.dir()),
        }
    }

    fn dir(&self) -> &Path {
        match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        }
    }

    fn check_size(&self, actual: PmemSize) -> Result<(), ConfigError> {
        match self.size {
            Some(wanted) if wanted != actual => {
                Err(ConfigError::SizeDiffers { path: self.path.clone(), actual, wanted })
            }
            _ => Ok(()),
        }
    }
}

/// The length of a regular file or of a device-DAX node.
///
/// # Errors
/// The system's.
pub fn file_bytes(file: &File) -> io::Result<u64> {
    match DaxNode::of(file)? {
        Some(node) => Ok(node.bytes),
        None => Ok(file.metadata()?.len()),
    }
}

/// An open, checked and locked file. One that was created here is removed again unless it is [kept](Self::keep).
#[derive(Debug)]
pub struct PmemFile {
    file: Arc<File>,
    remove_on_drop: Option<PathBuf>,
}

impl PmemFile {
    /// Opens the file, or creates it with all its blocks.
    ///
    /// # Errors
    /// Each is a line for the user; nothing has been created or changed then.
    pub fn open(spec: &PmemFileSpec) -> Result<Self, ConfigError> {
        match fs::metadata(&spec.path) {
            Ok(found) if found.is_dir() => Err(ConfigError::Directory(spec.path.clone())),
            Ok(found) if found.file_type().is_char_device() => Self::open_node(spec),
            Ok(found) if !found.is_file() => Err(ConfigError::NotRegular(spec.path.clone())),
            Ok(_) => Self::open_existing(spec),
            Err(e) if e.kind() == io::ErrorKind::NotFound => match spec.size {
                Some(size) => Self::create(spec, size),
                None => Err(ConfigError::MissingFile(spec.path.clone())),
            },
            Err(e) => Err(open_error(&spec.path, e)),
        }
    }

    /// A device-DAX node. It is of one piece, so its maps are as aligned as it is itself.
    fn open_node(spec: &PmemFileSpec) -> Result<Self, ConfigError> {
        let path = &spec.path;
        let file = open_both_ways(path)?;
        let node = DaxNode::of(&file).map_err(|e| open_error(path, e))?;
        let node = node.ok_or_else(|| ConfigError::NotRegular(path.clone()))?;
        lock(&file, path)?;
        let actual = PmemSize::new(node.bytes)
            .map_err(|error| ConfigError::NodeSize { path: path.clone(), error })?;
        spec.check_size(actual)?;
        Ok(Self { file: Arc::new(file), remove_on_drop: None })
    }

    fn open_existing(spec: &PmemFileSpec) -> Result<Self, ConfigError> {
        let path = &spec.path;
        let file = open_both_ways(path)?;
        lock(&file, path)?;
        let found = file.metadata().map_err(|e| open_error(path, e))?;
        let actual = PmemSize::new(found.len())
            .map_err(|error| ConfigError::FileSize { path: path.clone(), error })?;
        spec.check_size(actual)?;
        let holes = actual.bytes().saturating_sub(found.blocks() * STAT_BLOCK_BYTES);
        if holes > 0 && !spec.sparse {
            warn!(
                "{} has about {} of holes: a store to a hole when the disk is full kills the VM; \
                 fill them with 'fallocate -l {} FILE', or add --sparse if you accept that",
                path.display(),
                Size(holes),
                actual.bytes()
            );
        }
        Ok(Self { file: Arc::new(file), remove_on_drop: None })
    }

    fn create(spec: &PmemFileSpec, size: PmemSize) -> Result<Self, ConfigError> {
        let path = &spec.path;
        let dir = spec.dir();
        if !dir.is_dir() {
            return Err(ConfigError::MissingDirectory { path: path.clone(), dir: dir.to_owned() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| open_error(path, e))?;
        // From here on the file goes away again if anything fails.
        let created = Self { file: Arc::new(file), remove_on_drop: Some(path.clone()) };
        lock(&created.file, path)?;
        created.give_size(path, size, spec.sparse)?;
        // The name must be as durable as the first flush, so the directory is synced as well.
        created
            .file
            .sync_all()
            .and_then(|()| File::open(dir)?.sync_all())
            .map_err(|error| ConfigError::File { path: path.clone(), error })?;
        Ok(created)
    }

    fn give_size(&self, path: &Path, size: PmemSize, sparse: bool) -> Result<(), ConfigError> {
        let path = path.to_owned();
        let length = size.bytes() as libc::off_t; // PmemSize is at most i64::MAX.
        let made = if sparse {
            self.file.set_len(size.bytes())
        } else {
            info!("creating {} and allocating {size}", path.display());
            fallocate(&self.file, FallocateFlags::empty(), 0, length).map_err(io::Error::from)
        };
        made.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => {
                ConfigError::NoSpace { path, size, error }
            }
            Some(Errno::EOPNOTSUPP) => ConfigError::NoAllocate { path, error },
            _ => ConfigError::File { path, error },
        })
    }

    /// The open file. Its descriptor carries the lock, also into the VMM that maps it: the file
    /// stays locked until the last of them is gone, even if this daemon is killed.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Makes all that a later store needs durable beforehand, where only its cache lines will be written
    /// back: each page of a file on a DAX file system gets its block.
    ///
    /// # Errors
    /// No space, most likely.
    pub fn settle_blocks(&self, path: &Path, direct: &Direct) -> Result<(), ConfigError> {
        let bytes = self.file.metadata().map_err(|e| open_error(path, e))?.len();
        let length = bytes as libc::off_t; // It is the length of a file.
        info!("giving each page of {} a block that is durably its own", path.display());
        let done = fallocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, 0, length)
            .map_err(io::Error::from)
            .and_then(|()| direct.settle_blocks(bytes));
        done.map_err(|error| ConfigError::Blocks { path: path.to_owned(), error })
    }

    /// Keeps the file, and says what flushes of it are worth.
    pub fn keep(mut self, durability: Durability) -> Arc<File> {
        info!("the pmem file is in {}", durability.promise());
        if let Some(warning) = durability.backing.warning() {
            warn!("the pmem file {warning}");
        }
        self.remove_on_drop = None;
        self.file.clone()
    }
}

impl Drop for PmemFile {
    fn drop(&mut self) {
        if let Some(path) = &self.remove_on_drop
            && let Err(e) = fs::remove_file(path)
        {
            warn!("{}: can't remove the unfinished file: {e}", path.display());
        }
    }
}

fn open_both_ways(path: &Path) -> Result<File, ConfigError> {
    OpenOptions::new().read(true).write(true).open(path).map_err(|e| open_error(path, e))
}

/// An open-file-description lock on the whole file (fcntl(2), F_OFD_SETLK). It also keeps out a
/// QEMU that would use the file as a raw disk.
fn lock(file: &File, path: &Path) -> Result<(), ConfigError> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(ConfigError::Locked(path.to_owned())),
        Err(e) => Err(ConfigError::File { path: path.to_owned(), error: e.into() }),
    }
}

fn open_error(path: &Path, error: io::Error) -> ConfigError {
    let path = path.to_owned();
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => {
            ConfigError::NoAccess { path, uid: nix::unistd::geteuid().as_raw(), error }
        }
        _ => ConfigError::File { path, error },
    }
}
