// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains one vring into requests and returns their chains. Knows no device.
//!
//! A ring is stopped, held (started, but its window is not up yet: the requests stay where they
//! are) or running. What is open when it stops is either handed back to the driver or kept until
//! the ring goes on ([`InflightPolicy`]). A start from another place than where the ring was
//! stopped, and a stop that hands back, open a new [`Epoch`]; what belongs to an older one is void.
//! That is how a flush that is still syncing never touches a ring that is not ours any more.

mod drain;
mod poll;
mod vring;
mod wake;
mod watchdog;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use log::warn;
use vhost_user_backend::VringT;
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::GuestMemoryMmap;

use crate::device::memory::Memory;
use crate::device::request::{Answer, Epoch, PinGuard, RequestOwner};
use crate::device::{Device, InflightPolicy, RingStart};
use crate::ring::poll::Poll;
use crate::support::lock::lock;
use crate::support::log_limit::RateLimit;

pub use crate::ring::vring::Vring;
pub(crate) use drain::Progress;
pub(crate) use wake::Wake;
pub(crate) use watchdog::Watchdog;

/// Number of answers of which the driver is told at once while more requests wait to be served by
/// the same thread: to wake the driver costs more than most requests. (A driver that looks sees an
/// answer at once; if the next request is held up, the watchdog tells.)
const SIGNAL_AT: u16 = 16;

/// No answer waits longer for others to be told of with it, but for the few requests that are
/// served from one look at the clock to the next.
const SIGNAL_WITHIN: Duration = Duration::from_micros(100);

/// A look at the clock takes 1 % of the time of a short request.
const LOOK_EVERY: u16 = 4;

/// What is said where a ring can't be written.
const UNRETURNED: &str = "a chain can't be returned";

/// How often one who waits for a stopped ring looks whether the process is about to end.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How a ring was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// To be named when the ring is released.
    pub epoch: Epoch,
    /// From where.
    pub start: RingStart,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Phase {
    #[default]
    Stopped,
    AwaitingWindow,
    Running,
    Stopping,
}

#[derive(Default)]
struct State {
    phase: Phase,
    epoch: Epoch,
    /// Chains taken and not completed. With [`InflightPolicy::Resubmit`] the device completes in
    /// order, so these are the last that were taken, and moving the base back by this number hands
    /// exactly them back.
    inflight: u16,
    /// Those of them that have a hand in the guest's memory.
    pinned: u16,
    /// Completed while the ring was stopped.
    deferred: Vec<Answer>,
    /// The available index at the last stop; the used index was this less the open ones.
    stopped_at: u16,
    /// The guest has no window: whatever it stored is nowhere, so no flush may succeed.
    window_lost: bool,
    /// Chains were left in the ring because `open` had reached the queue's size.
    ring_full: bool,
    /// Number of threads that wait for [`Ring::changed`].
    waiting: u16,
    /// The thread that serves one request has the next one before it.
    more: bool,
    /// Returned chains that the driver was not told of, and when the first one was returned.
    unsignalled: u16,
    unsignalled_since: Option<Instant>,
    /// Requests that are served by the thread that took them.
    serving: u32,
    /// Those that were.
    served: u64,
    poll: Poll,
}

impl State {
    /// Whether a ring that starts there goes on where it was stopped.
    fn goes_on(&self, next_avail: u16, next_used: u16) -> bool {
        next_avail == self.stopped_at && next_used == next_avail.wrapping_sub(self.inflight)
    }

    /// What was open is void, and the ring stopped.
    fn renew(&mut self, epoch: Epoch) {
        let Self { waiting, serving, served, poll, .. } = *self;
        *self = Self { epoch, waiting, serving, served, poll, ..Self::default() };
    }
}

/// One ring of a device.
pub struct Ring {
    device: Arc<dyn Device>,
    index: usize,
    mem: Memory,
    // Lock order: this, then the library's vring lock, then the device's queue.
    state: Mutex<State>,
    /// The ring was stopped, has started, or is touched by one less.
    changed: Condvar,
    wake: Arc<Wake>,
    /// The library's, from the first start on: a session has the same one at each start.
    vring: OnceLock<Vring>,
    log_limit: RateLimit,
}

impl Ring {
    /// The device's ring number `index`, stopped, in the guest memory `mem`.
    pub(crate) fn new(
        device: Arc<dyn Device>,
        index: usize,
        mem: Memory,
        wake: Arc<Wake>,
    ) -> Arc<Self> {
        Arc::new(Self {
            device,
            index,
            mem,
            state: Mutex::default(),
            changed: Condvar::new(),
            wake,
            vring: OnceLock::new(),
            log_limit: RateLimit::default(),
        })
    }

    /// Its number.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The library's ring, if it has started once.
    pub(crate) fn vring(&self) -> Option<&Vring> {
        self.vring.get()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Takes note that the library may have started `vring`. If it has, and the ring was stopped,
    /// the ring is now held, and the caller must bring up the window and then call
    /// [`release`](Ring::release) with the epoch that this returns.
    pub fn start(&self, vring: &Vring) -> Option<Started> {
        let mut state = self.lock();
        // Looked at under our lock: GET_VRING_BASE clears `ready` before it calls stop(), so
        // either we see that here, or stop() comes after us and undoes the start.
        let (up, from, used) = {
            let vring = vring.get_ref();
            let queue = vring.get_queue();
            (queue.ready() && vring.is_enabled(), queue.next_avail(), queue.next_used())
        };
        if !up || state.phase != Phase::Stopped {
            return None;
        }
        let goes_on = state.goes_on(from, used);
        if !goes_on {
            let epoch = state.epoch.next();
            state.renew(epoch);
            self.changed.notify_all();
        }
        self.vring.get_or_init(|| vring.clone());
        state.phase = Phase::AwaitingWindow;
        state.window_lost = false;
        let start = match (goes_on, from) {
            (false, _) => RingStart::Afresh,
            (true, 0) => RingStart::Unknown,
            (true, _) => RingStart::Resumed,
        };
        Some(Started { epoch: state.epoch, start })
    }

    /// Whether the library has set the ring up to start, and not where it was stopped.
    pub(crate) fn is_afresh(&self) -> bool {
        let state = self.lock();
        let Some(vring) = self.vring.get().filter(|_| state.phase == Phase::Stopped) else {
            return false;
        };
        let vring = vring.get_ref();
        let queue = vring.get_queue();
        queue.ready() && !state.goes_on(queue.next_avail(), queue.next_used())
    }

    /// The window of this epoch is up: requests may leave the ring. `serves`: this thread may serve
    /// them.
    pub fn release(self: &Arc<Self>, epoch: Epoch, serves: bool) {
        self.run(epoch, false, serves);
    }

    /// The window of this epoch can't be had: requests leave the ring, and none may succeed.
    pub fn release_without_window(self: &Arc<Self>, epoch: Epoch) {
        self.run(epoch, true, true);
    }

    fn run(self: &Arc<Self>, epoch: Epoch, window_lost: bool, serves: bool) {
        let mut state = self.lock();
        if state.phase == Phase::AwaitingWindow && state.epoch == epoch {
            state.phase = Phase::Running;
            state.window_lost = window_lost;
            self.changed.notify_all();
            for answer in std::mem::take(&mut state.deferred) {
                self.give_back(&mut state, answer);
            }
            if serves {
                self.drain_locked(state);
            } else {
                self.hand_out(&mut state);
            }
        }
    }

    /// Stops the ring (GET_VRING_BASE). With [`InflightPolicy::Resubmit`] the base that the
    /// front-end will read is moved before the open requests, so that the next start takes them
    /// again. Never waits for a request, unless that touches the guest's memory.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.more = false;
        self.signal_used(&mut state);
        // Whoever touches guest memory may still return its chain; nothing new is taken.
        let hand_back = self.device.inflight_policy() == InflightPolicy::Resubmit;
        if state.phase == Phase::Running && !hand_back {
            state.phase = Phase::Stopping;
        }
        while state.pinned > 0 {
            state.waiting += 1;
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
            state.waiting -= 1;
        }
        let epoch = state.epoch.next();
        let started = self.vring.get().filter(|_| state.phase != Phase::Stopped);
        let Some(vring) = started else {
            if hand_back {
                state.renew(epoch);
            }
            return;
        };
        let mut vring = vring.get_mut();
        let queue = vring.get_queue_mut();
        if hand_back {
            let base = queue.next_avail().wrapping_sub(state.inflight);
            queue.set_next_avail(base);
            state.renew(epoch);
            state.stopped_at = base;
        } else {
            state.stopped_at = queue.next_avail();
            state.phase = Phase::Stopped;
        }
    }

    /// The front-end has gone: whatever is open is void.
    pub fn end(&self) {
        self.stop();
        let mut state = self.lock();
        let epoch = state.epoch.next();
        state.renew(epoch);
        self.changed.notify_all();
    }

    fn give_back(&self, state: &mut State, answer: Answer) {
        let Some(vring) = self.vring.get() else { return };
        state.inflight -= 1;
        self.warn_of(UNRETURNED, return_chain(&self.mem.ram(), vring, &answer));
        state.unsignalled += 1;
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

    /// Tells the driver of the chains that went back, if it wants to be told.
    fn signal_used(&self, state: &mut State) {
        state.unsignalled_since = None;
        if std::mem::take(&mut state.unsignalled) > 0
            && let Some(vring) = self.vring.get()
        {
            self.warn_of(UNRETURNED, signal(&self.mem.ram(), vring));
        }
    }

    fn warn_of<T>(&self, what: &str, result: Result<T, QueueError>) -> Option<T> {
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
        while wait
            && state.epoch == epoch
            && state.phase != Phase::Running
            && !self.device.is_closing()
        {
            // The device has no way to wake us.
            state.waiting += 1;
            let waited = self.changed.wait_timeout(state, LOOK_AGAIN);
            state = waited.unwrap_or_else(|e| e.into_inner()).0;
            state.waiting -= 1;
        }
        if state.epoch != epoch || state.phase != Phase::Running {
            return None;
        }
        state.pinned += 1;
        drop(state);
        Some(PinGuard::new(self))
    }

    fn unpin(&self) {
        let mut state = self.lock();
        state.pinned -= 1;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Stores the reply, puts the head into the used ring (unless it has no place there), and
    /// tells the driver if it wants to be told.
    fn complete(self: Arc<Self>, epoch: Epoch, answer: Answer) {
        let mut state = self.lock();
        if state.epoch == epoch {
            match state.phase {
                Phase::Running | Phase::Stopping => self.give_back(&mut state, answer),
                Phase::AwaitingWindow | Phase::Stopped => state.deferred.push(answer),
            }
            if state.ring_full {
                // Served by others: this may be the end of one that was taken here.
                self.hand_out(&mut state);
            }
        }
    }
}

fn return_chain(ram: &GuestMemoryMmap, vring: &Vring, answer: &Answer) -> Result<(), QueueError> {
    let Some(head) = answer.head else { return Ok(()) };
    let mut guard = vring.get_mut();
    // The reply before the used index: the driver reads it as soon as the index moves.
    let stored = answer.store(ram);
    guard.get_queue_mut().add_used(ram, head, stored)
}

fn signal(ram: &GuestMemoryMmap, vring: &Vring) -> Result<(), QueueError> {
    let mut guard = vring.get_mut();
    if guard.get_queue_mut().needs_notification(ram)? {
        // A front-end that closed its end of the call is about to stop the ring: not our fault.
        let _ = guard.signal_used_queue();
    }
    Ok(())
}
