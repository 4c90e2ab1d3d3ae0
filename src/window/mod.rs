// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: the `Mapper` seam: what the guest's window shows. Knows no ring and no device.
//!
//! This step keeps these rules of the front-end (docs/front-ends.md). A map is sent only while the
//! device is started (Q1, see `channel/committed.rs`), and from a thread that no memory update
//! waits for (Q3). A map covers no part of an existing map (Q4), and ends at or before the end of
//! the file (Q6).

mod channel;
mod current;
mod freshness;
pub mod layout;
pub(crate) mod locate;
mod whole_file;

use std::fs::File;
use std::io;

use thiserror::Error;

pub use crate::support::units::{FileOffset, FileRange, WindowBytes, WindowOffset, WindowRange};
pub use channel::{Acks, ShmemMapper};
pub(crate) use current::{Current, FrontEnd};
pub(crate) use whole_file::WholeFile;

/// Why a range of the window could not be mapped or unmapped.
#[derive(Debug, Error)]
pub enum MapError {
    /// The front-end acked with an error. Its ack has no reason.
    #[error("the front-end refused the map or unmap")]
    Refused,
    /// The device was stopped before the request was sent. The window is unchanged (Q1).
    #[error("the device was stopped before the request was sent")]
    Stopped,
    /// The front-end lacks the named feature or channel, which each map needs.
    #[error("the front-end lacks {0}")]
    Unsupported(&'static str),
    /// The back-end channel failed.
    #[error("the back-end channel to the front-end failed: {0}")]
    Broken(io::Error),
}

/// Maps files into the window. Each call blocks until the front-end has acked.
///
/// Never call it from the front-end thread, which serves the front-end's messages, nor under a
/// lock which that thread takes: the front-end acks only after the front-end thread has answered
/// the front-end's memory update (Q3).
pub trait Mapper: Send + Sync {
    /// Maps `bytes` bytes of `file` from `from` on, writable, at `at` of the window.
    ///
    /// # Errors
    /// See [`MapError`]. After [`MapError::Broken`] it is not known whether the front-end has
    /// carried out the request; after each other error the window is unchanged.
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError>;

    /// Removes one earlier map, which `at` and `bytes` must describe exactly.
    ///
    /// # Errors
    /// See [`MapError`]. After [`MapError::Broken`] it is not known whether the front-end has
    /// carried out the request; after each other error the window is unchanged.
    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError>;

    /// Unmaps what the window shows in place of a hole of `file`, before the hole gets blocks. The
    /// default does nothing: a mapper that maps the file itself shows the new blocks at once.
    fn unmap_hole(&self, _file: &File, _from: FileOffset, _bytes: WindowBytes) {}
}
