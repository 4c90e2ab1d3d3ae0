// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window of a device and the files in it: SETUPMAPPING and REMOVEMAPPING (`mapping`), and all
//! other changes of a file that may be granted (`changes`). Both go through the engine. Knows no
//! ring.

mod changes;
mod mapping;
pub(crate) mod nodes;
pub(crate) mod times;
mod watch;
mod window;

use std::collections::HashSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use log::warn;
use nix::errno::Errno;
use virtiofsd::fuse::Attr;

use crate::dax::engine::{Engine, GrantError};
use crate::device::SessionWindow;
use crate::persist::PersistMode;
use crate::support::counter::Counter;
use crate::support::lock::{Mutex, lock};
use crate::support::units::{PAGE_BYTES, PMD_BYTES};
use crate::window::WindowBytes;
use crate::window::layout::ShowError;

use super::config::DaxPolicy;
use super::dax::nodes::Nodes;
use super::dax::times::Occasion;
use super::dax::window::{CurrentWindow, FsWindow};
use super::sync_errors::Losses;
use crate::passthrough::PassthroughMount;
use crate::window::locate::{SharedBase, WindowLocation};

/// Largest number of node ids that are remembered as mapped. When it is reached, each file counts
/// as mapped.
const MOST_MAPPED: usize = 1 << 16;

/// Flag of fuse_attr: FUSE_ATTR_DAX.
const ATTR_DAX: u32 = 1 << 1;

/// log2 of the alignment of foffset and moffset, in bytes (`map_alignment` of INIT): a Linux guest
/// maps ranges of 2 MiB.
pub(crate) const MAP_ALIGNMENT_LOG2: u16 = PMD_BYTES.trailing_zeros() as u16;

/// The window of a device and the files in it.
pub(crate) struct Dax {
    engine: Arc<Engine>,
    nodes: Nodes,
    current: Arc<CurrentWindow>,
    base: Arc<SharedBase>,
    /// Number of the VM's memory regions.
    regions: Arc<AtomicUsize>,
    bytes: WindowBytes,
    policy: DaxPolicy,
    /// Whether INIT has allowed the guest to map files.
    mapping: AtomicBool,
    /// Whether the guest maps only files that have FUSE_ATTR_DAX (FUSE_HAS_INODE_DAX).
    flags_wanted: AtomicBool,
    /// Node ids that the guest has mapped, if `flags_wanted`. The guest keeps DAX for a mapped file
    /// that has become too short for the policy.
    mapped: Mutex<HashSet<u64>>,
    /// Inode numbers of files that can't be mapped, because the daemon can't open them for writing.
    for_readers: Mutex<HashSet<u64>>,
    pub(crate) removals: Counter,
}

/// The errno for an error of the engine. Never EAGAIN, nor ENOMEM if the window is full: a guest
/// that handles a page fault would repeat the request without end.
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
    /// Creates the window of a device.
    ///
    /// # Errors
    /// Those of inotify_init1(2) and of the start of the watch thread.
    pub(crate) fn new(
        bytes: WindowBytes,
        policy: DaxPolicy,
        mount: PassthroughMount,
        persist: PersistMode,
        regions: Arc<AtomicUsize>,
        losses: Losses,
    ) -> io::Result<Self> {
        let current = Arc::new(CurrentWindow::default());
        let engine = Arc::new(Engine::new(bytes, current.clone(), most_maps(bytes)));
        Ok(Self {
            nodes: Nodes::new(engine.clone(), mount, persist, losses)?,
            engine,
            current,
            base: Arc::default(),
            regions,
            bytes,
            policy,
            mapping: AtomicBool::new(false),
            flags_wanted: AtomicBool::new(false),
            mapped: Mutex::default(),
            for_readers: Mutex::default(),
            removals: Counter::default(),
        })
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Number of files in the window, including those of running SETUPMAPPINGs.
    pub(crate) fn files(&self) -> usize {
        self.nodes.count()
    }

    /// Creates the window of a new session.
    pub(crate) fn open_window(&self) -> Arc<FsWindow> {
        let (engine, most_maps) = (self.engine.clone(), most_maps(self.bytes));
        let shared = (self.base.clone(), self.regions.clone());
        let window = Arc::new(FsWindow::new(engine, self.bytes, most_maps, shared));
        self.current.set(Some(window.clone()));
        window
    }

    /// Whether the front-end can show a window. May block on the front-end.
    pub(crate) fn can_map(&self) -> bool {
        self.current.get().is_some_and(|window| window.can_map())
    }

    /// Guest physical address and length of the window, if the address is known.
    pub(crate) fn location(&self) -> Option<WindowLocation> {
        let gpa = self.base.get()?;
        Some(WindowLocation { gpa, bytes: self.bytes })
    }

    /// INIT has allowed the guest to map files, or not; and the guest wants FUSE_ATTR_DAX, or not.
    pub(crate) fn agree(&self, mapping: bool, flags_wanted: bool) {
        self.mapping.store(mapping, Ordering::Relaxed);
        self.flags_wanted.store(flags_wanted, Ordering::Relaxed);
    }

    /// Prepares the attributes of a file that the guest may map: sets the block size, and
    /// FUSE_ATTR_DAX if the policy wants it. Returns whether the guest may map the file. Then it
    /// may store to the file without a request, so its cached attributes must have a timeout of 0.
    pub(crate) fn flag(&self, nodeid: u64, attr: &mut Attr) -> bool {
        if attr.mode & libc::S_IFMT != libc::S_IFREG || !self.mapping.load(Ordering::Relaxed) {
            return false;
        }
        // Linux's dax_writeback_mapping_range() fails, and so does each fsync, if the block size of
        // the inode is not the page size. FUSE sets it from this field.
        attr.blksize = PAGE_BYTES as u32;
        if !self.flags_wanted.load(Ordering::Relaxed) {
            return true; // A mount with `dax=always`.
        }
        let pays = self.policy.pays(attr.size) && !lock(&self.for_readers).contains(&attr.ino);
        if pays {
            attr.flags |= ATTR_DAX;
        }
        let mapped = lock(&self.mapped);
        pays || mapped.len() >= MOST_MAPPED || mapped.contains(&nodeid)
    }

    /// Notes that a file could not be opened for writing. A guest that wants FUSE_ATTR_DAX then
    /// uses READ for it.
    fn note_for_readers(&self, ino: u64) {
        let mut for_readers = lock(&self.for_readers);
        if for_readers.len() < MOST_MAPPED {
            for_readers.insert(ino);
        }
    }

    /// The driver has reset the device, and the front-end has removed all maps (Q10): drops all
    /// grants.
    pub(crate) fn forget(&self) {
        if let Some(window) = self.current.get() {
            window.reset();
        }
        self.drop_grants(|| self.engine.reset());
        self.clear_nodes();
    }

    /// The process is about to end: no thread waits for the front-end any more.
    pub(crate) fn close(&self) {
        if let Some(window) = self.current.get() {
            window.ended();
        }
    }

    /// The session has ended.
    pub(crate) fn session_ended(&self) {
        self.forget();
        // The session owns the back-end channel.
        self.current.set(None);
    }

    /// Revokes all grants at an INIT or DESTROY, unless a new driver has started meanwhile.
    /// `is_current` is called while no other thread can grant.
    pub(crate) fn release_all(&self, is_current: impl Fn() -> bool) {
        self.drop_grants(|| {
            if let Err(e) = self.engine.revoke_all(&is_current)
                && is_current()
            {
                warn!("not each map could be removed: {e}");
                self.engine.reset();
            }
        });
    }

    /// Calls `revoke`, which drops all grants, and settles the times of files that had write
    /// grants.
    fn drop_grants(&self, revoke: impl FnOnce()) {
        let written = self.engine.written_in(&[self.engine.whole()]);
        revoke();
        self.removed(&written);
        // Does not wait for the disk: the start of the next driver waits for this thread.
        self.settle_all(Occasion::End);
    }

    /// Forgets which files the guest has mapped.
    pub(crate) fn clear_nodes(&self) {
        self.nodes.forget();
        lock(&self.mapped).clear();
        lock(&self.for_readers).clear();
    }

    /// The guest has forgotten a node id.
    pub(crate) fn forget_number(&self, nodeid: u64) {
        self.nodes.forget_number(nodeid);
        lock(&self.mapped).remove(&nodeid);
    }
}

/// Largest number of maps: one for each slot of 2 MiB. A Linux guest requests whole slots, and one
/// map covers a slot.
fn most_maps(bytes: WindowBytes) -> usize {
    usize::try_from(bytes.0 / PMD_BYTES).unwrap_or(usize::MAX)
}
