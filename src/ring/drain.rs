// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How requests leave a ring: one after another, each served by the thread that took it or by
//! others. Knows no device.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use super::{Phase, Ring, State, Vring};
use crate::device::chain::parse;
use crate::device::request::Request;
use crate::device::{Drained, InlineWork};
use crate::ring::poll::TURNS;
use crate::support::lock::{MutexGuard, Rank, assert_free};

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
    /// No more can be: the ring does not run, is full of open ones, or can't be read; or another
    /// thread hands them over, and will look for more.
    NoMore,
    /// The last one leaves this to be done.
    ToServe(InlineWork),
}

/// What was next in the ring.
enum Next {
    Chain(DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>, u16),
    Nothing(Taken),
}

/// While there is one, this thread calls the device without the ring's lock, no other thread takes
/// chains, and the ring is not stopped.
struct HandOver<'r>(&'r Ring);

impl<'r> HandOver<'r> {
    fn begin(ring: &'r Ring, mut state: MutexGuard<'_, State>) -> Self {
        state.handing_over = true;
        state.pinned += 1;
        Self(ring)
    }

    fn end(self) -> MutexGuard<'r, State> {
        let mut state = self.0.lock();
        self.ended(&mut state);
        mem::forget(self);
        state
    }

    fn ended(&self, state: &mut State) {
        state.handing_over = false;
        self.0.unpinned(state);
    }
}

/// The device has panicked: this thread ends, and the front-end thread must not wait for it.
impl Drop for HandOver<'_> {
    fn drop(&mut self) {
        self.ended(&mut self.0.lock());
    }
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
            let taken;
            (state, taken) = self.take(state, true, !polls);
            match taken {
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
        if state.phase != Phase::Running || state.ring_full || state.closing {
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
                self.hand_out(state);
                Progress::HeldUp
            }
            (false, true) => Progress::Idle,
            _ => Progress::Made,
        }
    }

    /// Hands all waiting chains to others.
    pub(super) fn hand_out(self: &Arc<Self>, state: MutexGuard<'_, State>) {
        let (_, left) = self.take(state, false, true);
        debug_assert!(!matches!(left, Taken::ToServe(_)), "a device leaves work to the watchdog");
    }

    /// Hands waiting chains to the device, up to one that leaves something to be done. `arm`: when
    /// there is none left, the driver shall kick for the next one.
    ///
    /// One thread at a time does so, in the order of the ring. A second thread that comes meanwhile
    /// (the ring's, the watchdog, or one that has completed a request of a full ring) sees
    /// `handing_over` and takes nothing. No chain is forgotten for that: the first thread takes the
    /// lock again after the second one has given it up, and then looks for further chains and
    /// whether the ring is still full. If it has to serve what it took before that, and is held up,
    /// the watchdog looks in its place.
    fn take<'a>(
        self: &'a Arc<Self>,
        mut state: MutexGuard<'a, State>,
        serves: bool,
        arm: bool,
    ) -> (MutexGuard<'a, State>, Taken) {
        loop {
            let runs = state.phase == Phase::Running && !state.handing_over;
            let Some(vring) = self.vring.get().filter(|_| runs) else {
                return (state, Taken::NoMore);
            };
            let next = self.next(vring, &mut state, serves, arm);
            match self.warn_of("the ring can't be read", next) {
                Some(Next::Chain(chain, queue_size)) => {
                    let left;
                    (state, left) = self.hand_over(state, chain, queue_size, serves);
                    if let Some(now) = left {
                        return (state, Taken::ToServe(now));
                    }
                }
                Some(Next::Nothing(taken)) => return (state, taken),
                None => return (state, Taken::NoMore),
            }
        }
    }

    /// Takes the next chain out of the ring.
    fn next(
        &self,
        vring: &Vring,
        state: &mut State,
        serves: bool,
        arm: bool,
    ) -> Result<Next, QueueError> {
        let mut guard = vring.get_mut();
        if !guard.is_enabled() {
            return Ok(Next::Nothing(Taken::NoMore));
        }
        let mem = self.mem.ram();
        let queue = guard.get_queue_mut();
        loop {
            queue.disable_notification(&*mem)?;
            state.ring_full = state.inflight >= queue.size();
            if state.ring_full {
                return Ok(Next::Nothing(Taken::NoMore));
            }
            // An index that runs ahead of the ring is an error here, and ends the drain:
            // enable_notification() would call it new work for ever.
            if let Some(chain) = queue.iter(mem.clone())?.next() {
                state.inflight += 1;
                if serves {
                    let avail = queue.avail_idx(&*mem, Ordering::Acquire)?;
                    state.more = avail.0 != queue.next_avail();
                }
                return Ok(Next::Chain(chain, queue.size()));
            }
            if !arm || !queue.enable_notification(&*mem)? {
                return Ok(Next::Nothing(Taken::All));
            }
        }
    }

    /// Checks a chain and hands it to the device, without the ring's lock: the descriptors are
    /// read, and the device copies what it keeps of the request. If the front-end thread stops the
    /// ring meanwhile, the stop waits: what is read is this driver's, and the request belongs to
    /// the epoch in which it was taken.
    fn hand_over<'a>(
        self: &'a Arc<Self>,
        state: MutexGuard<'a, State>,
        chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>,
        queue_size: u16,
        serves: bool,
    ) -> (MutexGuard<'a, State>, Option<InlineWork>) {
        let (epoch, window_lost) = (state.epoch, state.window_lost);
        let drained =
            if serves { Drained::ByServer { more: state.more } } else { Drained::ByWatchdog };
        let handing_over = HandOver::begin(self, state);
        assert_free(Rank::Life);
        let head = chain.head_index();
        let parsed = parse(chain, queue_size);
        let owner = self.clone();
        let request = Request { owner, epoch, window_lost, head, parsed, pinned: None };
        let left = self.device.handle(request, drained);
        (handing_over.end(), left)
    }
}
