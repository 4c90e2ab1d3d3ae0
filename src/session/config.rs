// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Validated settings. A setting is refused before anything is created or changed.

use std::fs;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::listener::{SocketError, SocketSpec};
use crate::fs::{FsConfig, FsError};
use crate::persist::PersistMode;
use crate::pmem::{PmemFileError, PmemFileSpec};
use crate::sandbox::user_namespace::NamespaceError;
use crate::sandbox::{SandboxError, SandboxOptions};

/// The settings of `vhost-user-dax pmem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemConfig {
    /// The socket on which the daemon listens.
    pub socket: SocketSpec,
    /// The file, and whether to create it.
    pub file: PmemFileSpec,
    /// How a flush makes the file durable.
    pub persist: PersistMode,
    /// Whether to offer CONFIGURE_MEM_SLOTS.
    pub mem_slots: bool,
    /// The sandbox of the process that serves the guest.
    pub sandbox: SandboxOptions,
    /// Whether to serve another front-end after one has disconnected.
    pub keep_listening: bool,
}

impl PmemConfig {
    /// Checks that the file is neither the socket nor the socket's lock file, both of which the
    /// daemon creates and removes.
    ///
    /// # Errors
    /// [`ConfigError::Option`].
    pub(crate) fn check_paths(&self) -> Result<(), ConfigError> {
        let SocketSpec::Path { path: socket, .. } = &self.socket else { return Ok(()) };
        let file = &self.file.path;
        let mut lock = socket.as_os_str().to_owned();
        lock.push(".lock");
        let line = if is_one(file, socket) {
            format!("--file and --socket-path are both {}; take two paths", file.display())
        } else if is_one(file, Path::new(&lock)) {
            format!(
                "--file {} is the lock of --socket-path, which the daemon removes; take another \
                 path",
                file.display()
            )
        } else {
            return Ok(());
        };
        Err(ConfigError::Option(line))
    }
}

/// Whether both paths name the same place, whether or not a file exists there.
fn is_one(file: &Path, other: &Path) -> bool {
    let place = place(other);
    // A symbolic link and its target are two places; `file` may name either.
    file == other
        || place.is_some() && (self::place(file) == place || fs::canonicalize(file).ok() == place)
}

/// The path with the symbolic links of its directory resolved, but not that of its last component.
fn place(path: &Path) -> Option<PathBuf> {
    let dir = match path.parent()? {
        dir if dir.as_os_str().is_empty() => Path::new("."),
        dir => dir,
    };
    Some(fs::canonicalize(dir).ok()?.join(path.file_name()?))
}

/// The settings of `vhost-user-dax fs`.
#[derive(Debug, Clone)]
pub struct FsRunConfig {
    /// The socket on which the daemon listens.
    pub socket: SocketSpec,
    /// The share and its options.
    pub fs: FsConfig,
    /// The sandbox of the process that serves the guest.
    pub sandbox: SandboxOptions,
    /// Whether to serve another front-end after one has disconnected.
    pub keep_listening: bool,
}

/// A setting that can't be used. The text is one line with the remedy. The exit code is 2; nothing
/// has been created or changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The error texts document the variants.
pub enum ConfigError {
    #[error(transparent)]
    PmemFile(#[from] PmemFileError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("--uid-map, --gid-map: {0}")]
    UserNamespace(#[from] NamespaceError),
    #[error("{0}")]
    Option(String),
}
