// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files that have an address space in the engine: one for each inode of the host, by whichever
//! path the guest has found it.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use log::warn;

use crate::dax::direct::DirectExtents;
use crate::dax::engine::{Engine, Space};
use crate::dax::extent::{ExtentSource, FileExtents};
use crate::persist::{Backing, Direct, Durability, FilePersist, PersistMode};
use crate::support::file_id::FileId;
use crate::support::lock::{Mutex, MutexGuard, Rank, lock};
use crate::support::log_limit::RateLimit;

use crate::fs::dax::times::Times;
use crate::fs::dax::watch::{Watch, Watching};
use crate::fs::host_file::Subject;
use crate::fs::sync_errors::Losses;
use crate::passthrough::{PassthroughFile, PassthroughMount};

/// Largest number of node ids that are remembered for one file. (A file has several through bind
/// mounts, and after a FORGET that comes during a SETUPMAPPING.)
const MOST_NUMBERS: usize = 8;

/// A file with a grant, or for which a SETUPMAPPING runs.
pub(crate) struct Node {
    pub(crate) id: FileId,
    pub(crate) space: Arc<Space>,
    /// The file's memory, if stores must be flushed from the processor's cache (DAX).
    pub(crate) direct: Option<Arc<Direct>>,
    pub(crate) times: Times,
    file: Arc<File>,
    _passthrough: PassthroughFile,
    /// Set by the first thread that uses the node, while other threads wait. Only nodes of the
    /// table are watched: the kernel has one watch for each file, and dropping a node outside of
    /// the table would remove it.
    watching: OnceLock<Option<Watching>>,
}

struct Entry {
    node: Arc<Node>,
    /// The guest's node ids of this file, oldest first.
    numbers: Vec<u64>,
}

#[derive(Default)]
struct Table {
    files: BTreeMap<FileId, Entry>,
    /// The file of each node id that was mapped. A cache: for other node ids the file is
    /// identified.
    numbers: HashMap<u64, FileId>,
    /// Number of nodes that were added so far.
    made: u64,
}

impl Table {
    fn by_number(&self, nodeid: u64) -> Option<&Arc<Node>> {
        let file = self.numbers.get(&nodeid)?;
        self.files.get(file).map(|entry| &entry.node)
    }

    fn knows(&self, ino: u64) -> bool {
        let next = self.files.range(FileId::first_of(ino)..).next();
        next.is_some_and(|(file, _)| file.ino == ino)
    }

    /// Adds `new` if the file has no node, and `nodeid` to the file's node ids. Returns the file's
    /// node.
    fn adopt(&mut self, nodeid: u64, file: FileId, new: &Arc<Node>) -> Arc<Node> {
        let made = &mut self.made;
        let entry = self.files.entry(file).or_insert_with(|| {
            *made += 1;
            Entry { node: new.clone(), numbers: Vec::new() }
        });
        if self.numbers.insert(nodeid, file) != Some(file) {
            if entry.numbers.len() == MOST_NUMBERS {
                self.numbers.remove(&entry.numbers.remove(0));
            }
            entry.numbers.push(nodeid);
        }
        entry.node.clone()
    }

    fn forget_number(&mut self, nodeid: u64) {
        let file = self.numbers.remove(&nodeid);
        if let Some(entry) = file.and_then(|file| self.files.get_mut(&file)) {
            entry.numbers.retain(|number| *number != nodeid);
        }
    }

    /// Removes the nodes that have no grant and that no request uses.
    fn take_idle(&mut self) -> Vec<Entry> {
        let mut idle = Vec::new();
        self.files.retain(|_, entry| {
            // The table is locked, so no request can start to use the node.
            let keep = Arc::strong_count(&entry.node) > 1 || !entry.node.space.is_idle();
            if !keep {
                let numbers = std::mem::take(&mut entry.numbers);
                idle.push(Entry { node: entry.node.clone(), numbers });
            }
            keep
        });
        for number in idle.iter().flat_map(|entry| &entry.numbers) {
            self.numbers.remove(number);
        }
        idle
    }
}

/// The result of looking for the node of a request's file.
pub(crate) struct Found<'a> {
    subject: Subject<'a>,
    pub(crate) node: Option<Arc<Node>>,
    made: u64,
}

/// The nodes of one device.
pub(crate) struct Nodes {
    table: Mutex<Table>,
    engine: Arc<Engine>,
    mount: PassthroughMount,
    watch: Watch,
    persist: PersistMode,
    losses: Losses,
    unwatched: RateLimit,
}

impl Nodes {
    /// Creates an empty table, and the watch thread.
    ///
    /// # Errors
    /// Those of inotify_init1(2), and of the thread's start.
    pub(crate) fn new(
        engine: Arc<Engine>,
        mount: PassthroughMount,
        persist: PersistMode,
        losses: Losses,
    ) -> io::Result<Self> {
        let watch = Watch::new(engine.clone())?;
        let table = Mutex::ranked(Rank::Nodes, Table::default());
        let unwatched = RateLimit::default();
        Ok(Self { table, engine, mount, watch, persist, losses, unwatched })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Finds the node of a request's file. Fast if the table is empty, if the guest has mapped the
    /// node id, or if the file is open.
    ///
    /// # Errors
    /// Those of finding out which file it is.
    pub(crate) fn find<'a>(&self, subject: Subject<'a>) -> io::Result<Found<'a>> {
        let made = {
            let table = self.lock();
            let node = table.by_number(subject.nodeid).cloned();
            if table.files.is_empty() || node.is_some() {
                return Ok(Found { subject, node, made: table.made });
            }
            table.made
        };
        // Not under the lock: this may make system calls.
        let file = subject.find(&|ino| self.lock().knows(ino))?;
        let table = self.lock();
        let entry = file.and_then(|file| table.files.get(&file));
        Ok(Found { subject, node: entry.map(|entry| entry.node.clone()), made })
    }

    /// Finds a node that was added after `before`, which found none.
    ///
    /// # Errors
    /// Those of [`find`](Self::find).
    pub(crate) fn find_again(&self, before: &Found<'_>) -> io::Result<Option<Arc<Node>>> {
        if self.lock().made == before.made {
            return Ok(None);
        }
        self.find(before.subject).map(|found| found.node)
    }

    /// Returns the node of `nodeid`. If the file has none, adds one for the file that `open`
    /// returns, which must be readable and writable.
    ///
    /// # Errors
    /// Those of `open`, and of the passthrough file's creation.
    pub(crate) fn get_or_make(
        &self,
        nodeid: u64,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<Node>> {
        let known = self.lock().by_number(nodeid).cloned();
        let node = match known {
            Some(node) => node,
            None => self.adopt(nodeid, open()?)?,
        };
        node.watching.get_or_init(|| self.watch(&node));
        Ok(node)
    }

    /// Makes no system call under the lock: an open may block without a limit.
    fn adopt(&self, nodeid: u64, opened: File) -> io::Result<Arc<Node>> {
        let file = FileId::of(&opened)?;
        let known = self.lock().files.get(&file).map(|entry| entry.node.clone());
        let ours = match known {
            Some(node) => node,
            None => Arc::new(self.make(opened)?),
        };
        // Another thread may have added a node meanwhile. Then this thread drops its own, after the
        // lock.
        let node = self.lock().adopt(nodeid, file, &ours);
        Ok(node)
    }

    fn make(&self, file: File) -> io::Result<Node> {
        let passthrough = self.mount.open(&file)?;
        let file = Arc::new(file);
        let durability = Durability::of_file(&file, self.persist);
        let FilePersist { persist, direct } = durability.persist(&file, file.metadata()?.len())?;
        let source = FileExtents::with_map_file(file.clone(), passthrough.file().clone())
            .on_device(durability.backing == Backing::DaxFile);
        let source: Box<dyn ExtentSource> = match &direct {
            Some(direct) => Box::new(DirectExtents::new(source, direct.clone())),
            None => Box::new(source),
        };
        let space = self.engine.space(source, persist);
        let watching = OnceLock::new();
        let (id, losses) = (FileId::of(&file)?, self.losses.clone());
        let times = Times::new(file.clone(), id, durability.backing, losses);
        Ok(Node { id, space, direct, times, file, _passthrough: passthrough, watching })
    }

    fn watch(&self, node: &Node) -> Option<Watching> {
        let watching = self.watch.add(&node.file, &node.space);
        if let Err(e) = &watching
            && let Some(held_back) = self.unwatched.admit(Instant::now())
        {
            warn!(
                "a file can't be watched ({e}): if it is made shorter on the host while the guest \
                 has it mapped, the VM may die; raise fs.inotify.max_user_watches{held_back}"
            );
        }
        watching.ok()
    }

    /// Removes the nodes that have no grant and that no request uses.
    pub(crate) fn drop_idle(&self) {
        let idle = self.lock().take_idle();
        self.close(idle);
    }

    /// Closes the files of removed nodes. Not under the lock, since a close may block.
    fn close(&self, idle: Vec<Entry>) {
        for Entry { node, .. } in idle {
            if node.space.has_failed() {
                // The node's own note of the loss is dropped with it.
                node.times.note_loss();
            }
        }
    }

    /// The guest has forgotten a node id. virtiofsd never uses a node id again.
    pub(crate) fn forget_number(&self, nodeid: u64) {
        self.lock().forget_number(nodeid);
    }

    /// Number of nodes.
    pub(crate) fn count(&self) -> usize {
        self.lock().files.len()
    }

    /// The node of `nodeid`; if there is none in the cache, all nodes with the inode number `ino`.
    pub(crate) fn of_inode(&self, nodeid: u64, ino: u64) -> Vec<Arc<Node>> {
        let table = self.lock();
        if let Some(node) = table.by_number(nodeid) {
            return vec![node.clone()];
        }
        let from = table.files.range(FileId::first_of(ino)..);
        let same = from.take_while(|(file, _)| file.ino == ino);
        same.map(|(_, entry)| entry.node.clone()).collect()
    }

    /// The nodes that have no grant and that no request uses.
    pub(crate) fn idle(&self) -> Vec<Arc<Node>> {
        let table = self.lock();
        let is_idle =
            |entry: &&Entry| Arc::strong_count(&entry.node) == 1 && entry.node.space.is_idle();
        let idle = table.files.values().filter(is_idle);
        idle.map(|entry| entry.node.clone()).collect()
    }

    /// All nodes.
    pub(crate) fn all(&self) -> Vec<Arc<Node>> {
        self.lock().files.values().map(|entry| entry.node.clone()).collect()
    }

    /// Forgets all node ids, and removes the nodes without a user, when no grant is left. A node
    /// that a running SETUPMAPPING uses stays, so that it is found if that request still makes a
    /// grant.
    pub(crate) fn forget(&self) {
        let idle = {
            let mut table = self.lock();
            table.numbers.clear();
            table.files.values_mut().for_each(|entry| entry.numbers.clear());
            table.take_idle()
        };
        self.close(idle);
    }
}
