// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! SETUPMAPPING and REMOVEMAPPING, and what else changes a file that may be granted at the same
//! time. Everything here goes through the engine. Knows no message and no ring.

pub(crate) mod nodes;
pub(crate) mod times;
mod watch;
mod window;

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use log::warn;
use nix::errno::Errno;
use virtiofsd::fuse::{Attr, RemovemappingOne, SetupmappingIn};

use crate::dax::engine::{Engine, GrantError, Space};
use crate::dax::extent::Access;
use crate::dax::written::Bytes;
use crate::device::SessionWindow;
use crate::persist::{Direct, PersistMode};
use crate::support::counter::Counter;
use crate::support::failpoint;
use crate::support::lock::lock;
use crate::support::units::{PAGE_BYTES, PMD_BYTES, PageIndex};
use crate::window::layout::ShowError;
use crate::window::{FileOffset, FrontEnd, WindowBytes, WindowOffset};

use super::config::DaxPolicy;
use super::dax::nodes::{Found, Node, Nodes};
use super::dax::times::Occasion;
use super::dax::window::FsWindow;
use super::identity::Subject;
use super::message::invalid;
use super::sync_errors::Losses;
use crate::passthrough::PassthroughMount;
use crate::window::locate::{SharedBase, WindowLocation};

/// FUSE_SETUPMAPPING_FLAG_WRITE and _READ.
const FLAG_WRITE: u64 = 1 << 0;
const FLAG_READ: u64 = 1 << 1;

/// The most removals in one REMOVEMAPPING (FUSE_REMOVEMAPPING_MAX_ENTRY: a page of them).
pub(crate) const MAX_REMOVALS: u32 = 256;

/// The most of the guest's numbers that are remembered as mapped. With more, each file counts as
/// mapped.
const MOST_MAPPED: usize = 1 << 16;

/// FUSE_ATTR_DAX.
const ATTR_DAX: u32 = 1 << 1;

/// log2 of what foffset and moffset must be multiples of: the slots of a Linux guest.
pub(crate) const MAP_ALIGNMENT_LOG2: u16 = PMD_BYTES.trailing_zeros() as u16;

/// The window of a device, and the files in it.
pub(crate) struct Dax {
    engine: Arc<Engine>,
    nodes: Nodes,
    front_end: Arc<FrontEnd>,
    current: Mutex<Option<Arc<FsWindow>>>,
    base: Arc<SharedBase>,
    /// How many memory regions the VM has.
    regions: Arc<AtomicUsize>,
    bytes: WindowBytes,
    policy: DaxPolicy,
    /// The guest may map files.
    mapping: AtomicBool,
    /// It wants a flag on each file that is to be mapped.
    flags_wanted: AtomicBool,
    /// What the guest has mapped, if it is told which files to map: it goes on with one that has
    /// become short meanwhile.
    mapped: Mutex<HashSet<u64>>,
    pub(crate) removals: Counter,
}

/// What goes wrong in the engine, as the guest is told. Never EAGAIN, nor ENOMEM for want of maps:
/// a guest that faults tries again for ever.
fn guest_error(e: &GrantError) -> io::Error {
    if matches!(e, GrantError::Window(ShowError::TooMany(_))) {
        return Errno::ENOBUFS.into();
    }
    match e.errno() {
        Errno::EAGAIN => Errno::EIO.into(),
        errno => errno.into(),
    }
}

impl Dax {
    /// # Errors
    /// The system's.
    pub(crate) fn new(
        bytes: WindowBytes,
        policy: DaxPolicy,
        mount: PassthroughMount,
        persist: PersistMode,
        regions: Arc<AtomicUsize>,
        losses: Losses,
    ) -> io::Result<Self> {
        let front_end = Arc::new(FrontEnd::default());
        let engine = Arc::new(Engine::new(bytes, front_end.clone(), most_maps(bytes)));
        Ok(Self {
            nodes: Nodes::new(engine.clone(), mount, persist, losses)?,
            engine,
            front_end,
            current: Mutex::default(),
            base: Arc::default(),
            regions,
            bytes,
            policy,
            mapping: AtomicBool::new(false),
            flags_wanted: AtomicBool::new(false),
            mapped: Mutex::default(),
            removals: Counter::default(),
        })
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// How many files are in the window, or about to be.
    pub(crate) fn files(&self) -> usize {
        self.nodes.count()
    }

    fn current(&self) -> Option<Arc<FsWindow>> {
        lock(&self.current).clone()
    }

    fn set_current(&self, window: Option<Arc<FsWindow>>) {
        *lock(&self.current) = window;
    }

    /// A new front-end's window.
    pub(crate) fn open_window(&self) -> Arc<FsWindow> {
        let (engine, most_maps) = (self.engine.clone(), most_maps(self.bytes));
        let shared = (self.base.clone(), self.regions.clone());
        let window = Arc::new(FsWindow::new(engine, self.bytes, most_maps, shared));
        self.front_end.set(Some(window.clone()));
        self.set_current(Some(window.clone()));
        window
    }

    /// Whether this front-end can show a window. May block.
    pub(crate) fn is_there(&self) -> bool {
        self.current().is_some_and(|window| window.is_there())
    }

    /// Where the window is in the guest's memory, if that is known.
    pub(crate) fn location(&self) -> Option<WindowLocation> {
        let gpa = self.base.get()?;
        Some(WindowLocation { gpa, bytes: self.bytes })
    }

    /// INIT agreed on whether the guest may map files, and whether it wants a flag on each.
    pub(crate) fn agree(&self, mapping: bool, flags_wanted: bool) {
        self.mapping.store(mapping, Ordering::Relaxed);
        self.flags_wanted.store(flags_wanted, Ordering::Relaxed);
    }

    /// Marks the files for which the policy wants DAX, and makes those that may be mapped fit for
    /// it. Whether this one may be: then the guest may change it without our seeing it, and what it
    /// knows of its attributes is not to be believed.
    pub(crate) fn flag(&self, nodeid: u64, attr: &mut Attr) -> bool {
        if attr.mode & libc::S_IFMT != libc::S_IFREG || !self.mapping.load(Ordering::Relaxed) {
            return false;
        }
        // Linux's dax_writeback_mapping_range() refuses to write back (and so fails each fsync)
        // where the block size is not the page size, and FUSE takes the former from here.
        attr.blksize = PAGE_BYTES as u32;
        if !self.flags_wanted.load(Ordering::Relaxed) {
            return true; // A mount with `dax=always`.
        }
        let pays = self.policy.pays(attr.size);
        if pays {
            attr.flags |= ATTR_DAX;
        }
        let mapped = lock(&self.mapped);
        pays || mapped.len() >= MOST_MAPPED || mapped.contains(&nodeid)
    }

    /// The driver has reset the device: the front-end has dropped all maps, and nothing is granted.
    pub(crate) fn forget(&self) {
        if let Some(window) = self.current() {
            window.reset();
        }
        self.take_away_all(|| self.engine.reset());
        self.clear_nodes();
    }

    /// The process is about to end: nothing waits for the front-end any more.
    pub(crate) fn close(&self) {
        if let Some(window) = self.current() {
            window.ended();
        }
    }

    /// The session is over.
    pub(crate) fn session_ended(&self) {
        self.forget();
        // Its back-end channel goes with it.
        self.front_end.set(None);
        self.set_current(None);
    }

    /// The guest unmounts, or mounts anew: takes every map away, but none of a driver that has
    /// begun anew meanwhile. What `is_current` says is looked at when nothing else can be granted.
    pub(crate) fn release_all(&self, is_current: impl Fn() -> bool) {
        self.take_away_all(|| {
            if let Err(e) = self.engine.revoke_all(&is_current)
                && is_current()
            {
                warn!("not every map could be taken away: {e}");
                self.engine.reset();
            }
        });
    }

    /// Lets `take_away` take all grants away, and settles the times of what was stored through
    /// them.
    fn take_away_all(&self, take_away: impl FnOnce()) {
        let written = self.engine.written_in(&[self.engine.whole()]);
        take_away();
        self.removed(&written);
        // A driver that begins anew waits for this.
        self.settle_all(Occasion::End);
    }

    /// Looks whether anything was stored to what was granted, and is not any more.
    fn removed(&self, written: &[(Arc<Space>, Bytes)]) {
        if written.is_empty() {
            return;
        }
        let nodes = self.nodes.all();
        for (space, bytes) in written {
            if let Some(node) = nodes.iter().find(|node| Arc::ptr_eq(&node.space, space)) {
                node.times.removed(*bytes);
            }
        }
    }

    /// Lets go of what is not used any more.
    fn drop_idle(&self) {
        for node in self.nodes.idle() {
            node.times.settle(&self.engine, &node.space, Occasion::Close);
        }
        self.nodes.drop_idle();
    }

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

    /// Forgets which files have been mapped.
    pub(crate) fn clear_nodes(&self) {
        self.nodes.forget();
        lock(&self.mapped).clear();
    }

    /// What there is of a file of which something may be granted or about to be.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn find<'a>(&self, subject: Subject<'a>) -> io::Result<Found<'a>> {
        self.nodes.find(subject)
    }

    /// The guest has forgotten a number.
    pub(crate) fn forget_number(&self, nodeid: u64) {
        self.nodes.forget_number(nodeid);
        lock(&self.mapped).remove(&nodeid);
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

    /// SETUPMAPPING. `open` gives the file, readable and writable. `is_current` says whether the
    /// guest still wants it, in the moment in which nothing else can be granted.
    ///
    /// # Errors
    /// What the guest is told; never EAGAIN.
    pub(crate) fn setup(
        &self,
        nodeid: u64,
        asked: &SetupmappingIn,
        is_current: impl Fn() -> bool,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<()> {
        let access = match asked.flags {
            FLAG_READ => Access::Read,
            flags if flags & !FLAG_READ == FLAG_WRITE => Access::Write,
            _ => return Err(invalid()),
        };
        if !asked.foffset.is_multiple_of(PMD_BYTES) || !asked.moffset.is_multiple_of(PMD_BYTES) {
            return Err(invalid());
        }
        let span = self.engine.span(WindowOffset(asked.moffset), WindowBytes(asked.len));
        let span = span.map_err(|e| guest_error(&e))?;
        let node = self.nodes.get_or_make(nodeid, open).map_err(|e| match e.raw_os_error() {
            Some(errno) if errno != libc::EAGAIN => e,
            _ => Errno::EIO.into(),
        })?;
        if self.flags_wanted.load(Ordering::Relaxed) {
            let mut mapped = lock(&self.mapped);
            if mapped.len() < MOST_MAPPED {
                mapped.insert(nodeid);
            }
        }
        let replaced = self.engine.written_in(&[span]);
        let from = FileOffset(asked.foffset);
        let granted = self.engine.grant_if(&node.space, from, span, access, is_current);
        if granted.is_ok() && access == Access::Write {
            node.times.granted();
        }
        drop(node);
        self.removed(&replaced);
        // Also after a success: what it replaced may have been the last of another file.
        self.drop_idle();
        granted.map_err(|e| guest_error(&e))
    }

    /// REMOVEMAPPING. All numbers are looked at before anything is done.
    ///
    /// # Errors
    /// What the guest is told.
    pub(crate) fn remove(&self, removals: &[RemovemappingOne]) -> io::Result<()> {
        let spans: Result<Vec<_>, _> = removals
            .iter()
            .map(|one| self.engine.span(WindowOffset(one.moffset), WindowBytes(one.len)))
            .collect();
        let spans = spans.map_err(|e| guest_error(&e))?;
        let written = self.engine.written_in(&spans);
        let done = self.engine.revoke(&spans);
        self.removals.add(removals.len() as u64);
        self.removed(&written);
        self.drop_idle();
        done.map_err(|e| guest_error(&e))
    }

    /// Lets `change` set the inode's length to `bytes`.
    ///
    /// # Errors
    /// The change's, or the engine's.
    pub(crate) fn resize<T>(
        &self,
        file: &Found<'_>,
        bytes: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(node) = &file.node else { return self.beside(file, change) };
        let done = self.engine.resize_by(&node.space, bytes, change);
        done.map(|(done, _)| done).map_err(|e| guest_error(&e))
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

    /// Lets `write` write `bytes` at byte `from` of the inode: past the processor's cache where it
    /// is given the file's memory, which has blocks for all of them then (behaviour 13).
    ///
    /// # Errors
    /// The write's, or the engine's.
    pub(crate) fn write(
        &self,
        file: &Found<'_>,
        from: u64,
        bytes: u64,
        write: impl FnOnce(Option<&Direct>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Some(node) = &file.node else { return self.beside(file, || write(None)) };
        let (space, from) = (&node.space, FileOffset(from));
        let done = self.engine.write_by(space, from, bytes, || {
            let Some(direct) = node.direct.as_deref() else { return write(None) };
            write(space.may_be_stored_to(from, bytes)?.then_some(direct))
        });
        done.map_err(|e| guest_error(&e))
    }

    /// Makes a hole, or zeros where a write grant needs the blocks. False if nothing is granted.
    ///
    /// # Errors
    /// The engine's.
    pub(crate) fn punch(&self, file: &Found<'_>, from: u64, bytes: u64) -> io::Result<bool> {
        let Some(node) = &file.node else { return Ok(false) };
        self.engine.punch(&node.space, from, bytes).map_err(|e| guest_error(&e))?;
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
        if failpoint::is_on("fs-reply-before-sync") {
            let (engine, node) = (self.engine.clone(), node.clone());
            let late = move || engine.writeback(&node.space, PageIndex(0), PageIndex::LAST);
            std::thread::spawn(late);
            return Ok(());
        }
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

/// One for each slot: a Linux guest asks for whole slots, and the map of one covers it.
fn most_maps(bytes: WindowBytes) -> usize {
    usize::try_from(bytes.0 / PMD_BYTES).unwrap_or(usize::MAX)
}
