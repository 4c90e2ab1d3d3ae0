// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: the trait between the rings and a device. Knows no vhost-user.

pub mod chain;
pub mod memory;
pub mod request;

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::device::request::Request;
use crate::window::{MapError, ShmemMapper, WindowBytes};

/// Work that a device leaves to the thread that drains the ring.
pub type InlineWork = Box<dyn FnOnce() + Send>;

/// Which kind of thread drains a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// A thread that may do the work that the device leaves to it.
    ByServer {
        /// Further chains are available in the ring.
        more: bool,
    },
    /// A thread that must go on draining: the device must leave no work to it.
    ByWatchdog,
}

/// What becomes of open requests when the front-end stops a ring (GET_VRING_BASE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InflightPolicy {
    /// They are handed back to the driver, and the next start takes them again. For requests that
    /// may be served twice, and that the device completes in the order in which it gets them.
    Resubmit,
    /// The device goes on serving them. A request that ends while the ring is stopped is returned
    /// when the ring resumes, and never if the ring was reset. The stop waits only for requests
    /// that [pin](request::Request::pin) guest memory.
    Retain,
}

/// The place from which a ring was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingStart {
    /// Where the ring was stopped: the driver is the same.
    Resumed,
    /// Where the ring was stopped, and that is index 0, where a new ring starts, too: the driver
    /// may have reset the device.
    Unknown,
    /// Another place than where the ring was stopped: the driver has reset the device.
    Afresh,
}

/// A virtio device. It gets requests and completes each with an answer; it never accesses a ring.
pub trait Device: Send + Sync + 'static {
    /// Device-specific virtio feature bits (virtio 1.4 section 2.2: bits 0 to 23).
    fn features(&self) -> u64;

    /// The number of rings.
    fn queues(&self) -> usize;

    /// What becomes of open requests when a ring is stopped.
    fn inflight_policy(&self) -> InflightPolicy;

    /// The device's config space.
    fn config(&self) -> &[u8];

    /// The length of shared memory region 0; 0: the device offers no region.
    fn window_bytes(&self) -> WindowBytes;

    /// Whether to offer CONFIGURE_MEM_SLOTS: the front-end then sends its memory table region by
    /// region.
    fn mem_slots(&self) -> bool;

    /// The end of the error text for a front-end that lacks a feature: which QEMU can use this
    /// device, with which options.
    fn use_instead(&self) -> &str;

    /// The window of a new session.
    fn open_window(&self) -> Arc<dyn SessionWindow>;

    /// Takes one request. Called without a lock, in the order of the ring, and for one request of a
    /// ring at a time. Must not block: a stop of the ring waits until it returns. The thread that
    /// drains the ring then does the returned work; a stop does not wait for that.
    ///
    /// With [`InflightPolicy::Resubmit`] the requests of one ring must be completed in the order of
    /// these calls.
    fn handle(&self, request: Request, drained: Drained) -> Option<InlineWork>;

    /// A new driver has reset the device: drops the last driver's state. No request of the new
    /// driver is handed over before this returns. At most one thread is in this call.
    fn restarted(&self) {}

    /// A session has ended: releases its resources. Called once for each session.
    fn session_ended(&self) {}

    /// Logs the counters of an ended session in one line. Only the first call after a session logs.
    fn report(&self);

    /// The process is about to end: waits for running work, and completes no request afterwards. No
    /// request waits for a stopped ring any more.
    fn shutdown(&self);

    /// Whether [`handle`](Self::handle) ever returns work. If so, a watchdog thread watches the
    /// rings.
    fn serves_at_once(&self) -> bool {
        false
    }
}

/// Shared memory region 0 of one session.
pub trait SessionWindow: Send + Sync {
    /// The front-end has sent its back-end channel. Called once in a session.
    fn set_channel(&self, channel: ShmemMapper);

    /// The front-end has queried the region's length, so it has a region (protocol feature SHMEM).
    fn region_asked(&self) {}

    /// The front-end has sent a new memory table.
    fn table_came(&self, mem: &GuestMemoryMmap);

    /// A ring was started. True if requests may leave it. False if [`bring_up`](Self::bring_up)
    /// must be called before, on a thread that may block.
    fn started(&self, start: RingStart) -> bool;

    /// Maps the window.
    ///
    /// # Errors
    /// [`MapError`]: the front-end has refused the map or is too old, or the device was stopped.
    fn bring_up(&self) -> Result<(), MapError>;

    /// A ring was stopped: no map may be sent until the next start.
    fn stopped(&self);

    /// The front-end has disconnected. Its end of the back-end channel may still be open.
    fn ended(&self);
}
