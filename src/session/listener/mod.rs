// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the front-end finds the daemon: a path that is bound and removed, or an inherited
//! descriptor.
//!
//! A path is bound, replaced and removed under a `Claim`, so that of daemons that start at the same
//! time one has it, and none removes another one's socket.

use std::fs::{self, File, FileType};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage};
use nix::sys::socket::{getsockname, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group};
use thiserror::Error;

use crate::support::lock::lock;

pub(crate) mod accept;
mod claim;

use self::claim::Claim;

/// Bytes that a Unix socket path can have: sun_path less the final zero (unix(7)).
pub const PATH_MAX_BYTES: usize = 107;

/// What the socket's mode lacks from its first moment on: it is 0600. (bind(2) starts from 0777.)
const UMASK: Mode = Mode::from_bits_truncate(0o177);

/// So long a killed daemon's socket may still be bound.
const LAST_USER: Duration = Duration::from_millis(500);

/// Its mode with `--socket-group`.
const GROUP_MODE: u32 = 0o660;

/// Where the front-end finds the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSpec {
    /// A path to bind.
    Path {
        /// It.
        path: PathBuf,
        /// Who may connect beside the daemon's own user.
        group: Option<String>,
    },
    /// A listening Unix socket that was inherited.
    Fd(RawFd),
}

/// A socket setting that can't be used: one line that says what to do. Nothing has been created or
/// changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The texts say it better.
pub enum SocketError {
    #[error(
        "--socket-path has {0} bytes; the system allows {PATH_MAX_BYTES}, so take a shorter one"
    )]
    PathLength(usize),
    #[error(
        "--socket-path {path} exists and is no socket, but {what}; {advice}",
        path = .path.display()
    )]
    NotASocket { path: PathBuf, what: &'static str, advice: &'static str },
    #[error("--socket-path {path}: another process listens there; stop it or take another path", path = .0.display())]
    InUse(PathBuf),
    #[error("--socket-group {0}: there is no such group; name one that 'getent group' lists")]
    Group(String),
    #[error("--socket-group: {path} can't be given to that group ({error}); run the daemon as root or as a member of it", path = .path.display())]
    GroupOwner { path: PathBuf, error: io::Error },
    #[error("--socket-path {path}: {error}", path = .path.display())]
    Kept { path: PathBuf, error: io::Error },
    #[error(
        "--socket-path {path}: {error}{advice}",
        path = .path.display(), advice = advice(.error)
    )]
    Path { path: PathBuf, error: io::Error },
    #[error(
        "--fd {fd} {why}; pass a listening Unix stream socket, as systemd's socket activation does"
    )]
    Fd { fd: RawFd, why: &'static str },
}

/// A socket setting that was looked at, and found usable, before anything was changed.
#[derive(Debug)]
pub enum CheckedSocket {
    /// A path that can be bound.
    Path {
        /// It.
        path: PathBuf,
        /// Who else may connect.
        group: Option<Gid>,
    },
    /// An inherited listener.
    Inherited(UnixListener),
}

/// Looks at the setting; changes nothing.
///
/// # Errors
/// Each is a line for the user.
pub fn check(spec: &SocketSpec) -> Result<CheckedSocket, SocketError> {
    match spec {
        SocketSpec::Path { path, group } => {
            let group = group.as_deref().map(find_group).transpose()?;
            look(path)?;
            Ok(CheckedSocket::Path { path: path.clone(), group })
        }
        SocketSpec::Fd(fd) => adopt(*fd).map(CheckedSocket::Inherited),
    }
}

fn find_group(name: &str) -> Result<Gid, SocketError> {
    let found = Group::from_name(name).ok().flatten();
    found.map(|group| group.gid).ok_or_else(|| SocketError::Group(name.to_owned()))
}

/// What is at a path that can be bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    DeadSocket,
}

fn look(path: &Path) -> Result<Found, SocketError> {
    let bytes = path.as_os_str().len();
    if bytes > PATH_MAX_BYTES {
        return Err(SocketError::PathLength(bytes));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => Err(no_socket(path, found.file_type())),
        Ok(_) => match stays_alive(path) {
            Ok(true) => Err(SocketError::InUse(path.to_owned())),
            Ok(false) => Ok(Found::DeadSocket),
            Err(e) => Err(socket_error(path, e)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            let missing = dir.is_some_and(|dir| !dir.is_dir());
            if missing { Err(socket_error(path, e)) } else { Ok(Found::Nothing) }
        }
        Err(e) => Err(socket_error(path, e)),
    }
}

fn no_socket(path: &Path, kind: FileType) -> SocketError {
    let (what, advice) = if kind.is_dir() {
        ("a directory", "name a path in it, like PATH/vhost.sock")
    } else if kind.is_symlink() {
        ("a symbolic link", "name what it leads to, or take another path")
    } else if kind.is_file() {
        ("a file", "remove it or take another path")
    } else {
        ("a device or a FIFO", "take another path")
    };
    SocketError::NotASocket { path: path.to_owned(), what, advice }
}

/// What helps against `error`.
fn advice(error: &io::Error) -> &'static str {
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
        return "; raise the limit of open files ('ulimit -n')";
    }
    match error.kind() {
        io::ErrorKind::NotFound
        | io::ErrorKind::PermissionDenied
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::ReadOnlyFilesystem => "; the directory must exist and be writable",
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space",
        _ => "",
    }
}

fn socket_error(path: &Path, error: io::Error) -> SocketError {
    SocketError::Path { path: path.to_owned(), error }
}

/// Whether a socket is bound to `path`, and still is when a daemon that was killed would have taken
/// its other processes along.
///
/// # Errors
/// As of [`is_alive`].
fn stays_alive(path: &Path) -> io::Result<bool> {
    let deadline = Instant::now() + LAST_USER;
    loop {
        if !is_alive(path)? {
            return Ok(false);
        }
        if Instant::now() >= deadline {
            return Ok(true);
        }
        thread::sleep(LAST_USER / 50);
    }
}

/// Whether a socket is bound to `path`. A datagram socket asks: a live stream listener answers it
/// EPROTOTYPE and notices nothing, where a real connection would use up its one session. What can't
/// be asked is taken for alive.
///
/// # Errors
/// The system has no socket to ask with.
fn is_alive(path: &Path) -> io::Result<bool> {
    Ok(match UnixDatagram::unbound()?.connect(path) {
        Err(e) => !matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound),
        Ok(()) => true,
    })
}

/// The file of a socket that was bound here (none for an inherited one). Holds on to the file, so
/// that it removes no other; removes it when dropped.
#[derive(Debug)]
pub struct BoundSocket(Mutex<Option<Bound>>);

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// The file itself (O_PATH): while it is open no other file gets its inode number.
    file: File,
}

impl CheckedSocket {
    /// Binds the path, replacing a dead socket there; an inherited listener just listens on. From
    /// the first moment on nobody can connect but this user, and whom `--socket-group` names. No
    /// other thread may make files meanwhile: the umask is the process's. None if `is_asked` said
    /// that the daemon is to end while another process held the claim; nothing has been created or
    /// changed then.
    ///
    /// # Errors
    /// One line for the user; nothing has been created or changed then.
    pub fn listen(
        self,
        is_asked: &dyn Fn() -> bool,
    ) -> Result<Option<(UnixListener, BoundSocket)>, SocketError> {
        let (listener, bound) = match self {
            Self::Inherited(listener) => (listener, None),
            Self::Path { path, group } => match bind(path, group, is_asked)? {
                Some((listener, bound)) => (listener, Some(bound)),
                None => return Ok(None),
            },
        };
        Ok(Some((listener, BoundSocket(Mutex::new(bound)))))
    }
}

impl BoundSocket {
    /// Removes the file, if it is still the one that was made here. Callable more than once; each
    /// caller returns after the removal.
    pub fn remove(&self) {
        let mut bound = lock(&self.0);
        if let Some(bound) = bound.take()
            && let Err(e) = bound.remove()
        {
            warn!("{}: the socket stays: {e}", bound.path.display());
        }
    }
}

impl BoundSocket {
    /// Leaves the file to another process, which has a copy of this.
    pub(crate) fn leave(&self) {
        drop(lock(&self.0).take());
    }

    /// The descriptor that the removal needs.
    pub(crate) fn descriptor(&self) -> Option<RawFd> {
        lock(&self.0).as_ref().map(|bound| bound.file.as_raw_fd())
    }

    /// The directory that the file lies in.
    pub(crate) fn dir(&self) -> Option<PathBuf> {
        lock(&self.0).as_ref().map(|bound| match bound.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir.to_owned(),
            _ => PathBuf::from("."),
        })
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

impl Bound {
    fn remove(&self) -> io::Result<()> {
        if !self.is_in_place() {
            return Ok(());
        }
        // Who replaces it, since it is dead, has the claim.
        let _claim = Claim::take(&self.path, &|| false)?;
        if self.is_in_place() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    fn is_in_place(&self) -> bool {
        claim::is_at(&self.path, &self.file).unwrap_or(false)
    }

    fn give_to(&self, group: Gid) -> io::Result<()> {
        // By way of the file, since a name may be changed: chmod(2) follows symbolic links.
        let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::os::unix::fs::chown(&name, None, Some(group.as_raw()))?;
        fs::set_permissions(&name, fs::Permissions::from_mode(GROUP_MODE))
    }
}

fn bind(
    path: PathBuf,
    group: Option<Gid>,
    is_asked: &dyn Fn() -> bool,
) -> Result<Option<(UnixListener, Bound)>, SocketError> {
    let claim = Claim::take(&path, is_asked).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => SocketError::Kept { path: path.clone(), error },
        _ => socket_error(&path, error),
    })?;
    let Some(_claim) = claim else { return Ok(None) };
    // Once more, now that nobody else is about to bind it.
    if look(&path)? == Found::DeadSocket
        && let Err(e) = fs::remove_file(&path)
        && e.kind() != io::ErrorKind::NotFound
    {
        return Err(socket_error(&path, e));
    }
    let before = umask(UMASK);
    let listener = UnixListener::bind(&path);
    umask(before);
    let listener = listener.map_err(|e| socket_error(&path, e))?;
    let made = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
        .open(&path)
        .and_then(|file| {
            let bound = Bound { path: path.clone(), file };
            group.map_or(Ok(()), |group| bound.give_to(group))?;
            Ok(bound)
        });
    match made {
        Ok(bound) => Ok(Some((listener, bound))),
        Err(e) => {
            let _ = fs::remove_file(&path);
            Err(match group {
                Some(_) => SocketError::GroupOwner { path, error: e },
                None => socket_error(&path, e),
            })
        }
    }
}

#[allow(unsafe_code)] // Taking over a descriptor by its number has no safe form.
fn adopt(fd: RawFd) -> Result<UnixListener, SocketError> {
    let refuse = |why| Err(SocketError::Fd { fd, why });
    match fs::metadata(format!("/proc/self/fd/{fd}")) {
        Err(_) => return refuse("is not open"),
        Ok(found) if !found.file_type().is_socket() => return refuse("is no socket"),
        Ok(_) => {}
    }
    // SAFETY: it is open, as just seen, and it is ours alone: it came from the command line, which
    // names it once, and this process opens no socket before it comes here.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let family = getsockname::<SockaddrStorage>(fd).map(|name| name.family());
    if family != Ok(Some(AddressFamily::Unix)) {
        return refuse("is no Unix socket");
    }
    if getsockopt(&owned, sockopt::SockType) != Ok(SockType::Stream) {
        return refuse("is no stream socket");
    }
    if getsockopt(&owned, sockopt::AcceptConn) != Ok(true) {
        return refuse("is not listening");
    }
    Ok(UnixListener::from(owned))
}
