// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Test doubles of the engine's seams, at least as strict as the real implementations.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use nix::errno::Errno;
use vhost_user_dax::dax::entry::{Block, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, Backed, Extent, ExtentSource};
use vhost_user_dax::persist::{KernelSync, LineFlush, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset};

/// QEMU's limit on the number of a VM's regions: above it QEMU aborts (Q2 of docs/front-ends.md).
const QEMU_MOST_REGIONS: usize = 512;

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// A call of a double.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Map { at: u64, from: u64, bytes: u64 },
    Unmap { at: u64, bytes: u64 },
    UnmapHole { from: u64, bytes: u64 },
    Allocate { first: u64, last: u64 },
    SetBytes(u64),
    Zero { from: u64, bytes: u64, keep: bool },
    Flush { from: u64, bytes: u64 },
    Fence,
    Sync,
}

#[derive(Default, Clone)]
pub struct Log(Arc<Mutex<Vec<Event>>>);

impl Log {
    pub fn push(&self, event: Event) {
        lock(&self.0).push(event);
    }

    /// The events since the last call.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *lock(&self.0))
    }
}

/// A front-end with QEMU's rules Q2 (by a panic), Q4, Q5 and Q6 of docs/front-ends.md.
pub struct StrictMapper {
    pub log: Log,
    pub window_bytes: u64,
    maps: Mutex<BTreeMap<u64, (u64, u64, u64)>>,
    /// Refuses the message with this number, counted from 0.
    pub refuse_in: Mutex<Option<u64>>,
    /// With `refuse_in`: refuses all later messages, too, including those of the rollback.
    pub refuse_for_ever: AtomicBool,
}

impl StrictMapper {
    pub fn new(window_bytes: u64, log: Log) -> Arc<Self> {
        Arc::new(Self {
            log,
            window_bytes,
            maps: Mutex::default(),
            refuse_in: Mutex::default(),
            refuse_for_ever: AtomicBool::new(false),
        })
    }

    /// Live maps: window offset -> (bytes, inode, file offset).
    pub fn maps(&self) -> BTreeMap<u64, (u64, u64, u64)> {
        lock(&self.maps).clone()
    }

    /// A virtio reset: QEMU drops all maps without a message (Q10 of docs/front-ends.md).
    pub fn drop_all(&self) {
        lock(&self.maps).clear();
    }

    fn scripted(&self) -> Result<(), MapError> {
        let mut refuse_in = lock(&self.refuse_in);
        match *refuse_in {
            Some(0) => {
                if !self.refuse_for_ever.load(Ordering::Relaxed) {
                    *refuse_in = None;
                }
                Err(MapError::Refused)
            }
            Some(n) => {
                *refuse_in = Some(n - 1);
                Ok(())
            }
            None => Ok(()),
        }
    }
}

fn inode(file: &File) -> u64 {
    use std::os::unix::fs::MetadataExt;
    file.metadata().unwrap().ino()
}

impl Mapper for StrictMapper {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        assert!(file.as_raw_fd() >= 0);
        self.scripted()?;
        let mut maps = lock(&self.maps);
        let end = at.0.checked_add(bytes.0).expect("the end of the map overflows");
        let overlaps =
            maps.range(..end).next_back().is_some_and(|(start, (len, ..))| start + len > at.0);
        let past_file =
            from.0.checked_add(bytes.0).is_none_or(|end| end > file.metadata().unwrap().len());
        if bytes.0 == 0 || end > self.window_bytes || overlaps || past_file {
            panic!(
                "QEMU refuses map {at:?} {from:?} {bytes:?}: overlap {overlaps}, \
                 past file {past_file}"
            );
        }
        maps.insert(at.0, (bytes.0, inode(file), from.0));
        assert!(maps.len() < QEMU_MOST_REGIONS, "QEMU aborts");
        self.log.push(Event::Map { at: at.0, from: from.0, bytes: bytes.0 });
        Ok(())
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.scripted()?;
        let mut maps = lock(&self.maps);
        match maps.get(&at.0) {
            Some((len, ..)) if *len == bytes.0 => {
                maps.remove(&at.0);
                self.log.push(Event::Unmap { at: at.0, bytes: bytes.0 });
                Ok(())
            }
            other => panic!("QEMU refuses unmap {at:?} {bytes:?}: the map there is {other:?}"),
        }
    }

    fn unmap_hole(&self, _file: &File, from: FileOffset, bytes: WindowBytes) {
        self.log.push(Event::UnmapHole { from: from.0, bytes: bytes.0 });
    }
}

/// A file system in memory, with one file. `file` is a real sparse file of the same length, so that
/// the mapper can examine it.
#[derive(Clone)]
pub struct FakeSource(Arc<SourceState>);

pub struct SourceState {
    log: Log,
    file: Arc<File>,
    /// Page -> block. A page without an element is a hole.
    blocks: Mutex<BTreeMap<u64, u64>>,
    unwritten: Mutex<BTreeSet<u64>>,
    next_block: AtomicU64,
    /// Number of free blocks.
    pub free: AtomicU64,
    pub maps_pmd: AtomicBool,
    /// Whether new blocks are consecutive and aligned to chunks; otherwise no two pages have
    /// consecutive blocks.
    pub contiguous: AtomicBool,
    /// Whether an incomplete last page can be mapped.
    pub maps_tail: AtomicBool,
    /// Whether changes of the length fail.
    pub refuses_bytes: AtomicBool,
    /// The page whose lookup fails.
    pub bad_page: Mutex<Option<u64>>,
}

impl FakeSource {
    pub fn new(bytes: u64, log: Log) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        Self(Arc::new(SourceState {
            log,
            file: Arc::new(file),
            blocks: Mutex::default(),
            unwritten: Mutex::default(),
            next_block: AtomicU64::new(1 << 20),
            free: AtomicU64::new(u64::MAX),
            maps_pmd: AtomicBool::new(true),
            contiguous: AtomicBool::new(true),
            maps_tail: AtomicBool::new(false),
            refuses_bytes: AtomicBool::new(false),
            bad_page: Mutex::default(),
        }))
    }

    pub fn state(&self) -> &SourceState {
        &self.0
    }

    /// The pages that have blocks.
    pub fn allocated(&self) -> BTreeSet<u64> {
        lock(&self.0.blocks).keys().copied().collect()
    }

    /// Sets the block of a page, or makes the page a hole.
    pub fn set_block(&self, page: u64, block: Option<u64>) {
        match block {
            Some(block) => lock(&self.0.blocks).insert(page, block),
            None => lock(&self.0.blocks).remove(&page),
        };
    }

    /// Makes the page's block an unwritten one.
    pub fn set_unwritten(&self, page: u64) {
        lock(&self.0.unwritten).insert(page);
    }

    fn new_block(&self, page: u64) -> u64 {
        if self.0.contiguous.load(Ordering::Relaxed) {
            return (1 << 30) + page;
        }
        // Every other block: no two consecutive, none aligned.
        (self.0.next_block.fetch_add(2, Ordering::Relaxed) | 1) + PMD_PAGES
    }

    fn kind(&self, page: u64) -> Backed {
        match lock(&self.0.blocks).get(&page) {
            Some(_) if lock(&self.0.unwritten).contains(&page) => Backed::Unwritten,
            Some(block) => Backed::Mapped(Block::new(*block).unwrap()),
            None => Backed::Hole,
        }
    }
}

impl ExtentSource for FakeSource {
    fn file(&self) -> &Arc<File> {
        &self.0.file
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(self.0.file.metadata()?.len())
    }

    fn mappable_bytes(&self, file_bytes: u64) -> u64 {
        if self.0.maps_tail.load(Ordering::Relaxed) {
            file_bytes.next_multiple_of(PAGE_BYTES)
        } else {
            file_bytes / PAGE_BYTES * PAGE_BYTES
        }
    }

    fn maps_pmd(&self) -> bool {
        self.0.maps_pmd.load(Ordering::Relaxed)
    }

    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()> {
        self.0.log.push(Event::Allocate { first: first.0, last: last.0 });
        for page in first.0..=last.0 {
            lock(&self.0.unwritten).remove(&page);
            if lock(&self.0.blocks).contains_key(&page) {
                continue;
            }
            if self.0.free.load(Ordering::Relaxed) == 0 {
                return Err(io::Error::from_raw_os_error(Errno::ENOSPC as i32));
            }
            self.0.free.fetch_sub(1, Ordering::Relaxed);
            let block = self.new_block(page);
            lock(&self.0.blocks).insert(page, block);
        }
        Ok(())
    }

    fn extent(&self, page: PageIndex, pages: u64, _access: Access) -> io::Result<Extent> {
        if *lock(&self.0.bad_page) == Some(page.0) {
            return Err(io::Error::from_raw_os_error(Errno::EIO as i32));
        }
        let backed = self.kind(page.0);
        let alike = |n: u64| match (backed, self.kind(page.0 + n)) {
            (Backed::Mapped(first), Backed::Mapped(block)) => block.number() == first.number() + n,
            (a, b) => a == b,
        };
        let run = (1..pages).take_while(|n| alike(*n)).count() as u64 + 1;
        Ok(Extent { start: page, pages: run, backed })
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.0.log.push(Event::SetBytes(bytes));
        if self.0.refuses_bytes.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(Errno::EFBIG as i32));
        }
        let gone = lock(&self.0.blocks).split_off(&bytes.div_ceil(PAGE_BYTES));
        self.0.free.fetch_add(gone.len() as u64, Ordering::Relaxed);
        lock(&self.0.unwritten).split_off(&bytes.div_ceil(PAGE_BYTES));
        self.0.file.set_len(bytes)
    }

    fn write_at(&self, from: FileOffset, bytes: &[u8]) -> io::Result<usize> {
        let (first, last) = FileRange::new(from, bytes.len() as u64).pages();
        self.allocate(first, last)?;
        self.0.file.write_at(bytes, from.0)
    }

    fn zero(&self, range: FileRange, keep: bool) -> io::Result<()> {
        let (from, bytes) = (range.from.0, range.bytes);
        if range.is_empty() {
            return Ok(());
        }
        self.0.log.push(Event::Zero { from, bytes, keep });
        if !keep {
            let whole = from.div_ceil(PAGE_BYTES)..(from + bytes) / PAGE_BYTES;
            lock(&self.0.blocks).retain(|page, _| !whole.contains(page));
        }
        Ok(())
    }
}

/// Durability for a file whose dirty pages are tracked by entries only, or by the kernel.
#[derive(Clone)]
pub struct FakePersist(Arc<PersistState>);

pub type During = Arc<dyn Fn(u64) + Send + Sync>;

pub struct PersistState {
    log: Log,
    kernel_tracks: bool,
    /// Whether calls fail from now on.
    pub fails: AtomicBool,
    /// Called in the middle of each flush, with the flush's first byte.
    pub during: Mutex<Option<During>>,
}

impl FakePersist {
    pub fn new(kernel_tracks: bool, log: Log) -> Self {
        Self(Arc::new(PersistState {
            log,
            kernel_tracks,
            fails: AtomicBool::new(false),
            during: Mutex::default(),
        }))
    }

    pub fn state(&self) -> &PersistState {
        &self.0
    }

    /// The `Persist` to pass to the engine.
    pub fn persist(&self) -> Persist {
        match self.0.kernel_tracks {
            true => Persist::kernel(self.clone()),
            false => Persist::lines(self.clone()),
        }
    }

    fn outcome(&self) -> io::Result<()> {
        if self.0.fails.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(Errno::EIO as i32));
        }
        Ok(())
    }
}

impl KernelSync for FakePersist {
    fn sync(&self) -> io::Result<()> {
        self.0.log.push(Event::Sync);
        self.outcome()
    }
}

impl LineFlush for FakePersist {
    fn flush(&self, range: FileRange) -> io::Result<()> {
        let (from, bytes) = (range.from.0, range.bytes);
        self.0.log.push(Event::Flush { from, bytes });
        let during = lock(&self.0.during).clone();
        if let Some(during) = during {
            during(from);
        }
        self.outcome()
    }

    fn fence(&self) {
        self.0.log.push(Event::Fence);
    }
}

impl FakeSource {
    /// Gives the pages `from..to` the blocks that an allocation would give them.
    pub fn fill(&self, from: u64, to: u64) {
        (from..to).for_each(|page| self.set_block(page, Some((1 << 30) + page)));
    }
}

/// Blocks the flushes of a double until it is opened.
#[derive(Clone, Default)]
pub struct FlushStop(Arc<(Mutex<StopState>, Condvar)>);

#[derive(Default)]
struct StopState {
    stopped: bool,
    open: bool,
}

impl FlushStop {
    pub fn stop(&self) {
        let mut state = lock(&self.0.0);
        state.stopped = true;
        self.0.1.notify_all();
        while !state.open {
            state = self.0.1.wait(state).unwrap();
        }
    }

    /// Waits until a flush is in progress.
    pub fn wait_stopped(&self) {
        let mut state = lock(&self.0.0);
        while !state.stopped {
            state = self.0.1.wait(state).unwrap();
        }
    }

    /// Lets the stopped flush and all later ones continue.
    pub fn open(&self) {
        lock(&self.0.0).open = true;
        self.0.1.notify_all();
    }
}

impl FakePersist {
    /// Stops each flush in its middle.
    pub fn stop_in_flush(&self) -> FlushStop {
        let stop = FlushStop::default();
        let in_flush = stop.clone();
        *lock(&self.state().during) = Some(Arc::new(move |_| in_flush.stop()));
        stop
    }
}
