// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: virtio-pmem (virtio 1.4 section 5.19). Knows no ring and no vhost-user message.
//!
//! The window shows the whole file, so the guest's loads and stores do not reach the daemon. The
//! only request is the flush: a successful answer promises that earlier stores are durable.

mod file;
mod size;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use log::{error, info, warn};
use vm_memory::GuestMemoryMmap;

use crate::dax::engine::{Engine, Space};
use crate::dax::extent::{Access, FileExtents};
use crate::device::request::Request;
use crate::device::{Device, Drained, InflightPolicy, InlineWork, RingStart, SessionWindow};
use crate::persist::{Backing, GroupSync, Persist, Waiter};
use crate::support::counter::Counter;
use crate::support::log_limit::RateLimit;
use crate::support::units::PageIndex;
use crate::window::{FileOffset, FrontEnd, MapError, ShmemMapper, WholeFile};
use crate::window::{WindowBytes, WindowOffset};

pub use file::{FoundFile, PmemFile, PmemFileError, PmemFileSpec, file_bytes};
pub use size::PmemSize;

/// Feature bit 0: the region is shared memory region 0, and the config space names no address.
pub const VIRTIO_PMEM_F_SHMEM_REGION: u64 = 1 << 0;

/// The only request type (virtio 1.4 section 5.19.6).
pub const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;

/// The status of a flush after which all earlier stores are durable.
const STATUS_OK: u32 = 0;
/// The status -1 of a failed flush. Linux turns it into EIO.
const STATUS_FAILED: u32 = u32::MAX;

/// Event counts of a device since its creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Number of flushes taken from the ring.
    pub flushes: u64,
    /// Number of syncs begun.
    pub syncs: u64,
    /// Number of flushes answered with an error.
    pub failed: u64,
    /// Number of requests that were not flushes: malformed chains, and requests of an unknown type.
    pub malformed: u64,
}

#[derive(Default)]
struct Metrics {
    flushes: Counter,
    failed: Counter,
    malformed: Counter,
}

/// A virtio-pmem device over one file. It holds one write grant of the whole file as long as it
/// exists. It outlives its sessions: after a failed sync every flush fails, in later sessions, too.
pub struct Pmem {
    file: Arc<File>,
    size: PmemSize,
    mem_slots: bool,
    config: Vec<u8>,
    engine: Arc<Engine>,
    front_end: Arc<FrontEnd>,
    sync: GroupSync<Pending>,
    metrics: Arc<Metrics>,
    log_limit: RateLimit,
    /// A session was opened whose counters have not been logged yet.
    in_session: AtomicBool,
}

impl Pmem {
    /// A device over `file`. `persist` makes the file durable.
    ///
    /// # Errors
    /// `InvalidInput` if the file's length is no [`PmemSize`]. The errno of fstat(2) or clone(2) if
    /// the length can't be read or the thread `sync` can't be started.
    pub fn new(file: Arc<File>, persist: Persist) -> io::Result<Arc<Self>> {
        Self::with_mem_slots(file, persist, false)
    }

    /// Like [`new`](Self::new); `mem_slots`: offers CONFIGURE_MEM_SLOTS.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn with_mem_slots(
        file: Arc<File>,
        persist: Persist,
        mem_slots: bool,
    ) -> io::Result<Arc<Self>> {
        let size = PmemSize::new(file_bytes(&file)?)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
        let on_dax = Backing::of(&file) == Backing::DaxFile;
        let front_end = Arc::new(FrontEnd::default());
        let window = WindowBytes(size.bytes());
        let engine = Arc::new(Engine::new(window, front_end.clone(), 1));
        let space = engine.space(
            Box::new(FileExtents::preallocated(file.clone(), size.bytes()).on_device(on_dax)),
            persist,
        );
        engine
            .span(WindowOffset(0), window)
            .and_then(|whole| engine.grant(&space, FileOffset(0), whole, Access::Write, || true))
            .map_err(io::Error::other)?;
        Ok(Arc::new(Self {
            file,
            size,
            mem_slots,
            config: config_space(size),
            sync: GroupSync::new(writeback(engine.clone(), space))?,
            engine,
            front_end,
            metrics: Arc::default(),
            log_limit: RateLimit::default(),
            in_session: AtomicBool::new(false),
        }))
    }

    /// The size of the region.
    pub fn size(&self) -> PmemSize {
        self.size
    }

    /// A snapshot of the event counts.
    pub fn counters(&self) -> Counters {
        Counters {
            flushes: self.metrics.flushes.get(),
            syncs: self.engine.counters().snapshot().syncs,
            failed: self.metrics.failed.get(),
            malformed: self.metrics.malformed.get(),
        }
    }

    fn log_bad_request(&self, what: &str) {
        self.metrics.malformed.add(1);
        if let Some(held_back) = self.log_limit.admit(Instant::now()) {
            warn!("the guest sent a bad request: {what}{held_back}");
        }
    }
}

/// The function that makes the whole file durable. Logs the first failure.
fn writeback(engine: Arc<Engine>, space: Arc<Space>) -> impl FnMut() -> bool {
    let mut logged = false;
    move || {
        let done = engine.writeback(&space, PageIndex(0), PageIndex::LAST);
        if let Err(e) = &done
            && !logged
        {
            logged = true;
            error!(
                "a sync failed: {e}; data may be lost. Every flush from now on fails. \
                 Check the disk and the file, then start the daemon again"
            );
        }
        done.is_ok()
    }
}

/// The config space: le64 start, le64 size. A driver that has negotiated SHMEM_REGION reads
/// neither; `start` is 0 then (virtio 1.4 section 5.19.4).
fn config_space(size: PmemSize) -> Vec<u8> {
    [0, size.bytes()].iter().flat_map(|field: &u64| field.to_le_bytes()).collect()
}

impl Device for Pmem {
    fn features(&self) -> u64 {
        VIRTIO_PMEM_F_SHMEM_REGION
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn window_bytes(&self) -> WindowBytes {
        WindowBytes(self.size.bytes())
    }

    fn mem_slots(&self) -> bool {
        self.mem_slots
    }

    fn queues(&self) -> usize {
        1
    }

    /// A flush may be served twice, so a stop need not wait for a sync.
    fn inflight_policy(&self) -> InflightPolicy {
        InflightPolicy::Resubmit
    }

    fn use_instead(&self) -> &str {
        "use QEMU 11.1 or newer with -device \
         vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16"
    }

    fn open_window(&self) -> Arc<dyn SessionWindow> {
        self.in_session.store(true, Ordering::Relaxed);
        Arc::new(Shown {
            engine: self.engine.clone(),
            front_end: self.front_end.clone(),
            window: Arc::new(WholeFile::new(&self.file, self.window_bytes())),
        })
    }

    fn handle(&self, request: Request, _: Drained) -> Option<InlineWork> {
        let is_flush = match request.read_le32() {
            Ok(VIRTIO_PMEM_REQ_TYPE_FLUSH) => true,
            Ok(unknown) => {
                self.log_bad_request(&format!("unknown type {unknown:#x}"));
                false
            }
            Err(malformed) => {
                self.log_bad_request(&malformed.to_string());
                false
            }
        };
        if is_flush {
            self.metrics.flushes.add(1);
        }
        // Bad requests are queued, too: requests are completed in the order of the ring.
        let needs_sync = is_flush && !request.window_lost();
        self.sync.submit(Pending { request, is_flush, needs_sync, metrics: self.metrics.clone() });
        None
    }

    /// Drops the engine's reference to the front-end, which closes the back-end channel.
    fn session_ended(&self) {
        self.front_end.set(None);
    }

    fn report(&self) {
        if !self.in_session.swap(false, Ordering::Relaxed) {
            return;
        }
        let Counters { flushes, syncs, failed, malformed } = self.counters();
        info!(
            "session ended: flushes={flushes} syncs={syncs} failed={failed} malformed={malformed}"
        );
    }

    /// Waits for the running sync, completes its flushes, and completes no request afterwards.
    fn shutdown(&self) {
        self.sync.stop();
    }
}

/// The window of one session: the whole file is mapped from the start of the device.
struct Shown {
    engine: Arc<Engine>,
    front_end: Arc<FrontEnd>,
    window: Arc<WholeFile>,
}

impl SessionWindow for Shown {
    fn set_channel(&self, channel: ShmemMapper) {
        self.window.set_channel(channel);
    }

    fn table_came(&self, mem: &GuestMemoryMmap) {
        self.window.table_came(mem);
    }

    /// Q10: a map that has outlived a stop is not sent again. QEMU would refuse it, and a second
    /// stop while that message is under way would crash QEMU (Q1).
    fn started(&self, start: RingStart) -> bool {
        match start {
            RingStart::Resumed => self.window.outlives_stop(),
            RingStart::Unknown => self.window.is_proved(),
            RingStart::Afresh => {
                self.window.reset();
                false
            }
        }
    }

    fn bring_up(&self) -> Result<(), MapError> {
        self.front_end.set(Some(self.window.clone()));
        self.engine.map_again()
    }

    fn stopped(&self) {
        self.window.stopped();
    }

    fn ended(&self) {
        self.window.close();
    }
}

/// A request in the queue of the thread `sync`.
struct Pending {
    request: Request,
    is_flush: bool,
    needs_sync: bool,
    metrics: Arc<Metrics>,
}

impl Waiter for Pending {
    fn needs_sync(&self) -> bool {
        self.needs_sync
    }

    fn answer(self, durable: bool) {
        let kept = self.needs_sync && durable;
        if self.is_flush && !kept {
            self.metrics.failed.add(1);
        }
        self.request.complete(if kept { STATUS_OK } else { STATUS_FAILED });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::Fdatasync;

    /// Shows: the window of a session, and so the descriptor of its channel, is dropped after
    /// `session_ended`.
    #[test]
    fn the_window_is_dropped_after_the_session() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(2 << 20).unwrap();
        let device = Pmem::new(file.clone(), Persist::kernel(Fdatasync(file.clone()))).unwrap();
        let window = Arc::new(WholeFile::new(&file, device.window_bytes()));
        let (engine, front_end) = (device.engine.clone(), device.front_end.clone());
        let left = Arc::downgrade(&window);
        let session = Shown { engine, front_end, window };
        session.bring_up().unwrap_err(); // Fails: the window has no channel.
        session.ended();
        drop(session);
        assert!(left.upgrade().is_some(), "dropped while requests may still map");
        device.session_ended();
        assert!(left.upgrade().is_none());
    }
}
