// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Validated settings: what is refused is refused before anything is created or changed.

use thiserror::Error;

use super::listener::{SocketError, SocketSpec};
use crate::fs::{FsConfig, FsError};
use crate::persist::PersistMode;
use crate::pmem::{PmemFileError, PmemFileSpec};

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
    /// Wait for the next front-end when one has gone.
    pub keep_listening: bool,
}

/// The settings of `vhost-user-dax fs`.
#[derive(Debug, Clone)]
pub struct FsRunConfig {
    /// Where the front-end finds the daemon.
    pub socket: SocketSpec,
    /// What is served, and how.
    pub fs: FsConfig,
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
    #[error("{0}")]
    Option(String),
}
