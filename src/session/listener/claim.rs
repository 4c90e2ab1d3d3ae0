// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The exclusive right to bind, replace or remove the socket at a path: a flock(2) on the file
//! `PATH.lock`, held for some milliseconds.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use log::debug;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::unistd::geteuid;

use crate::support::file_id::FileId;

/// Time limit on the wait for the claim. A process holds it for some milliseconds, unless it hangs
/// or was stopped (SIGSTOP).
const PATIENCE: Duration = Duration::from_secs(5);

/// Time between two attempts. flock(2) has no timeout, and a blocked signal does not interrupt it.
const PAUSE: Duration = Duration::from_millis(2);

/// Held by one process at a time for each path. Dropping it removes the lock file. A lock file that
/// a killed process has left behind is reused.
pub(super) struct Claim {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Claim {
    /// Waits up to [`PATIENCE`] for other processes. `None` if `must_end` returned true meanwhile.
    ///
    /// # Errors
    /// The errno of open(2), fstat(2) or flock(2). `AlreadyExists` if the file at `PATH.lock` is no
    /// lock of this user's daemons. `TimedOut` if another process has held the claim for
    /// [`PATIENCE`].
    pub(super) fn take(socket: &Path, must_end: &dyn Fn() -> bool) -> io::Result<Option<Self>> {
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let path = PathBuf::from(name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let file = open(&path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if is_at(&path, &lock)? => return Ok(Some(Self { path, _lock: lock })),
                // The last holder has removed this file after the open: opens the new one.
                Ok(_) | Err((_, Errno::EINTR)) => {}
                Err((_, Errno::EWOULDBLOCK)) if must_end() => return Ok(None),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => thread::sleep(PAUSE),
                Err((_, Errno::EWOULDBLOCK)) => return Err(kept(&path)),
                Err((_, e)) => return Err(e.into()),
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Before the unlock: a process that then gets the lock finds that the path names another
        // file.
        if let Err(e) = fs::remove_file(&self.path) {
            debug!("{}: {e}", self.path.display());
        }
    }
}

fn kept(path: &Path) -> io::Error {
    let (path, seconds) = (path.display(), PATIENCE.as_secs());
    let line = format!("another process has held {path} for {seconds} s, end it ('fuser {path}')");
    io::Error::new(io::ErrorKind::TimedOut, line)
}

/// Opens or creates the lock file, with mode 0600: processes of other users can't open it, and so
/// can't hold the lock.
fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
    let found = file.metadata()?;
    let is_private = found.uid() == geteuid().as_raw() && found.mode() & 0o077 == 0;
    // A file with content is not a lock, and must not be removed. A file without a name was a lock:
    // its holder has removed it since the open.
    let is_empty = found.is_file() && found.len() == 0 && found.nlink() <= 1;
    if is_private && is_empty {
        return Ok(file);
    }
    let line = format!("{} exists and is not a lock file of this user, remove it", path.display());
    Err(io::Error::new(io::ErrorKind::AlreadyExists, line))
}

/// Whether `path` still names the open `file`.
///
/// # Errors
/// The errno of statx(2) or lstat(2), except ENOENT.
pub(super) fn is_at(path: &Path, file: &File) -> io::Result<bool> {
    let ours = FileId::of(file)?;
    match fs::symlink_metadata(path) {
        Ok(now) => Ok(FileId::from(now) == ours),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
