// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The socket on which the daemon listens: a path that is bound and removed, or an inherited
//! descriptor.
//!
//! A path is bound, replaced and removed under a `Claim`. Of several daemons that start at the same
//! time on one path only one binds it, and no daemon removes the socket of another one.

use std::fs::{self, File, FileType};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage};
use nix::sys::socket::{getsockname, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Group};
use thiserror::Error;

use crate::support::lock::{Mutex, lock};

pub(crate) mod accept;
mod claim;

use self::claim::Claim;

/// Limit on the length of a Unix socket path, in bytes: sun_path without its final NUL (unix(7)).
pub const PATH_MAX_BYTES: usize = 107;

/// The umask for bind(2), which starts from mode 0777: the socket has mode 0600 from the moment of
/// its creation.
const UMASK: Mode = Mode::from_bits_truncate(0o177);

/// How long the socket of a killed daemon may remain bound: its worker process ends shortly after it.
const LAST_USER: Duration = Duration::from_millis(500);

/// Mode of the socket with `--socket-group`.
const GROUP_MODE: u32 = 0o660;

/// The setting of `--socket-path` or `--fd`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSpec {
    /// A path to bind.
    Path {
        /// The path.
        path: PathBuf,
        /// The group of `--socket-group`, whose members may connect beside the daemon's own user.
        group: Option<String>,
    },
    /// The number of an inherited, listening Unix socket.
    Fd(RawFd),
}

/// A socket setting that can't be used. The text is one line with the remedy. Nothing has been
/// created or changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The error texts document the variants.
pub enum SocketError {
    #[error(
        "--socket-path has {0} bytes, but a Unix socket path has at most {PATH_MAX_BYTES}; take a \
         shorter path"
    )]
    PathLength(usize),
    #[error(
        "--socket-path {path} exists and is {what}, not a socket; {advice}",
        path = .path.display()
    )]
    NotASocket { path: PathBuf, what: &'static str, advice: &'static str },
    #[error("--socket-path {path}: another process listens there; stop it or take another path", path = .0.display())]
    InUse(PathBuf),
    #[error("--socket-group {0}: no such group; name a group that 'getent group' lists")]
    Group(String),
    #[error("--socket-group: can't change the group of {path} ({error}); run the daemon as root or as a member of it", path = .path.display())]
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

/// A socket setting that has been checked. Nothing has been changed yet.
#[derive(Debug)]
pub enum CheckedSocket {
    /// A path that can be bound.
    Path {
        /// The path.
        path: PathBuf,
        /// The group that gets the socket.
        group: Option<Gid>,
    },
    /// An inherited listening socket.
    Inherited(UnixListener),
}

/// Checks the setting; changes nothing.
///
/// # Errors
/// [`SocketError`], except `Kept` and `GroupOwner`.
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

/// The file at a path that can be bound.
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
        ("a symbolic link", "name its target, or take another path")
    } else if kind.is_file() {
        ("a file", "remove it or take another path")
    } else {
        ("a device or a FIFO", "take another path")
    };
    SocketError::NotASocket { path: path.to_owned(), what, advice }
}

/// The remedy for `error`, as the end of an error text.
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

/// Whether a process still listens on the socket `path` after `LAST_USER`: the worker of a killed
/// daemon has ended by then.
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

/// Whether a process listens on the socket `path`. A datagram socket connects to it: a stream
/// listener makes that fail with EPROTOTYPE and is not notified, whereas a stream connection would
/// use up the one session of its daemon. Every error other than ECONNREFUSED and ENOENT counts as
/// alive.
///
/// # Errors
/// The errno of socket(2) if no datagram socket can be created.
fn is_alive(path: &Path) -> io::Result<bool> {
    Ok(match UnixDatagram::unbound()?.connect(path) {
        Err(e) => !matches!(e.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound),
        Ok(()) => true,
    })
}

/// The socket file that this process has bound; none for an inherited socket. Keeps the file open,
/// so that it removes no other file at that path. Removes the file when dropped.
#[derive(Debug)]
pub struct BoundSocket(Mutex<Option<Bound>>);

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    /// The socket file, opened with O_PATH: while it is open the kernel gives its inode number to
    /// no other file.
    file: File,
}

impl CheckedSocket {
    /// Binds the path, and replaces a dead socket there; an inherited socket is returned as it is.
    /// Only this user and the group of `--socket-group` can connect, from the moment of the
    /// creation. No other thread may create files meanwhile, since the umask belongs to the
    /// process. `None` if `must_end` returned true while another process held the claim; nothing
    /// has been created or changed then.
    ///
    /// # Errors
    /// [`SocketError`]. Nothing has been created or changed then.
    pub fn listen(
        self,
        must_end: &dyn Fn() -> bool,
    ) -> Result<Option<(UnixListener, BoundSocket)>, SocketError> {
        let (listener, bound) = match self {
            Self::Inherited(listener) => (listener, None),
            Self::Path { path, group } => match bind(path, group, must_end)? {
                Some((listener, bound)) => (listener, Some(bound)),
                None => return Ok(None),
            },
        };
        Ok(Some((listener, BoundSocket(Mutex::new(bound)))))
    }
}

impl BoundSocket {
    /// Removes the socket file, unless another file has replaced it. May be called by several
    /// threads and more than once; each call returns after the removal.
    pub fn remove(&self) {
        let mut bound = lock(&self.0);
        if let Some(bound) = bound.take()
            && let Err(e) = bound.remove()
        {
            warn!("{}: can't remove the socket: {e}", bound.path.display());
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
        // Another daemon that replaces this socket, because it is dead, holds the claim meanwhile.
        let _claim = Claim::take(&self.path, &|| false)?;
        if self.is_in_place() { fs::remove_file(&self.path) } else { Ok(()) }
    }

    fn is_in_place(&self) -> bool {
        claim::is_at(&self.path, &self.file).unwrap_or(false)
    }

    fn give_to(&self, group: Gid) -> io::Result<()> {
        // Through /proc/self/fd, since the path may name another file by now and chmod(2) follows
        // links.
        let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        std::os::unix::fs::chown(&name, None, Some(group.as_raw()))?;
        fs::set_permissions(&name, fs::Permissions::from_mode(GROUP_MODE))
    }
}

fn bind(
    path: PathBuf,
    group: Option<Gid>,
    must_end: &dyn Fn() -> bool,
) -> Result<Option<(UnixListener, Bound)>, SocketError> {
    let claim = Claim::take(&path, must_end).map_err(|error| match error.kind() {
        io::ErrorKind::TimedOut => SocketError::Kept { path: path.clone(), error },
        _ => socket_error(&path, error),
    })?;
    let Some(_claim) = claim else { return Ok(None) };
    // Looks again under the claim: no other daemon binds the path now.
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
    // SAFETY: the descriptor is open, as checked above. No other owner exists: the number comes
    // from the command line, which names it once, and this process has opened no socket yet.
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
