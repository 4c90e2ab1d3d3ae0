// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests that change a file that may be granted, or that need its times. For a file that has an
//! address space they go through the engine. Knows no message and no window.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::persist::Direct;
use crate::support::units::PageIndex;
use crate::window::FileRange;

use crate::fs::dax::nodes::{Found, Node};
use crate::fs::dax::times::Occasion;
use crate::fs::dax::{Dax, guest_error};
use crate::fs::host_file::Subject;

impl Dax {
    /// Settles the times of a file: see `times`.
    pub(crate) fn settle(&self, file: &Found<'_>, occasion: Occasion) {
        if let Some(node) = &file.node {
            node.times.settle(&self.engine, &node.space, occasion);
        }
    }

    /// Settles the times of node id `nodeid`, whose inode number on the host is `ino`. Returns
    /// whether the times may have changed, by this thread or by another one that settled them
    /// meanwhile.
    pub(crate) fn settle_inode(&self, nodeid: u64, ino: u64) -> bool {
        let settle = |node: &Arc<Node>| {
            node.times.settle(&self.engine, &node.space, Occasion::Look);
        };
        // Two files of two devices may have this inode number: both are settled, without harm.
        let nodes = self.nodes.of_inode(nodeid, ino);
        nodes.iter().for_each(settle);
        nodes.iter().any(|node| node.times.is_watched())
    }

    /// Settles the times of all files.
    pub(crate) fn settle_all(&self, occasion: Occasion) {
        for node in self.nodes.all() {
            node.times.settle(&self.engine, &node.space, occasion);
        }
    }

    /// Calls `change`, which changes attributes of a file. `given`: mtime is one of them.
    ///
    /// # Errors
    /// Those of `change`.
    pub(crate) fn change_times<T>(
        &self,
        file: &Found<'_>,
        given: bool,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &file.node {
            Some(node) => node.times.change(&self.engine, &node.space, given, change),
            None => change(),
        }
    }

    /// All handles of the file were closed after the loss of data was reported: the engine forgets
    /// it.
    pub(crate) fn forgive(&self, file: &Found<'_>) {
        if let Some(node) = &file.node {
            node.space.forgive();
        }
    }

    /// A file was opened for writing: see `Times::opened`.
    pub(crate) fn opened(&self, file: &Found<'_>, count: impl FnOnce() -> bool) {
        match &file.node {
            Some(node) => node.times.opened(&self.engine, &node.space, count),
            None => drop(count()),
        }
    }

    /// A handle that can write is about to be released: see `Times::closed`.
    pub(crate) fn closed(&self, file: &Found<'_>, count: impl FnOnce() -> bool) {
        match &file.node {
            Some(node) => node.times.closed(&self.engine, &node.space, count),
            None => drop(count()),
        }
    }

    /// Finds the address space of a file, if it has one.
    ///
    /// # Errors
    /// Those of finding out which file it is.
    pub(crate) fn find<'a>(&self, subject: Subject<'a>) -> io::Result<Found<'a>> {
        self.nodes.find(subject)
    }

    /// Calls `change` for a file that had no address space. A SETUPMAPPING may have granted the
    /// file meanwhile, by its length before the change: the engine then checks the length again.
    fn beside<T>(&self, file: &Found<'_>, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let done = change()?;
        if let Some(node) = self.nodes.find_again(file)? {
            self.engine.resized(&node.space).map_err(|e| guest_error(&e))?;
        }
        Ok(done)
    }

    /// Calls `change`, which sets the length of the file to `bytes`.
    ///
    /// # Errors
    /// Those of the engine, and of `change`, including EAGAIN for a lease.
    pub(crate) fn resize<T>(
        &self,
        file: &Found<'_>,
        bytes: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(node) = &file.node else { return self.beside(file, change) };
        let done = self.engine.resize_by(&node.space, bytes, change);
        done.map(|(done, _)| done).map_err(|e| match e.errno() {
            Errno::EAGAIN => Errno::EAGAIN.into(),
            _ => guest_error(&e),
        })
    }

    /// Calls `change`, which changes the length or the blocks of the file, and makes it shorter by
    /// at most `shorter_by` bytes.
    ///
    /// # Errors
    /// Those of `change` and of the engine.
    pub(crate) fn change<T>(
        &self,
        file: &Found<'_>,
        shorter_by: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(node) = &file.node else { return self.beside(file, change) };
        let at_least = node.space.source().file_bytes()?.saturating_sub(shorter_by);
        self.engine.change(&node.space, at_least, change).map_err(|e| guest_error(&e))
    }

    /// Calls `write`, which writes `range` of the file. It gets the file's memory if all blocks of
    /// `range` exist, and must then store past the processor's cache (behaviour 13).
    ///
    /// # Errors
    /// Those of `write` and of the engine.
    pub(crate) fn write(
        &self,
        file: &Found<'_>,
        range: FileRange,
        write: impl FnOnce(Option<&Direct>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some(node) = &file.node else { return self.beside(file, || write(None)) };
        let space = &node.space;
        let done = self.engine.write_by(space, range, || {
            let Some(direct) = node.direct.as_deref() else { return write(None) };
            write(space.may_be_stored_to(range)?.then_some(direct))
        });
        done.map_err(|e| guest_error(&e))
    }

    /// Punches a hole; writes zeros instead where a write grant needs the blocks. Returns false,
    /// and does nothing, if the file has no address space.
    ///
    /// # Errors
    /// Those of the engine.
    pub(crate) fn punch(&self, file: &Found<'_>, range: FileRange) -> io::Result<bool> {
        let Some(node) = &file.node else { return Ok(false) };
        self.engine.punch(&node.space, range).map_err(|e| guest_error(&e))?;
        if node.direct.is_some() {
            // The daemon has stored zeros itself, so the kernel has not changed mtime.
            node.times.touch();
        }
        Ok(true)
    }

    /// Makes a file durable: first stores through the window, then `sync`, which uses the guest's
    /// handle.
    ///
    /// # Errors
    /// Those of both. After an error each later sync of the file fails.
    pub(crate) fn sync(
        &self,
        file: &Found<'_>,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(node) = &file.node else { return sync() };
        self.engine.writeback_by(&node.space, sync)
    }

    /// Makes stores through the window durable, for all files that have an address space.
    ///
    /// # Errors
    /// The first error.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.nodes
            .all()
            .iter()
            .try_for_each(|node| self.engine.writeback(&node.space, PageIndex(0), PageIndex::LAST))
    }
}
