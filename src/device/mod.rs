// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: the seam between the rings and a device. Knows no vhost-user.

pub mod chain;
pub mod memory;
pub mod request;

use std::sync::Arc;

use vm_memory::GuestMemoryMmap;

use crate::device::request::Request;
use crate::window::{MapError, ShmemMapper, WindowBytes};

/// What is left to do about a request.
pub type InlineWork = Box<dyn FnOnce() + Send>;

/// Who drains a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Drained {
    /// A thread that may serve what it takes; `more` waits in the ring behind this request.
    ByServer {
        /// There is more.
        more: bool,
    },
    /// One that must go on draining: nothing may be left for it to do.
    ByWatchdog,
}

/// What becomes of open requests when the front-end stops a ring (GET_VRING_BASE).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InflightPolicy {
    /// The driver gets them back, and the next start takes them again: for requests that may be
    /// done twice, and that are completed in the order in which they came.
    Resubmit,
    /// They go on; who ends meanwhile is returned when the ring goes on where it was stopped, and
    /// never if it was reset. The stop waits for those that [pin](request::Request::pin) the
    /// guest's memory, and for no others.
    Retain,
}

/// From where a ring was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingStart {
    /// From where it was stopped: the driver is the same.
    Resumed,
    /// From where it was stopped, which is where a new ring starts, too: the driver may have reset
    /// the device.
    Unknown,
    /// From somewhere else: the driver has reset the device.
    Afresh,
}

/// What a virtio device offers to its session.
///
/// A device gets a request and answers it with a status; it never touches a ring.
pub trait Device: Send + Sync + 'static {
    /// Device-specific virtio feature bits (virtio 1.4 section 2.2: bits 0 to 23).
    fn features(&self) -> u64;

    /// How many rings it has.
    fn queues(&self) -> usize;

    /// What becomes of open requests when a ring is stopped.
    fn inflight_policy(&self) -> InflightPolicy;

    /// The device's config space.
    fn config(&self) -> &[u8];

    /// The length of shared memory region 0; none is offered if it is 0.
    fn window_bytes(&self) -> WindowBytes;

    /// Whether the front-end may send its memory table piece by piece (CONFIGURE_MEM_SLOTS).
    fn mem_slots(&self) -> bool;

    /// How to start a QEMU that can serve this device: for those who come with another one.
    fn use_instead(&self) -> &str;

    /// The window as a new front-end will show it.
    fn open_window(&self) -> Arc<dyn SessionWindow>;

    /// Takes one request. Called without a lock, in the order of the ring, and for one request of a
    /// ring at a time. Must not block: a stop of the ring waits until it returns. What it returns
    /// is done at once by the thread that drains the ring, and no stop waits for that.
    ///
    /// With [`InflightPolicy::Resubmit`] requests of one ring must be completed in the order in
    /// which they came.
    fn handle(&self, request: Request, drained: Drained) -> Option<InlineWork>;

    /// A driver has begun anew: what the last one left is void. Nothing of the new one is handed
    /// over before this returns, and two of these never run at once.
    fn restarted(&self) {}

    /// Called once when a session is over, to let go of all that was its own.
    fn session_ended(&self) {}

    /// Says in one line what a session that is over has done: once for each session, however often
    /// it is called.
    fn report(&self);

    /// The process is about to end: what runs may finish, and nobody is answered after that. No
    /// request waits for a stopped ring any more.
    fn shutdown(&self);

    /// Whether [`handle`](Self::handle) ever returns something: then a thread of its own watches
    /// over the rings.
    fn serves_at_once(&self) -> bool {
        false
    }
}

/// Shared memory region 0 as one front-end shows it.
pub trait SessionWindow: Send + Sync {
    /// The back-end channel has come: once in a session.
    fn set_channel(&self, channel: ShmemMapper);

    /// The front-end has asked for the region's length: it will show it (protocol feature SHMEM).
    fn region_asked(&self) {}

    /// A new memory table.
    fn table_came(&self, mem: &GuestMemoryMmap);

    /// A ring was started. True if all is well; false if [`bring_up`](Self::bring_up) must be
    /// called, from a thread that may block, before requests leave the ring.
    fn started(&self, start: RingStart) -> bool;

    /// Shows what must be shown from the start.
    ///
    /// # Errors
    /// The mapper's.
    fn bring_up(&self) -> Result<(), MapError>;

    /// A ring was stopped: nothing may be mapped until the next start.
    fn stopped(&self);

    /// The front-end has gone; it may still hold its end of the back-end channel.
    fn ended(&self);
}
