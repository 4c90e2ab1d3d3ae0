// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window of a device, and the files in it: what the guest maps (`mapping`), and what else
//! changes a file that may be granted at the same time (`changes`). Everything here goes through the
//! engine. Knows no ring.

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
    current: Arc<CurrentWindow>,
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
    /// The inode numbers of files that could not be mapped, since they can't be opened for writing.
    for_readers: Mutex<HashSet<u64>>,
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

    /// How many files are in the window, or about to be.
    pub(crate) fn files(&self) -> usize {
        self.nodes.count()
    }

    /// A new front-end's window.
    pub(crate) fn open_window(&self) -> Arc<FsWindow> {
        let (engine, most_maps) = (self.engine.clone(), most_maps(self.bytes));
        let shared = (self.base.clone(), self.regions.clone());
        let window = Arc::new(FsWindow::new(engine, self.bytes, most_maps, shared));
        self.current.set(Some(window.clone()));
        window
    }

    /// Whether this front-end can show a window. May block.
    pub(crate) fn is_there(&self) -> bool {
        self.current.get().is_some_and(|window| window.is_there())
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
        let pays = self.policy.pays(attr.size) && !lock(&self.for_readers).contains(&attr.ino);
        if pays {
            attr.flags |= ATTR_DAX;
        }
        let mapped = lock(&self.mapped);
        pays || mapped.len() >= MOST_MAPPED || mapped.contains(&nodeid)
    }

    /// A file could not be mapped, since it can't be opened for writing: a guest that leaves the
    /// choice to us shall read it by requests.
    fn note_for_readers(&self, ino: u64) {
        let mut for_readers = lock(&self.for_readers);
        if for_readers.len() < MOST_MAPPED {
            for_readers.insert(ino);
        }
    }

    /// The driver has reset the device: the front-end has dropped all maps, and nothing is granted.
    pub(crate) fn forget(&self) {
        if let Some(window) = self.current.get() {
            window.reset();
        }
        self.take_away_all(|| self.engine.reset());
        self.clear_nodes();
    }

    /// The process is about to end: nothing waits for the front-end any more.
    pub(crate) fn close(&self) {
        if let Some(window) = self.current.get() {
            window.ended();
        }
    }

    /// The session is over.
    pub(crate) fn session_ended(&self) {
        self.forget();
        // Its back-end channel goes with it.
        self.current.set(None);
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

    /// Forgets which files have been mapped.
    pub(crate) fn clear_nodes(&self) {
        self.nodes.forget();
        lock(&self.mapped).clear();
        lock(&self.for_readers).clear();
    }

    /// The guest has forgotten a number.
    pub(crate) fn forget_number(&self, nodeid: u64) {
        self.nodes.forget_number(nodeid);
        lock(&self.mapped).remove(&nodeid);
    }
}

/// One for each slot: a Linux guest asks for whole slots, and the map of one covers it.
fn most_maps(bytes: WindowBytes) -> usize {
    usize::try_from(bytes.0 / PMD_BYTES).unwrap_or(usize::MAX)
}
