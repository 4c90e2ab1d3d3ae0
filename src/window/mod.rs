// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: the `Mapper` seam: what the guest's window shows. Knows no ring and no device.
//!
//! The front-end's rules that this step keeps (rows of the table in the project's notes on QEMU): a
//! map is made only while the device is started (Q1, see `channel.rs`), from a thread that no
//! memory update waits for (Q3), never over a live one (Q4), and never past the end of the file
//! (Q6).

mod channel;
mod current;
pub mod layout;
pub(crate) mod locate;
mod telling;
mod whole_file;

use std::fs::File;
use std::io;

use thiserror::Error;

pub use crate::support::units::{FileOffset, FileRange, WindowBytes, WindowOffset, WindowRange};
pub use channel::{Acks, ShmemMapper};
pub(crate) use current::FrontEnd;
pub(crate) use whole_file::WholeFile;

/// Why a piece of the window could not be mapped or unmapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// The front-end said no. It does not say why.
    #[error("the front-end refused")]
    Refused,
    /// The device was stopped before the request was made: nothing was done (Q1).
    #[error("the device was stopped")]
    Stopped,
    /// The front-end lacks something that no map can do without.
    #[error("the front-end lacks {0}")]
    Unsupported(&'static str),
    /// The channel to the front-end is broken.
    #[error("the front-end can't be reached: {0}")]
    Broken(io::Error),
}

/// Changes what the window shows. Blocks until the front-end has answered.
///
/// Never call it from the thread that serves the front-end's messages, nor under a lock which
/// that thread takes: the front-end answers only after its own memory update is answered (Q3).
pub trait Mapper: Send + Sync {
    /// Shows `bytes` of `file` from `from` on, writable, at `at`.
    ///
    /// # Errors
    /// See [`MapError`]; after an error the window is as it was before.
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError>;

    /// Takes away exactly one earlier map.
    ///
    /// # Errors
    /// See [`MapError`]; after an error the window is as it was before.
    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError>;

    /// Takes away what stands in the window for a hole of `file`, before the hole gets blocks.
    /// A mapper that maps the file itself shows the new blocks at once: nothing to do.
    fn unmap_hole(&self, _file: &File, _from: FileOffset, _bytes: WindowBytes) {}
}
