// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 6 of 6: the `Persist` seam: what makes the file's bytes durable. Knows no virtio.

mod backing;
pub mod cacheline;
pub mod dirty;
mod fdatasync;
mod file_systems;
mod group;
mod mapped;
mod sigbus;

use std::io;

pub(crate) use backing::page_bytes;
pub use backing::{Backing, DaxNode, Durability, FilePersist, PersistError, PersistMode};
pub use fdatasync::Fdatasync;
pub use file_systems::FileSystem;
pub use group::{GroupSync, Waiter};
pub use mapped::Direct;
pub(crate) use sigbus::Guarded;

/// Makes durable what has been stored so far.
pub trait Persist: Send + Sync + 'static {
    /// Returns once all stores that completed before the call are durable.
    ///
    /// # Errors
    /// Any error is final: the kernel may have dropped the pages that it could not write, and a
    /// later success would say nothing about them. The caller must not sync again.
    fn sync(&self) -> io::Result<()>;

    /// Whether anything was lost of what others have made durable through another open file of the
    /// same inode.
    ///
    /// # Errors
    /// Final, as those of [`sync`](Self::sync).
    fn check(&self) -> io::Result<()> {
        self.sync()
    }

    /// Whether the kernel knows what is dirty. If so, only [`sync`](Self::sync) and
    /// [`check`](Self::check) are called.
    fn kernel_tracks(&self) -> bool {
        true
    }

    /// Begins to make durable `bytes` of the file from byte `from` on, if the kernel does not track
    /// it. They are durable once this thread has called [`fence`](Self::fence).
    ///
    /// # Errors
    /// Final, as those of [`sync`](Self::sync).
    fn flush(&self, _from: u64, _bytes: u64) -> io::Result<()> {
        self.sync()
    }

    /// Returns once all that this thread has flushed is durable: one for each batch of flushes.
    fn fence(&self) {}
}
