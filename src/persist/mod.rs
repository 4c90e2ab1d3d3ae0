// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 6 of 6: the `Persist` seam: what makes a file's bytes durable. Knows no virtio.

mod backing;
pub mod cacheline;
mod device_dax;
pub mod dirty;
mod fdatasync;
mod file_systems;
mod group;
mod mapped;
mod sigbus;

use std::io;

pub use backing::{Backing, Durability, FilePersist, PersistError, PersistMode};
pub use device_dax::DaxNode;
pub(crate) use device_dax::page_bytes;
pub use fdatasync::Fdatasync;
pub use file_systems::FileSystem;
pub use group::{GroupSync, Waiter};
pub use mapped::Direct;
pub(crate) use sigbus::Guarded;

use crate::support::units::FileRange;

/// How stores to one file become durable.
pub enum Persist {
    /// By a sync: the kernel tracks dirty pages. For a file in the page cache or on a DAX file
    /// system.
    Kernel(Box<dyn KernelSync>),
    /// By cache lines: only the engine's entries track dirty pages. For a file on persistent memory
    /// or in memory, mapped by this process.
    Lines(Box<dyn LineFlush>),
}

impl Persist {
    /// [`Persist::Kernel`] with `sync`.
    pub fn kernel(sync: impl KernelSync) -> Self {
        Self::Kernel(Box::new(sync))
    }

    /// [`Persist::Lines`] with `flush`.
    pub fn lines(flush: impl LineFlush) -> Self {
        Self::Lines(Box::new(flush))
    }
}

/// Makes durable the pages of one file that the kernel knows to be dirty.
pub trait KernelSync: Send + Sync + 'static {
    /// Returns once all stores that completed before the call are durable.
    ///
    /// # Errors
    /// The error of the sync, usually EIO. It is final: the kernel may have dropped the pages that
    /// it could not write, and a later sync may succeed without them. The caller must not sync
    /// again.
    fn sync(&self) -> io::Result<()>;

    /// Returns an error if pages of the inode were lost in a sync through another open file
    /// description.
    ///
    /// # Errors
    /// EIO if pages were lost. It is final, as an error of [`sync`](Self::sync).
    fn check(&self) -> io::Result<()> {
        self.sync()
    }
}

/// Makes durable the ranges of one file that the caller knows to be dirty.
pub trait LineFlush: Send + Sync + 'static {
    /// Begins to make `range` of the file durable. It is durable once this thread has called
    /// [`fence`](Self::fence).
    ///
    /// # Errors
    /// EIO if a page of the range is missing or has failed. It is final: stores to the range may be
    /// lost. The caller must not flush again.
    fn flush(&self, range: FileRange) -> io::Result<()>;

    /// Returns once all ranges that this thread has flushed are durable. One fence serves a batch
    /// of flushes.
    fn fence(&self);
}
