// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which inodes of the guest have an address space in the engine.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use log::warn;

use crate::dax::direct::DirectExtents;
use crate::dax::engine::{Engine, Space};
use crate::dax::extent::{ExtentSource, FileExtents};
use crate::lock::lock;
use crate::persist::{Backing, Direct, Durability, FilePersist, PersistMode};

use super::stretch::{Stretch, StretchedFile};
use super::times::Times;
use super::watch::{Watch, Watching};

/// Device and inode number: what a file is known by, whatever number the guest gave it. A bind mount
/// in the share shows the same file under two of those.
type FileId = (u64, u64);

/// A file that is or is about to be granted.
pub(super) struct Node {
    pub(super) space: Arc<Space>,
    /// Its memory, where cache lines count.
    pub(super) direct: Option<Arc<Direct>>,
    pub(super) times: Times,
    id: FileId,
    /// How many numbers of the guest's the table has for it.
    names: AtomicUsize,
    _stretched: StretchedFile,
    _watching: Option<Watching>,
}

#[derive(Default)]
struct Table {
    by_nodeid: HashMap<u64, Arc<Node>>,
    by_file: HashMap<FileId, Weak<Node>>,
}

/// The inodes of one device.
pub(super) struct Nodes {
    table: Mutex<Table>,
    engine: Arc<Engine>,
    stretch: Stretch,
    watch: Watch,
    persist: PersistMode,
}

impl Nodes {
    /// # Errors
    /// The system's.
    pub(super) fn new(
        engine: Arc<Engine>,
        stretch: Stretch,
        persist: PersistMode,
    ) -> io::Result<Self> {
        let watch = Watch::new(engine.clone())?;
        Ok(Self { table: Mutex::default(), engine, stretch, watch, persist })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// The node, if the inode has one.
    pub(super) fn get(&self, nodeid: u64) -> Option<Arc<Node>> {
        self.lock().by_nodeid.get(&nodeid).cloned()
    }

    /// The node; if the inode has none, one of the file that `open` gives (readable and writable).
    ///
    /// # Errors
    /// Those of `open`, and the system's.
    pub(super) fn get_or_make(
        &self,
        nodeid: u64,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<Node>> {
        if let Some(node) = self.get(nodeid) {
            return Ok(node);
        }
        // Not under the lock: an open may take as long as it likes.
        let file = open()?;
        let found = file.metadata()?;
        let id = (found.dev(), found.ino());
        let ours = match self.known(id) {
            Some(node) => node,
            None => self.make(file, id)?,
        };
        let mut table = self.lock();
        let other = table.by_file.get(&id).and_then(Weak::upgrade);
        let node = other.unwrap_or_else(|| ours.clone());
        table.by_file.insert(id, Arc::downgrade(&node));
        if table.by_nodeid.insert(nodeid, node.clone()).is_none() {
            node.names.fetch_add(1, Ordering::Relaxed);
        }
        drop(table);
        drop(ours); // If it is not the one that stays it closes a file: not under the lock.
        Ok(node)
    }

    fn known(&self, id: FileId) -> Option<Arc<Node>> {
        self.lock().by_file.get(&id).and_then(Weak::upgrade)
    }

    fn make(&self, file: File, id: FileId) -> io::Result<Arc<Node>> {
        let stretched = self.stretch.open(&file)?;
        let file = Arc::new(file);
        let durability = Durability::of_file(&file, self.persist);
        let FilePersist { persist, direct } = durability.persist(&file, file.metadata()?.len())?;
        let source = FileExtents::stretched(file.clone(), stretched.file().clone())
            .on_device(durability.backing == Backing::DaxFile);
        let source: Box<dyn ExtentSource> = match &direct {
            Some(direct) => Box::new(DirectExtents::new(source, direct.clone())),
            None => Box::new(source),
        };
        let space = self.engine.space(source, persist);
        let watching = self.watch.add(&file, &space).inspect_err(|e| {
            warn!(
                "a file can't be watched ({e}; fs.inotify.max_user_watches?): if it is made shorter \
                 on the host while the guest has it mapped, the VM may die"
            );
        });
        Ok(Arc::new(Node {
            space,
            direct,
            times: Times::new(file, durability.backing),
            id,
            names: AtomicUsize::new(0),
            _stretched: stretched,
            _watching: watching.ok(),
        }))
    }

    /// Lets go of the nodes of which nothing is granted and which nobody uses at the moment.
    pub(super) fn drop_idle(&self) {
        let mut idle = Vec::new();
        let mut table = self.lock();
        table.by_nodeid.retain(|_, node| {
            // No new user comes while the table is locked.
            let used = Arc::strong_count(node) > node.names.load(Ordering::Relaxed);
            let keep = used || !node.space.is_idle();
            if !keep {
                node.names.fetch_sub(1, Ordering::Relaxed);
                idle.push(node.clone());
            }
            keep
        });
        for node in &idle {
            table.by_file.remove(&node.id);
        }
        drop(table);
        drop(idle); // Closes files: not under the lock.
    }

    /// All nodes.
    pub(super) fn all(&self) -> Vec<Arc<Node>> {
        self.lock().by_nodeid.values().cloned().collect()
    }

    /// Forgets everything.
    pub(super) fn clear(&self) {
        let old = std::mem::take(&mut *self.lock());
        drop(old);
    }
}
