// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file of a virtio-pmem device: opens or creates it, checks it, and locks it.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, fallocate, fcntl};
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;

use crate::persist::{Backing, DaxNode, Direct, Durability, PersistError};
use crate::support::file_id::FileId;
use crate::support::size::{Size, SizeError};
use crate::support::units::{FileOffset, FileRange, PMD_BYTES};

use super::size::PmemSize;

/// Unit of `st_blocks`, in bytes; it does not depend on the file system's block size (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// Number of bytes by which an incomplete file is shorter than its final length. So its length is
/// no multiple of 2 MiB, and no start takes it for a complete file, whatever has ended the daemon.
/// Its last block is allocated nevertheless.
const UNFINISHED_LACKS_BYTES: u64 = 1;

/// Number of bytes allocated by one fallocate(2), which no signal interrupts.
const PIECE_BYTES: u64 = 1 << 30;

/// How long the lock of a killed daemon's file may remain: its worker process ends shortly after it.
const LAST_USER: Duration = Duration::from_millis(500);

/// Time between two log lines about the progress of an allocation.
const PROGRESS_EVERY: Duration = Duration::from_secs(3);

/// The settings `--file`, `--size` and `--sparse`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemFileSpec {
    /// The path of the file.
    pub path: PathBuf,
    /// The size of a new file; the required size of an existing one.
    pub size: Option<PmemSize>,
    /// Creates a new file with holes, and accepts holes in an existing one.
    pub sparse: bool,
}

impl PmemFileSpec {
    fn dir(&self) -> &Path {
        match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        }
    }

    fn check_size(&self, actual: PmemSize) -> Result<(), PmemFileError> {
        match self.size {
            Some(wanted) if wanted != actual => {
                Err(PmemFileError::SizeDiffers { path: self.path.clone(), actual, wanted })
            }
            _ => Ok(()),
        }
    }
}

/// The length of a regular file or of a device-DAX node, in bytes.
///
/// # Errors
/// The errno of fstat(2), or of the read of the node's size in sysfs.
pub fn file_bytes(file: &File) -> io::Result<u64> {
    match DaxNode::of(file)? {
        Some(node) => Ok(node.bytes),
        None => Ok(file.metadata()?.len()),
    }
}

/// A file that can't be served. The text is one line with the remedy. A file that was created has
/// been removed, and nothing was changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The error texts document the variants.
pub enum PmemFileError {
    #[error("--file {path}: no such file; create it by adding --size, for example --size 1G", path = .0.display())]
    MissingFile(PathBuf),
    #[error("--file {path}: no such device; 'daxctl list' names the devices", path = .0.display())]
    MissingNode(PathBuf),
    #[error(
        "--file {path} is a symbolic link to {target}, which does not exist; name {target} itself, \
         or remove the link",
        path = .path.display(), target = .target.display()
    )]
    DanglingLink { path: PathBuf, target: PathBuf },
    #[error("--file {path}: no such directory; create {dir} first", path = .path.display(), dir = .dir.display())]
    MissingDirectory { path: PathBuf, dir: PathBuf },
    #[error("--file {path} is a directory; name a file in it, for example --file {example}", path = .0.display(), example = .0.join("pmem.img").display())]
    Directory(PathBuf),
    #[error("--file {path} is neither a regular file nor a device-DAX node; name such a file, or a new one with --size", path = .0.display())]
    NotRegular(PathBuf),
    #[error("--file {path}: {error}; the daemon (uid {uid}) must be able to read and write it", path = .path.display())]
    NoAccess { path: PathBuf, uid: u32, error: io::Error },
    #[error(
        "--file {path}: {error}; grow it with 'fallocate -l {wanted} {path}'",
        path = .path.display(), wanted = enough(.error)
    )]
    FileSize { path: PathBuf, error: SizeError },
    #[error("--file {path}: {error}; create its namespace again with 'ndctl create-namespace --align 2M --size SIZE'", path = .path.display())]
    NodeSize { path: PathBuf, error: SizeError },
    #[error("--persist=cacheline: {path}: can't allocate a block for each page ({error}); free some space, or take --persist=sync", path = .path.display())]
    Blocks { path: PathBuf, error: io::Error },
    #[error("{path}: {error}", path = .path.display())]
    Persist { path: PathBuf, error: PersistError },
    #[error("--file {path} lacks one byte: a daemon that is killed while it creates a file leaves it like that; if so, remove it and start again", path = .0.display())]
    Unfinished(PathBuf),
    #[error("--sparse and --persist=cacheline: {path} lies on a DAX file system, where each page needs a block before its cache lines can be made durable; leave out one of the two options", path = .0.display())]
    SparseLines(PathBuf),
    #[error("--file {path} is {actual}, not {wanted}; give --size {actual} or leave --size out", path = .path.display())]
    SizeDiffers { path: PathBuf, actual: PmemSize, wanted: PmemSize },
    #[error("--file {path}: no room for {size} ({error}); free some space, take a smaller --size, or add --sparse and never let the disk fill up", path = .path.display())]
    NoSpace { path: PathBuf, size: PmemSize, error: io::Error },
    #[error(
        "--file {path}: {size} is longer than a file may be here ({error}); {advice}",
        path = .path.display(), advice = too_long(*.size)
    )]
    TooLong { path: PathBuf, size: PmemSize, error: io::Error },
    #[error("--file {path}: this file system can't allocate ahead ({error}); add --sparse and never let the disk fill up", path = .path.display())]
    NoAllocate { path: PathBuf, error: io::Error },
    #[error("--file {path} is in use by another process (a daemon, or a VM that still maps it); stop that process first", path = .0.display())]
    Locked(PathBuf),
    #[error("--file {path}: {error}", path = .path.display())]
    File { path: PathBuf, error: io::Error },
}

/// The result of the look at `--file`, before any file is created.
#[derive(Debug)]
pub struct FoundFile<'a> {
    spec: &'a PmemFileSpec,
    found: Found,
}

#[derive(Debug)]
enum Found {
    /// The open file, and its size if it is a device-DAX node.
    There(File, Option<DaxNode>),
    Missing(PmemSize),
}

impl<'a> FoundFile<'a> {
    /// Opens the file, or finds that it can be created.
    ///
    /// # Errors
    /// [`PmemFileError`]; nothing has been created or changed then.
    pub fn look(spec: &'a PmemFileSpec) -> Result<Self, PmemFileError> {
        let path = &spec.path;
        // O_PATH: open(2) of a FIFO may wait, and open(2) of a device may have an effect.
        let name = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(path);
        let found = match name {
            Ok(name) => open_found(path, &name)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                if let Ok(target) = fs::read_link(path) {
                    return Err(PmemFileError::DanglingLink { path: path.clone(), target });
                }
                let size = spec.size.ok_or_else(|| match path.parent() {
                    Some(dir) if dir == Path::new("/dev") => {
                        PmemFileError::MissingNode(path.clone())
                    }
                    _ => PmemFileError::MissingFile(path.clone()),
                })?;
                let dir = spec.dir();
                if !dir.is_dir() {
                    let dir = dir.to_owned();
                    return Err(PmemFileError::MissingDirectory { path: path.clone(), dir });
                }
                Found::Missing(size)
            }
            Err(e) => return Err(open_error(path, e)),
        };
        Ok(Self { spec, found })
    }

    /// The backing of the file, or of its directory if the file is missing.
    pub fn backing(&self) -> Backing {
        match &self.found {
            Found::There(file, _) => Backing::of(file),
            Found::Missing(_) => Backing::of_dir(self.spec.dir()),
        }
    }

    /// Locks an existing file and checks its size.
    ///
    /// # Errors
    /// [`PmemFileError`]; nothing has been created or changed then.
    pub fn claim(&self) -> Result<(), PmemFileError> {
        let path = &self.spec.path;
        match &self.found {
            Found::There(file, node) => {
                lock(file, path)?;
                match node {
                    Some(node) => check_node(self.spec, *node),
                    None => {
                        let found = file.metadata().map_err(|e| open_error(path, e))?;
                        check_file(self.spec, &found)
                    }
                }
            }
            Found::Missing(_) => Ok(()),
        }
    }

    /// Returns the file; creates it if it was missing. Fails soon after `must_end` returns true.
    ///
    /// # Errors
    /// [`PmemFileError`]; a file that was created has been removed then.
    pub fn make(self, must_end: &dyn Fn() -> bool) -> Result<PmemFile, PmemFileError> {
        let path = self.spec.path.clone();
        match self.found {
            Found::There(file, _) => Ok(PmemFile { file: Arc::new(file), path, is_new: false }),
            Found::Missing(size) => PmemFile::create(self.spec, size, must_end),
        }
    }
}

/// Opens the file that the O_PATH descriptor `name` refers to, whatever the path names by now.
fn open_found(path: &Path, name: &File) -> Result<Found, PmemFileError> {
    let failed = |e| open_error(path, e);
    let kind = name.metadata().map_err(failed)?.file_type();
    if kind.is_dir() {
        return Err(PmemFileError::Directory(path.to_owned()));
    }
    let node = DaxNode::of(name).map_err(failed)?;
    if !kind.is_file() && node.is_none() {
        return Err(PmemFileError::NotRegular(path.to_owned()));
    }
    let reopen = format!("/proc/self/fd/{}", name.as_raw_fd());
    let file = OpenOptions::new().read(true).write(true).open(reopen).map_err(failed)?;
    Ok(Found::There(file, node))
}

/// Checks the size of a device-DAX node. A node is contiguous, so its maps have its alignment.
fn check_node(spec: &PmemFileSpec, node: DaxNode) -> Result<(), PmemFileError> {
    let path = spec.path.clone();
    let size = PmemSize::new(node.bytes);
    spec.check_size(size.map_err(|error| PmemFileError::NodeSize { path, error })?)
}

fn check_file(spec: &PmemFileSpec, found: &Metadata) -> Result<(), PmemFileError> {
    let path = &spec.path;
    if found.len() % PMD_BYTES == PMD_BYTES - UNFINISHED_LACKS_BYTES {
        return Err(PmemFileError::Unfinished(path.clone()));
    }
    let actual = PmemSize::new(found.len())
        .map_err(|error| PmemFileError::FileSize { path: path.clone(), error })?;
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
    Ok(())
}

/// An open, checked and locked file. If it was created here, dropping it removes it, unless it is
/// [kept](Self::keep).
#[derive(Debug)]
pub struct PmemFile {
    file: Arc<File>,
    path: PathBuf,
    /// The file was created here, and dropping this removes it.
    is_new: bool,
}

impl PmemFile {
    /// Opens the file, or creates it with all its blocks.
    ///
    /// # Errors
    /// [`PmemFileError`]; a file that was created has been removed then.
    pub fn open(spec: &PmemFileSpec) -> Result<Self, PmemFileError> {
        let found = FoundFile::look(spec)?;
        found.claim()?;
        found.make(&|| false)
    }

    fn create(
        spec: &PmemFileSpec,
        size: PmemSize,
        must_end: &dyn Fn() -> bool,
    ) -> Result<Self, PmemFileError> {
        let path = &spec.path;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| open_error(path, e))?;
        // From here on a failure removes the file.
        let created = Self { file: Arc::new(file), path: path.clone(), is_new: true };
        lock(&created.file, path)?;
        created.give_size(size, spec.sparse, must_end)?;
        // The first flush promises that the file survives, so its directory entry must be durable,
        // too.
        created
            .file
            .sync_all()
            .and_then(|()| File::open(spec.dir())?.sync_all())
            .map_err(|error| PmemFileError::File { path: path.clone(), error })?;
        Ok(created)
    }

    fn give_size(
        &self,
        size: PmemSize,
        sparse: bool,
        must_end: &dyn Fn() -> bool,
    ) -> Result<(), PmemFileError> {
        let made = if sparse { Ok(()) } else { self.allocate(size, must_end) };
        let path = self.path.clone();
        // Sets the final length last: until then no start takes the file for a complete one.
        made.and_then(|()| self.file.set_len(size.bytes())).map_err(|error| {
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ENOSPC | Errno::EDQUOT) => PmemFileError::NoSpace { path, size, error },
                Some(Errno::EFBIG) => PmemFileError::TooLong { path, size, error },
                Some(Errno::EOPNOTSUPP) => PmemFileError::NoAllocate { path, error },
                _ => PmemFileError::File { path, error },
            }
        })
    }

    fn allocate(&self, size: PmemSize, must_end: &dyn Fn() -> bool) -> io::Result<()> {
        info!("creating {} and allocating {size}", self.path.display());
        let unfinished = size.bytes() - UNFINISHED_LACKS_BYTES;
        self.file.set_len(unfinished)?;
        in_pieces("allocated", unfinished, must_end, |from, bytes| {
            allocate(&self.file, FallocateFlags::empty(), from, bytes)
        })
    }

    /// The open file. The lock belongs to its open file description, which the VMM that maps the
    /// file shares: the file stays locked until the last descriptor and map is closed, even if this
    /// daemon is killed.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// For cache line writeback: allocates a block for each page of a file on a DAX file system and
    /// makes the allocation durable, since a flush of cache lines makes no metadata durable.
    ///
    /// # Errors
    /// [`PmemFileError::Blocks`] with the errno of fallocate(2), for example ENOSPC.
    pub fn populate_blocks(
        &self,
        direct: &Direct,
        must_end: &dyn Fn() -> bool,
    ) -> Result<(), PmemFileError> {
        let path = &self.path;
        let bytes = self.file.metadata().map_err(|e| open_error(path, e))?.len();
        info!("allocating a durable block for each page of {}", path.display());
        in_pieces("allocated durably", bytes, must_end, |from, bytes| {
            allocate(&self.file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes)?;
            direct.populate_blocks(FileRange::new(FileOffset(from), bytes))
        })
        .map_err(|error| PmemFileError::Blocks { path: path.clone(), error })
    }

    /// Keeps the file, and logs what a flush of it makes durable.
    pub fn keep(mut self, durability: Durability) -> Arc<File> {
        info!("the pmem file is in {}", durability.promise());
        if let Some(warning) = durability.backing.warning() {
            warn!("the pmem file {warning}");
        }
        self.is_new = false;
        self.file.clone()
    }
}

impl Drop for PmemFile {
    fn drop(&mut self) {
        let at_path = fs::symlink_metadata(&self.path).map(FileId::from).ok();
        if self.is_new
            && at_path == FileId::of(&self.file).ok()
            && let Err(e) = fs::remove_file(&self.path)
        {
            warn!("{}: can't remove the unfinished file: {e}", self.path.display());
        }
    }
}

/// Does `work` on `bytes` bytes in pieces of [`PIECE_BYTES`], so that a signal can end it between
/// two pieces. Logs the progress.
///
/// # Errors
/// The errors of `work`, and EINTR once `must_end` returns true.
fn in_pieces(
    what: &str,
    bytes: u64,
    must_end: &dyn Fn() -> bool,
    work: impl Fn(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut logged = Instant::now();
    for from in (0..bytes).step_by(PIECE_BYTES as usize) {
        if must_end() {
            return Err(Errno::EINTR.into());
        }
        if logged.elapsed() >= PROGRESS_EVERY {
            logged = Instant::now();
            info!("{what} {} of {}", Size(from), Size(bytes.next_multiple_of(PMD_BYTES)));
        }
        work(from, PIECE_BYTES.min(bytes - from))?;
    }
    Ok(())
}

/// fallocate(2), not posix_fallocate(3), which writes zeros if the file system can't allocate.
fn allocate(file: &File, flags: FallocateFlags, from: u64, bytes: u64) -> io::Result<()> {
    // A file's length fits an off_t.
    Ok(fallocate(file, flags, from as libc::off_t, bytes as libc::off_t)?)
}

/// Takes an open-file-description lock on the whole file (fcntl(2), F_OFD_SETLK). It also keeps out
/// a QEMU that would use the file as a raw disk.
fn lock(file: &File, path: &Path) -> Result<(), PmemFileError> {
    let whole = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let deadline = Instant::now() + LAST_USER;
    let tried = loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
            Err(Errno::EAGAIN | Errno::EACCES) if Instant::now() < deadline => {
                std::thread::sleep(LAST_USER / 50);
            }
            tried => break tried,
        }
    };
    match tried {
        Ok(_) => Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(PmemFileError::Locked(path.to_owned())),
        Err(e) => Err(PmemFileError::File { path: path.to_owned(), error: e.into() }),
    }
}

/// The next valid length, as fallocate(1) takes it.
fn enough(error: &SizeError) -> String {
    match error {
        SizeError::Unaligned { bytes: 0, below, .. } => below.to_string(),
        SizeError::Unaligned { bytes, below, above } => {
            (if *bytes < below.0 { below } else { above }).to_string()
        }
        SizeError::Syntax | SizeError::TooLarge => "SIZE".into(),
    }
}

/// The remedy if a file can't have the length `size`.
fn too_long(size: PmemSize) -> String {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if limit < size.bytes() => format!(
            "the limit is RLIMIT_FSIZE, {} here: raise it ('ulimit -f unlimited') or take a \
             smaller --size",
            Size(limit)
        ),
        _ => "the limit is the file system's: take a smaller --size, or another file system".into(),
    }
}

fn open_error(path: &Path, error: io::Error) -> PmemFileError {
    let path = path.to_owned();
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => {
            PmemFileError::NoAccess { path, uid: nix::unistd::geteuid().as_raw(), error }
        }
        _ => PmemFileError::File { path, error },
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// Shows: the pieces cover the whole range, each once; no piece is done after `must_end` is
    /// true.
    #[test]
    fn pieces_cover_the_range_until_a_signal() {
        let whole = 2 * PIECE_BYTES + 4095;
        for (ends_after, done) in [(usize::MAX, 3), (2, 2), (0, 0)] {
            let pieces = RefCell::new(Vec::new());
            let must_end = || pieces.borrow().len() >= ends_after;
            let ended = in_pieces("tried", whole, &must_end, |from, bytes| {
                pieces.borrow_mut().push((from, bytes));
                Ok(())
            });
            let all = [(0, PIECE_BYTES), (PIECE_BYTES, PIECE_BYTES), (2 * PIECE_BYTES, 4095)];
            assert_eq!(*pieces.borrow(), all[..done]);
            assert_eq!(ended.is_ok(), done == all.len());
        }
    }
}
