// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains one vring into requests and returns their chains. Knows no device.
//!
//! A ring is stopped, held (started, but its window is not up yet: the requests stay where
//! they are) or running. Every start and stop opens a new [`Epoch`]; what belongs to an older
//! one is void. That is how a flush that is still syncing when the front-end stops the ring
//! never touches a ring that is not ours any more.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use log::warn;
use vhost_user_backend::VringT;
use virtio_queue::{Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::Device;
use crate::ratelimit::RateLimit;
use crate::request::{ReplyArea, Request, parse};

/// The guest's memory, as the front-end last described it.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

pub use crate::kick::Vring;

/// One stretch between a start and a stop of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Epoch(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Stopped,
    Held,
    Running,
}

#[derive(Default)]
struct State {
    vring: Option<Vring>,
    phase: Phase,
    epoch: Epoch,
    /// Chains taken and not completed. The device completes in order, so these are the last
    /// that were taken, and moving the base back by this number hands exactly them back.
    open: u16,
    /// The guest has no window: whatever it stored is nowhere, so no flush may succeed.
    window_lost: bool,
    /// Chains were left in the ring because `open` had reached the queue's size.
    left_behind: bool,
}

/// One ring of a device.
pub struct Ring {
    device: Arc<dyn Device>,
    mem: GuestMemory,
    // Lock order: this, then the library's vring lock, then the device's queue.
    state: Mutex<State>,
    log_limit: RateLimit,
}

impl Ring {
    /// A ring that is stopped, in the guest memory `mem`.
    pub fn new(device: Arc<dyn Device>, mem: GuestMemory) -> Arc<Self> {
        Arc::new(Self { device, mem, state: Mutex::default(), log_limit: RateLimit::default() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Takes note that the library may have started `vring`. If it has, and the ring was stopped,
    /// the ring is now held, and the caller must bring up the window and then call
    /// [`release`](Ring::release) with the epoch that this returns.
    pub fn start(&self, vring: &Vring) -> Option<Epoch> {
        let mut state = self.lock();
        // Looked at under our lock: GET_VRING_BASE clears `ready` before it calls stop(), so
        // either we see that here, or stop() comes after us and undoes the start.
        let up = {
            let vring = vring.get_ref();
            vring.get_queue().ready() && vring.is_enabled()
        };
        if !up || state.phase != Phase::Stopped {
            return None;
        }
        let epoch = Epoch(state.epoch.0 + 1);
        *state =
            State { vring: Some(vring.clone()), phase: Phase::Held, epoch, ..State::default() };
        Some(epoch)
    }

    /// Whether the front-end has started the ring and not stopped it again.
    pub fn is_started(&self) -> bool {
        self.lock().phase != Phase::Stopped
    }

    /// The window of this epoch is up: requests may leave the ring.
    pub fn release(self: &Arc<Self>, epoch: Epoch) {
        self.run(epoch, false);
    }

    /// The window of this epoch can't be had: requests leave the ring, and none may succeed.
    pub fn release_without_window(self: &Arc<Self>, epoch: Epoch) {
        self.run(epoch, true);
    }

    fn run(self: &Arc<Self>, epoch: Epoch, window_lost: bool) {
        let mut state = self.lock();
        if state.phase == Phase::Held && state.epoch == epoch {
            state.phase = Phase::Running;
            state.window_lost = window_lost;
            self.drain_locked(&mut state);
        }
    }

    /// Stops the ring (GET_VRING_BASE). Requests that are open go back to the driver: the base
    /// that the front-end will read is moved before them, so that the next start takes them again.
    /// Never waits, whatever the disk is doing.
    pub fn stop(&self) {
        let mut state = self.lock();
        if let Some(vring) = state.vring.take() {
            let mut vring = vring.get_mut();
            let queue = vring.get_queue_mut();
            let base = queue.next_avail().wrapping_sub(state.open);
            queue.set_next_avail(base);
        }
        *state = State { epoch: Epoch(state.epoch.0 + 1), ..State::default() };
    }

    /// Hands all waiting chains to the device.
    pub fn drain(self: &Arc<Self>) {
        self.drain_locked(&mut self.lock());
    }

    fn drain_locked(self: &Arc<Self>, state: &mut State) {
        if state.phase != Phase::Running {
            return;
        }
        let Some(vring) = state.vring.clone() else { return };
        if let Err(e) = self.try_drain(&vring, state)
            && let Some(held_back) = self.log_limit.allow(Instant::now())
        {
            warn!("the ring can't be read: {e} ({held_back} more such lines held back)");
        }
    }

    fn try_drain(self: &Arc<Self>, vring: &Vring, state: &mut State) -> Result<(), QueueError> {
        let mut guard = vring.get_mut();
        if !guard.is_enabled() {
            return Ok(());
        }
        let mem = self.mem.memory();
        let queue = guard.get_queue_mut();
        let size = queue.size();
        loop {
            queue.disable_notification(&*mem)?;
            // An index that runs ahead of the ring is an error here, and ends the drain:
            // enable_notification() would call it new work for ever.
            while state.open < size {
                let Some(chain) = queue.iter(mem.clone())?.next() else { break };
                let head = chain.head_index();
                let parsed = parse(chain, size);
                state.open += 1;
                self.device.handle(Request {
                    ring: self.clone(),
                    epoch: state.epoch,
                    window_lost: state.window_lost,
                    head,
                    parsed,
                });
            }
            state.left_behind = state.open >= size;
            if state.left_behind || !queue.enable_notification(&*mem)? {
                return Ok(());
            }
        }
    }

    /// Writes `status`, puts `head` into the used ring (unless it has no place there), and
    /// tells the driver if it wants to be told.
    pub(crate) fn complete(
        self: &Arc<Self>,
        epoch: Epoch,
        head: Option<u16>,
        reply: Option<ReplyArea>,
        status: u32,
    ) {
        let mut state = self.lock();
        if state.phase != Phase::Running || state.epoch != epoch {
            return;
        }
        let Some(vring) = state.vring.clone() else { return };
        state.open -= 1;
        if let Some(head) = head
            && let Err(e) = return_chain(&self.mem.memory(), &vring, head, reply, status)
            && let Some(held_back) = self.log_limit.allow(Instant::now())
        {
            warn!("a chain can't be returned: {e} ({held_back} more such lines held back)");
        }
        if state.left_behind {
            self.drain_locked(&mut state);
        }
    }
}

fn return_chain(
    mem: &GuestMemoryMmap,
    vring: &Vring,
    head: u16,
    reply: Option<ReplyArea>,
    status: u32,
) -> Result<(), QueueError> {
    let mut guard = vring.get_mut();
    // The status before the used index: the driver reads it as soon as the index moves.
    let stored = reply.map_or(0, |reply| reply.store(mem, status));
    guard.add_used(head, stored)?;
    if guard.needs_notification()? {
        // A front-end that closed its end of the call is about to stop the ring: not our fault.
        let _ = guard.signal_used_queue();
    }
    Ok(())
}
