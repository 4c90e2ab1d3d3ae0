// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: virtio-pmem (virtio 1.4 section 5.19). Knows no ring and no message.
//!
//! The window shows the whole file, so the guest's loads and stores never come by here.
//! What comes is the flush, and its answer is a promise.

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

/// Feature bit 0: the region is shared memory region 0, not an address in the config space.
pub const VIRTIO_PMEM_F_SHMEM_REGION: u64 = 1 << 0;

/// The only request type (virtio 1.4 section 5.19.6).
pub const VIRTIO_PMEM_REQ_TYPE_FLUSH: u32 = 0;

/// The status of a flush that made everything durable.
const STATUS_OK: u32 = 0;
/// The status -1. Linux turns it into EIO.
const STATUS_FAILED: u32 = u32::MAX;

/// What a device has done since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Flushes taken from the ring.
    pub flushes: u64,
    /// Syncs begun.
    pub syncs: u64,
    /// Flushes answered with an error.
    pub failed: u64,
    /// Chains that were no flush: malformed, or of an unknown type.
    pub malformed: u64,
}

#[derive(Default)]
struct Metrics {
    flushes: Counter,
    failed: Counter,
    malformed: Counter,
}

/// A virtio-pmem device over one file: one write grant of the whole file, for the device's life. It
/// outlives its sessions: a failed sync stays failed.
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
    /// There is a session of which nothing was reported yet.
    in_session: AtomicBool,
}

impl Pmem {
    /// A device that shows `file` and makes it durable with `persist`.
    ///
    /// # Errors
    /// When the file's length is no [`PmemSize`] or can't be read, or when no thread can be
    /// started.
    pub fn new(file: Arc<File>, persist: Persist) -> io::Result<Arc<Self>> {
        Self::with_mem_slots(file, persist, false)
    }

    /// The same, with or without the offer of CONFIGURE_MEM_SLOTS.
    ///
    /// # Errors
    /// See [`new`](Self::new).
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

    /// What the device has done so far.
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

/// Makes the whole file durable; says so once if it can't.
fn writeback(engine: Arc<Engine>, space: Arc<Space>) -> impl FnMut() -> bool {
    let mut said = false;
    move || {
        let done = engine.writeback(&space, PageIndex(0), PageIndex::LAST);
        if let Err(e) = &done
            && !said
        {
            said = true;
            error!(
                "a sync failed: {e}; data may be lost. Every flush from now on fails. \
                 Check the disk and the file, then start the daemon again"
            );
        }
        done.is_ok()
    }
}

/// le64 start, le64 size. The driver that took SHMEM_REGION reads neither; `start` is 0 for it
/// (virtio 1.4 section 5.19.4).
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

    /// A flush that is done twice is harmless, and so a pause need not wait for the disk.
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
        // Bad requests queue up too: answers must keep the order of the ring.
        let needs_sync = is_flush && !request.window_lost();
        self.sync.submit(Pending { request, is_flush, needs_sync, metrics: self.metrics.clone() });
        None
    }

    /// The channel to a front-end that has gone is closed.
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

    /// Lets a running sync finish, answers those who waited for it, and answers nobody after.
    fn shutdown(&self) {
        self.sync.stop();
    }
}

/// The window of one session: the whole file, from the start on.
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

    /// Q10: a map that outlives a pause is not sent again. It would be refused, and would be a
    /// message under way that a quick second pause turns into a crash of QEMU (Q1).
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

/// A request that waits for its sync.
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

    /// Shows: a session's window, and with it the descriptor of its channel, is gone when the
    /// session is.
    #[test]
    fn a_front_end_that_has_gone_is_let_go() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(2 << 20).unwrap();
        let device = Pmem::new(file.clone(), Persist::kernel(Fdatasync(file.clone()))).unwrap();
        let window = Arc::new(WholeFile::new(&file, device.window_bytes()));
        let (engine, front_end) = (device.engine.clone(), device.front_end.clone());
        let left = Arc::downgrade(&window);
        let session = Shown { engine, front_end, window };
        session.bring_up().unwrap_err(); // It has no channel.
        session.ended();
        drop(session);
        assert!(left.upgrade().is_some(), "held for as long as requests may map");
        device.session_ended();
        assert!(left.upgrade().is_none());
    }
}
