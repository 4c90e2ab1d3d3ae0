// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Validated settings: what is refused is refused before anything is created or changed.

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
    /// Where the front-end finds the daemon.
    pub socket: SocketSpec,
    /// The file and what to do if it is missing.
    pub file: PmemFileSpec,
    /// What makes its bytes durable.
    pub persist: PersistMode,
    /// Offer CONFIGURE_MEM_SLOTS.
    pub mem_slots: bool,
    /// What the process that serves the guest is left with.
    pub sandbox: SandboxOptions,
    /// Wait for the next front-end when one has gone.
    pub keep_listening: bool,
}

impl PmemConfig {
    /// Refuses a file that is the socket, or the socket's lock, which the daemon makes and removes.
    ///
    /// # Errors
    /// One line for the user.
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

/// Whether both paths lead to one place, be there a file or not.
fn is_one(file: &Path, other: &Path) -> bool {
    let place = place(other);
    // A symbolic link is one place, and what it leads to is another.
    file == other
        || place.is_some() && (self::place(file) == place || fs::canonicalize(file).ok() == place)
}

/// The path without links but in its last part.
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
    /// Where the front-end finds the daemon.
    pub socket: SocketSpec,
    /// What is served, and how.
    pub fs: FsConfig,
    /// What the process that serves the guest is left with.
    pub sandbox: SandboxOptions,
    /// Wait for the next front-end when one has gone.
    pub keep_listening: bool,
}

/// A setting that can't be used. Each is one line that says what to do; the exit code is 2,
/// and nothing has been created or changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The texts say it better.
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
