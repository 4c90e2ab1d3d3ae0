// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The right to bind, replace or remove a socket at a path: a lock on a file beside it, for a
//! moment.

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

/// Another process holds the claim for some milliseconds, unless it hangs or was stopped (SIGSTOP).
const PATIENCE: Duration = Duration::from_secs(5);

/// The time between two tries. flock(2) has no deadline, and a blocked signal does not end it.
const PAUSE: Duration = Duration::from_millis(2);

/// Held by one process at a time for each path. The file goes when it is dropped. One that a killed
/// process has left behind is taken.
pub(super) struct Claim {
    path: PathBuf,
    _lock: Flock<File>,
}

impl Claim {
    /// Waits for the other processes, each of which holds it for a moment. None if `is_asked` said
    /// that the daemon is to end.
    ///
    /// # Errors
    /// The system's; AlreadyExists where the file is not one of ours; TimedOut where another
    /// process kept it for [`PATIENCE`].
    pub(super) fn take(socket: &Path, is_asked: &dyn Fn() -> bool) -> io::Result<Option<Self>> {
        let mut name = socket.as_os_str().to_owned();
        name.push(".lock");
        let path = PathBuf::from(name);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let file = open(&path)?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(lock) if is_at(&path, &lock)? => return Ok(Some(Self { path, _lock: lock })),
                // Whoever had it has removed the file: then it is a lock on nothing.
                Ok(_) | Err((_, Errno::EINTR)) => {}
                Err((_, Errno::EWOULDBLOCK)) if is_asked() => return Ok(None),
                Err((_, Errno::EWOULDBLOCK)) if Instant::now() < deadline => thread::sleep(PAUSE),
                Err((_, Errno::EWOULDBLOCK)) => return Err(kept(&path)),
                Err((_, e)) => return Err(e.into()),
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Before the lock goes: who waits for it must find that the file is another one.
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

/// Others can't hold the lock: they can't open the file.
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
    // A user's file of that name is no lock, and must not be removed. One with no name any more was
    // a lock: its holder has removed it since the open.
    let is_empty = found.is_file() && found.len() == 0 && found.nlink() <= 1;
    if is_private && is_empty {
        return Ok(file);
    }
    let line = format!("{} is in the way, remove it", path.display());
    Err(io::Error::new(io::ErrorKind::AlreadyExists, line))
}

/// Whether `path` still names the open `file`.
///
/// # Errors
/// The system's.
pub(super) fn is_at(path: &Path, file: &File) -> io::Result<bool> {
    let ours = FileId::of(file)?;
    match fs::symlink_metadata(path) {
        Ok(now) => Ok(FileId::from(now) == ours),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
