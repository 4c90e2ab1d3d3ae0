// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: takes requests out of a ring, and returns their chains. The device serves each on the
//! thread that took it, or on another thread. Knows no device.

use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::warn;
use vhost_user_backend::VringT;
use virtio_queue::{DescriptorChain, Error as QueueError, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use super::{Phase, Ring, State, Vring};
use crate::device::chain::parse;
use crate::device::memory::Memory;
use crate::device::request::{Answer, Epoch, PinGuard, Request, RequestOwner};
use crate::device::{Drained, InlineWork};
use crate::ring::poll::TURNS;
use crate::support::lock::{MutexGuard, Rank, assert_free};

/// Log text for a used ring that can't be written.
const UNRETURNED: &str = "a chain can't be returned";

/// The longest reply, in bytes, that is stored under the ring's lock: to release and take that lock
/// takes longer than to copy a short reply.
const MOST_UNDER_LOCK: usize = 4096;

/// Number of answers after which the driver is notified, while the same thread has more requests to
/// serve: a notification takes longer than most requests. (A driver that polls sees an answer at
/// once. If the next request is held up, the watchdog notifies the driver.)
const SIGNAL_AT: u16 = 16;

/// Limit on the time from an answer to the notification of the driver. It is exceeded by at most
/// the time of the [`LOOK_EVERY`] requests between two looks at the clock.
const SIGNAL_WITHIN: Duration = Duration::from_micros(100);

/// Number of answers between two looks at the clock. One look takes 1 % of the time of a short
/// request.
const LOOK_EVERY: u16 = 4;

/// What the watchdog has found: the progress of requests that are served by the thread that took
/// them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// No request is being served, and none has ended since the last look.
    Idle,
    /// At least one request has ended since the last look.
    Made,
    /// A request is being served, and none has ended since the last look.
    HeldUp,
}

/// Why `take` has returned.
enum Taken {
    /// All available chains were handed to the device.
    All,
    /// No chain can be taken: the ring does not run, is full of open requests, or can't be read; or
    /// another thread is handing a chain over, and will look for further ones.
    NoMore,
    /// The device has left this work to the calling thread, for the chain taken last.
    ToServe(InlineWork),
}

/// The next chain of the ring (with the queue's size, in descriptors), or why there is none.
enum Next {
    Chain(DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>, u16),
    Nothing(Taken),
}

/// A chain is being handed over. While this exists, its thread calls the device without the ring's
/// lock, no other thread takes chains, and a stop of the ring waits.
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

/// Reached only if the device panics: the thread unwinds, and the front-end thread must not wait
/// for it.
impl Drop for HandOver<'_> {
    fn drop(&mut self) {
        self.ended(&mut self.0.lock());
    }
}

impl Ring {
    /// Hands all available chains to the device, and does the work that the device leaves to this
    /// thread.
    pub fn drain(self: &Arc<Self>) {
        self.drain_locked(self.lock());
    }

    pub(super) fn drain_locked<'a>(self: &'a Arc<Self>, mut state: MutexGuard<'a, State>) {
        // Polls only after this thread has served a request: requests of other threads take longer
        // than one poll.
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

    /// Whether a chain is available; none if no chain can be taken.
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

    /// Called by the watchdog: drains the ring if its thread serves a request and no request has
    /// ended since the last call. `served` is the number of ended requests at the last call; it is
    /// updated.
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

    /// Hands all available chains to the device, for service by other threads.
    pub(super) fn hand_out(self: &Arc<Self>, state: MutexGuard<'_, State>) {
        let (_, left) = self.take(state, false, true);
        debug_assert!(!matches!(left, Taken::ToServe(_)), "work is left to a thread that can't");
    }

    /// Hands available chains to the device, up to the first one whose work the device leaves to
    /// this thread. `serves`: this thread may do such work. `arm`: asks the driver for a kick when
    /// no chain is available.
    ///
    /// One thread at a time does this, in the order of the ring. A second thread that comes
    /// meanwhile (the ring's thread, the watchdog, or a thread that has completed a request of a
    /// full ring) sees `handing_over` and takes no chain. No chain is missed: the first thread
    /// takes the lock again after the second one has released it, then looks for further chains and
    /// whether the ring is still full. If the first thread serves a request before it looks, and is
    /// held up, the watchdog looks in its place.
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
            // An available index that is more than a queue's size ahead is an error here, and ends
            // the drain. Without this, enable_notification() would report new chains for ever.
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

    /// Checks a chain and hands it to the device, without the ring's lock. This thread reads the
    /// descriptors, and the device copies the parts of the request that it keeps. If the front-end
    /// thread stops the ring meanwhile, the stop waits: so the memory read belongs to the driver
    /// that sent the request, and the request to the epoch in which it was taken.
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

impl Ring {
    /// Stores the reply, puts the head into the used ring if it is valid, and notifies the driver
    /// if that is due. The ring runs, or a stop waits for this thread. A long reply is stored
    /// without the lock; other threads may return their chains meanwhile.
    pub(super) fn give_back<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        answer: Answer,
    ) -> MutexGuard<'a, State> {
        let Some(vring) = self.vring.get() else { return state };
        if let Some(head) = answer.head {
            let ram = self.mem.ram();
            let stored = if answer.bytes() > MOST_UNDER_LOCK {
                // This thread stores without the lock, and the front-end thread may stop the ring
                // meanwhile. The stop waits for the pin, so the memory stays this driver's until
                // the store is done.
                state.pinned += 1;
                drop(state);
                assert_free(Rank::Life);
                let stored = answer.store(&ram);
                state = self.lock();
                self.unpinned(&mut state);
                stored
            } else {
                answer.store(&ram)
            };
            // Stores the reply before it moves the used index: the driver reads the reply once the
            // index moves.
            let returned = vring.get_mut().get_queue_mut().add_used(&*ram, head, stored);
            self.warn_of(UNRETURNED, returned);
        }
        state.inflight -= 1;
        state.unsignalled += 1;
        self.signal_in_time(&mut state);
        state
    }

    /// Notifies the driver of returned chains, unless this thread is about to return more of them.
    pub(super) fn signal_in_time(&self, state: &mut State) {
        if !state.more || state.unsignalled >= SIGNAL_AT {
            return self.signal_used(state);
        }
        match state.unsignalled_since {
            None => state.unsignalled_since = Some(Instant::now()),
            Some(since)
                if state.unsignalled.is_multiple_of(LOOK_EVERY)
                    && since.elapsed() >= SIGNAL_WITHIN =>
            {
                self.signal_used(state);
            }
            Some(_) => {}
        }
    }

    /// Notifies the driver of returned chains, unless the driver has suppressed notifications.
    pub(super) fn signal_used(&self, state: &mut State) {
        state.unsignalled_since = None;
        if std::mem::take(&mut state.unsignalled) > 0
            && let Some(vring) = self.vring.get()
        {
            self.warn_of(UNRETURNED, self.signal(vring));
        }
    }

    fn signal(&self, vring: &Vring) -> Result<(), QueueError> {
        let mut guard = vring.get_mut();
        if guard.get_queue_mut().needs_notification(&*self.mem.ram())? {
            // The write fails if the front-end has closed its end of the call; it is about to stop
            // the ring.
            let _ = guard.signal_used_queue();
        }
        Ok(())
    }

    pub(super) fn warn_of<T>(&self, what: &str, result: Result<T, QueueError>) -> Option<T> {
        if let Err(e) = &result
            && let Some(held_back) = self.log_limit.admit(Instant::now())
        {
            warn!("{what}: {e}{held_back}");
        }
        result.ok()
    }
}

impl RequestOwner for Ring {
    fn memory(&self) -> &Memory {
        &self.mem
    }

    fn pin(self: Arc<Self>, epoch: Epoch, wait: bool) -> Option<PinGuard> {
        let mut state = self.lock();
        while wait && state.epoch == epoch && state.phase != Phase::Running && !state.closing {
            state = self.wait(state);
        }
        if state.epoch != epoch || state.phase != Phase::Running {
            return None;
        }
        state.pinned += 1;
        drop(state);
        Some(PinGuard::new(self))
    }

    fn unpin(&self) {
        self.unpinned(&mut self.lock());
    }

    fn complete(self: Arc<Self>, epoch: Epoch, answer: Answer) {
        let mut state = self.lock();
        if state.epoch != epoch {
            return;
        }
        match state.phase {
            Phase::Running | Phase::Stopping => state = self.give_back(state, answer),
            Phase::AwaitingWindow | Phase::Stopped => state.deferred.push(answer),
        }
        if state.ring_full {
            // Not drain(): this thread may be completing a request that drain() has taken, and must
            // not serve another one inside it.
            self.hand_out(state);
        }
    }
}
