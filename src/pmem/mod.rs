// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: virtio-pmem (virtio 1.4 section 5.19). Knows no ring and no message.
//!
//! The window shows the whole file, so the guest's loads and stores never come by here.
//! What comes is the flush, and its answer is a promise.

mod file;

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use log::{info, warn};

use crate::config::PmemSize;
use crate::device::Device;
use crate::persist::{GroupSync, Persist, Waiter};
use crate::ratelimit::RateLimit;
use crate::request::Request;
use crate::window::WindowBytes;

pub use file::{PmemFile, PmemFileSpec};

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
struct Tally {
    flushes: AtomicU64,
    syncs: AtomicU64,
    failed: AtomicU64,
    malformed: AtomicU64,
}

fn bump(counter: &AtomicU64) {
    // Relaxed: the counters order nothing.
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A virtio-pmem device over one file. It outlives its sessions: a failed sync stays failed.
pub struct Pmem {
    file: Arc<File>,
    size: PmemSize,
    config: Vec<u8>,
    sync: GroupSync<Pending>,
    tally: Arc<Tally>,
    log_limit: RateLimit,
}

impl Pmem {
    /// A device that shows `file` and makes it durable with `persist`.
    ///
    /// # Errors
    /// When the file's length is no [`PmemSize`] or can't be read, or when no thread can be started.
    pub fn new(file: Arc<File>, persist: Box<dyn Persist>) -> io::Result<Arc<Self>> {
        let size = PmemSize::new(file.metadata()?.len())
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e.to_string()))?;
        let tally = Arc::new(Tally::default());
        let syncs = tally.clone();
        Ok(Arc::new(Self {
            file,
            size,
            config: config_space(size),
            sync: GroupSync::new(persist, move || bump(&syncs.syncs))?,
            tally,
            log_limit: RateLimit::default(),
        }))
    }

    /// The size of the region.
    pub fn size(&self) -> PmemSize {
        self.size
    }

    /// What the device has done so far.
    pub fn counters(&self) -> Counters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            flushes: read(&self.tally.flushes),
            syncs: read(&self.tally.syncs),
            failed: read(&self.tally.failed),
            malformed: read(&self.tally.malformed),
        }
    }

    /// Lets a running sync finish, answers those who waited for it, and answers nobody after.
    pub fn shutdown(&self) {
        self.sync.stop();
    }

    fn log_bad_request(&self, what: &str) {
        bump(&self.tally.malformed);
        if let Some(held_back) = self.log_limit.allow(Instant::now()) {
            warn!("the guest sent a bad request: {what} ({held_back} more such lines held back)");
        }
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

    fn window_file(&self) -> &Arc<File> {
        &self.file
    }

    fn handle(&self, request: Request) {
        let is_flush = match request.word() {
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
            bump(&self.tally.flushes);
        }
        // Bad requests queue up too: answers must keep the order of the ring.
        let needs_sync = is_flush && !request.window_lost();
        self.sync.submit(Pending { request, is_flush, needs_sync, tally: self.tally.clone() });
    }

    fn session_ended(&self) {
        let Counters { flushes, syncs, failed, malformed } = self.counters();
        info!(
            "session ended: flushes={flushes} syncs={syncs} failed={failed} malformed={malformed}"
        );
    }
}

/// A request that waits for its sync.
struct Pending {
    request: Request,
    is_flush: bool,
    needs_sync: bool,
    tally: Arc<Tally>,
}

impl Waiter for Pending {
    fn needs_sync(&self) -> bool {
        self.needs_sync
    }

    fn answer(self, durable: bool) {
        let kept = self.needs_sync && durable;
        if self.is_flush && !kept {
            bump(&self.tally.failed);
        }
        self.request.complete(if kept { STATUS_OK } else { STATUS_FAILED });
    }
}
