// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What changes a file that may be granted at the same time, or wants its times: all of it goes
//! through the engine where the file has an address space. Knows no message and no window.

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

    /// Settles the times of the guest's inode `nodeid`, which has the inode number `ino` on the
    /// host. Whether they may have become new: by this, or by a thread that settled them meanwhile.
    pub(crate) fn settle_inode(&self, nodeid: u64, ino: u64) -> bool {
        let settle = |node: &Arc<Node>| {
            node.times.settle(&self.engine, &node.space, Occasion::Look);
        };
        // Of two files on two devices both are settled, which does no harm.
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

    /// Lets `change` change attributes of a file, mtime among them if it is `given`.
    ///
    /// # Errors
    /// The change's.
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

    /// All have closed the file, and were told that data was lost: it starts anew.
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

    /// A handle that could write is about to go: see `Times::closed`.
    pub(crate) fn closed(&self, file: &Found<'_>, count: impl FnOnce() -> bool) {
        match &file.node {
            Some(node) => node.times.closed(&self.engine, &node.space, count),
            None => drop(count()),
        }
    }

    /// What there is of a file of which something may be granted or about to be.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn find<'a>(&self, subject: Subject<'a>) -> io::Result<Found<'a>> {
        self.nodes.find(subject)
    }

    /// A change of a file that was not to be found in the window. If it has got there meanwhile,
    /// what was granted may rest on how the file was before: the engine looks at it again.
    fn beside<T>(&self, file: &Found<'_>, change: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let done = change()?;
        if let Some(node) = self.nodes.find_again(file)? {
            self.engine.resized(&node.space).map_err(|e| guest_error(&e))?;
        }
        Ok(done)
    }

    /// Lets `change` set the inode's length to `bytes`.
    ///
    /// # Errors
    /// The change's (EAGAIN, too: it would wait for a lease), or the engine's.
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

    /// Lets `change` do something to the inode's length or blocks that makes it shorter by at most
    /// `shorter_by` bytes.
    ///
    /// # Errors
    /// The change's, or the engine's.
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

    /// Lets `write` write to `range` of the inode: past the processor's cache where it
    /// is given the file's memory, which has blocks for all of them then (behaviour 13).
    ///
    /// # Errors
    /// The write's, or the engine's.
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

    /// Makes a hole, or zeros where a write grant needs the blocks. False if nothing is granted.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) fn punch(&self, file: &Found<'_>, range: FileRange) -> io::Result<bool> {
        let Some(node) = &file.node else { return Ok(false) };
        self.engine.punch(&node.space, range).map_err(|e| guest_error(&e))?;
        if node.direct.is_some() {
            // Zeros of our own make, which the kernel does not see.
            node.times.touch();
        }
        Ok(true)
    }

    /// Makes the inode durable: what the window was written through, then `sync`, which is about
    /// the guest's own handle.
    ///
    /// # Errors
    /// Either one's; it is final.
    pub(crate) fn sync(
        &self,
        file: &Found<'_>,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let Some(node) = &file.node else { return sync() };
        self.engine.writeback_by(&node.space, sync)
    }

    /// The same for all inodes that have anything granted.
    ///
    /// # Errors
    /// The first one's.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.nodes
            .all()
            .iter()
            .try_for_each(|node| self.engine.writeback(&node.space, PageIndex(0), PageIndex::LAST))
    }
}
