// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How requests leave a ring: one after another, each served by the thread that took it or by
//! others. Knows no device.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use vhost_user_backend::VringT;
use virtio_queue::{Error as QueueError, QueueOwnedT, QueueT};

use super::{Phase, Ring, State, Vring};
use crate::device::chain::parse;
use crate::device::request::Request;
use crate::device::{Drained, InlineWork};
use crate::ring::poll::TURNS;

/// What became of requests that are served by the thread that took them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// There was none, nor is.
    Idle,
    /// Some have ended.
    Made,
    /// One lasts.
    HeldUp,
}

/// What became of the chains that were waiting.
enum Taken {
    /// All were handed to the device.
    All,
    /// No more can be: the ring does not run, is full of open ones, or can't be read.
    NoMore,
    /// The last one leaves this to be done.
    ToServe(InlineWork),
}

impl Ring {
    /// Hands all waiting chains to the device, and does what it leaves to be done.
    pub fn drain(self: &Arc<Self>) {
        self.drain_locked(self.lock());
    }

    pub(super) fn drain_locked<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        // Only where the last one was served here: others take longer than one would poll.
        let mut may_poll = false;
        loop {
            let polls = may_poll && state.poll.is_due();
            match self.take(&mut state, true, !polls) {
                Taken::ToServe(now) => {
                    state.serving += 1;
                    self.wake.wake();
                    drop(state);
                    now();
                    state = self.lock();
                    state.serving -= 1;
                    state.served += 1;
                    may_poll = true;
                }
                Taken::All if polls => {
                    state.more = false;
                    self.signal_used(&mut state);
                    let poll = state.poll;
                    drop(state);
                    let hit = TURNS.until(poll, || self.look());
                    state = self.lock();
                    if let Some(hit) = hit {
                        state.poll.tried(hit);
                    }
                    may_poll = false;
                }
                Taken::All | Taken::NoMore => break,
            }
        }
        state.poll.sleeps();
        state.more = false;
        self.signal_used(&mut state);
    }

    /// Whether there is something to be taken; none if nothing can be.
    fn look(&self) -> Option<bool> {
        let state = self.lock();
        if state.phase != Phase::Running || state.ring_full {
            return None;
        }
        let vring = self.vring.get()?.get_ref();
        let queue = vring.get_queue();
        let avail = queue.avail_idx(&*self.mem.ram(), Ordering::Acquire).ok()?;
        Some(avail.0 != queue.next_avail())
    }

    /// Whether a request is being served by the thread that took it.
    pub(crate) fn is_serving(&self) -> bool {
        self.lock().serving > 0
    }

    /// Drains the ring in the place of a thread that has ended nothing since `served` requests
    /// were.
    pub(crate) fn relieve(self: &Arc<Self>, served: &mut u64) -> Progress {
        let mut state = self.lock();
        let before = std::mem::replace(served, state.served);
        match (state.serving > 0, before == *served) {
            (true, true) => {
                self.signal_used(&mut state);
                self.hand_out(&mut state);
                Progress::HeldUp
            }
            (false, true) => Progress::Idle,
            _ => Progress::Made,
        }
    }

    /// Hands all waiting chains to others.
    pub(super) fn hand_out(self: &Arc<Self>, state: &mut State) {
        let left = self.take(state, false, true);
        debug_assert!(!matches!(left, Taken::ToServe(_)), "a device leaves work to the relief");
    }

    /// Hands waiting chains to the device, up to one that leaves something to be done. `arm`: when
    /// there is none left, the driver shall kick for the next one.
    fn take(self: &Arc<Self>, state: &mut State, serves: bool, arm: bool) -> Taken {
        let Some(vring) = self.vring.get().filter(|_| state.phase == Phase::Running) else {
            return Taken::NoMore;
        };
        let taken = self.try_take(vring, state, serves, arm);
        self.warn_of("the ring can't be read", taken).unwrap_or(Taken::NoMore)
    }

    fn try_take(
        self: &Arc<Self>,
        vring: &Vring,
        state: &mut State,
        serves: bool,
        arm: bool,
    ) -> Result<Taken, QueueError> {
        let mut guard = vring.get_mut();
        if !guard.is_enabled() {
            return Ok(Taken::NoMore);
        }
        let mem = self.mem.ram();
        let queue = guard.get_queue_mut();
        let size = queue.size();
        loop {
            queue.disable_notification(&*mem)?;
            // An index that runs ahead of the ring is an error here, and ends the drain:
            // enable_notification() would call it new work for ever.
            while state.inflight < size {
                let Some(chain) = queue.iter(mem.clone())?.next() else { break };
                let head = chain.head_index();
                let parsed = parse(chain, size);
                state.inflight += 1;
                let request = Request {
                    owner: self.clone(),
                    epoch: state.epoch,
                    window_lost: state.window_lost,
                    head,
                    parsed,
                    pinned: None,
                };
                let drained = if serves {
                    let avail = queue.avail_idx(&*mem, Ordering::Acquire)?;
                    state.more = avail.0 != queue.next_avail();
                    Drained::ByServer { more: state.more }
                } else {
                    Drained::ByWatchdog
                };
                if let Some(now) = self.device.handle(request, drained) {
                    return Ok(Taken::ToServe(now));
                }
            }
            state.ring_full = state.inflight >= size;
            if state.ring_full {
                return Ok(Taken::NoMore);
            }
            if !arm || !queue.enable_notification(&*mem)? {
                return Ok(Taken::All);
            }
        }
    }
}
