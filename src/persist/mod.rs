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

/// How the stores to one file become durable: by the kernel, which knows what is dirty, or by cache
/// lines, where only the engine's entries know that.
pub enum Persist {
    /// A file in the page cache, or on a DAX file system.
    Kernel(Box<dyn KernelSync>),
    /// A file whose pages are the memory itself.
    Lines(Box<dyn LineFlush>),
}

impl Persist {
    /// By the kernel.
    pub fn kernel(sync: impl KernelSync) -> Self {
        Self::Kernel(Box::new(sync))
    }

    /// By cache lines.
    pub fn lines(flush: impl LineFlush) -> Self {
        Self::Lines(Box::new(flush))
    }
}

/// Makes durable what the kernel knows to be dirty of one file.
pub trait KernelSync: Send + Sync + 'static {
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
}

/// Makes durable what the caller knows to be dirty of one file.
pub trait LineFlush: Send + Sync + 'static {
    /// Begins to make `range` of the file durable. It is once this thread has called
    /// [`fence`](Self::fence).
    ///
    /// # Errors
    /// Any error is final: what was stored there may be lost. The caller must not flush again.
    fn flush(&self, range: FileRange) -> io::Result<()>;

    /// Returns once all that this thread has flushed is durable: one for each batch of flushes.
    fn fence(&self);
}
