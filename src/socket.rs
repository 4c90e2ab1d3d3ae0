// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the front-end finds the daemon: a path that is bound and removed, or an inherited descriptor.

use std::fs;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use log::warn;
use nix::sys::socket::{AddressFamily, SockType, SockaddrLike, SockaddrStorage};
use nix::sys::socket::{getsockname, getsockopt, sockopt};

use crate::config::{ConfigError, SOCKET_PATH_MAX_BYTES, SocketSpec};
use crate::lock::lock;

/// A socket setting that was looked at, and found usable, before anything was changed.
#[derive(Debug)]
pub enum CheckedSocket {
    /// A path that can be bound.
    Path(PathBuf),
    /// An inherited listener.
    Inherited(UnixListener),
}

/// Looks at the setting; changes nothing.
///
/// # Errors
/// Each is a line for the user.
pub fn check(spec: &SocketSpec) -> Result<CheckedSocket, ConfigError> {
    match spec {
        SocketSpec::Path(path) => {
            check_path(path)?;
            Ok(CheckedSocket::Path(path.clone()))
        }
        SocketSpec::Fd(fd) => adopt(*fd).map(CheckedSocket::Inherited),
    }
}

fn check_path(path: &Path) -> Result<(), ConfigError> {
    let bytes = path.as_os_str().len();
    if bytes > SOCKET_PATH_MAX_BYTES {
        return Err(ConfigError::SocketPathLength(bytes));
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(ConfigError::NotASocket(path.to_owned()))
        }
        Ok(_) if is_alive(path) => Err(ConfigError::SocketInUse(path.to_owned())),
        Ok(_) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            let missing = dir.is_some_and(|dir| !dir.is_dir());
            if missing { Err(socket_error(path, e)) } else { Ok(()) }
        }
        Err(e) => Err(socket_error(path, e)),
    }
}

fn socket_error(path: &Path, error: io::Error) -> ConfigError {
    ConfigError::Socket { path: path.to_owned(), error }
}

/// Whether a socket is bound to `path`. A datagram socket asks: a live stream listener answers it
/// EPROTOTYPE and notices nothing, where a real connection would use up its one session.
fn is_alive(path: &Path) -> bool {
    let asked = UnixDatagram::unbound().and_then(|socket| socket.connect(path));
    !matches!(asked, Err(e) if e.kind() == io::ErrorKind::ConnectionRefused)
}

/// The file of a socket that was bound here (none for an inherited one). Remembers which file it
/// was, so that it removes no other; removes it when dropped.
#[derive(Debug)]
pub struct BoundSocket(Mutex<Option<Bound>>);

#[derive(Debug)]
struct Bound {
    path: PathBuf,
    id: (u64, u64),
}

impl CheckedSocket {
    /// Binds the path, replacing a dead socket there; an inherited listener just listens on.
    ///
    /// # Errors
    /// One line for the user; nothing has been created or changed then.
    pub fn listen(self) -> Result<(UnixListener, BoundSocket), ConfigError> {
        let (listener, bound) = match self {
            Self::Inherited(listener) => (listener, None),
            Self::Path(path) => {
                let (listener, id) = bind(&path).map_err(|e| socket_error(&path, e))?;
                (listener, Some(Bound { path, id }))
            }
        };
        Ok((listener, BoundSocket(Mutex::new(bound))))
    }
}

impl BoundSocket {
    /// Removes the file, if it is still the one that was made here. Callable more than once.
    pub fn remove(&self) {
        let bound = lock(&self.0).take();
        if let Some(Bound { path, id }) = bound
            && fs::symlink_metadata(&path).is_ok_and(|now| file_id(&now) == id)
            && let Err(e) = fs::remove_file(&path)
        {
            warn!("{}: can't remove the socket: {e}", path.display());
        }
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn file_id(found: &fs::Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

fn bind(path: &Path) -> io::Result<(UnixListener, (u64, u64))> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    let id = file_id(&fs::symlink_metadata(path)?);
    Ok((listener, id))
}

#[allow(unsafe_code)] // Taking over a descriptor by its number has no safe form.
fn adopt(fd: RawFd) -> Result<UnixListener, ConfigError> {
    let refuse = |why| Err(ConfigError::Fd { fd, why });
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
