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
#[cfg(test)]
mod tests;
mod vring;
mod wake;
mod watchdog;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use log::warn;
use vhost_user_backend::VringT;
use virtio_queue::{Error as QueueError, QueueT};

use crate::device::memory::Memory;
use crate::device::request::{Answer, Epoch, PinGuard, RequestOwner};
use crate::device::{Device, InflightPolicy, RingStart};
use crate::ring::poll::Poll;
use crate::support::lock::{Condvar, Mutex, MutexGuard, Rank, assert_free, lock};
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

/// The longest reply, in bytes, that is stored under the ring's lock: to give that lock up and take
/// it again costs more than to copy a short reply.
const MOST_UNDER_LOCK: usize = 4096;

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
    /// Number of threads that read or write the guest's memory for this ring without its lock: for
    /// a request that is [pinned](crate::device::request::Request::pin), for one that is handed to
    /// the device, or for a long reply. A stop waits until it is 0.
    pinned: u16,
    /// A thread takes chains, and has given the lock up to hand one of them to the device.
    handing_over: bool,
    /// The process is about to end: no thread waits for a stopped ring.
    closing: bool,
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
        debug_assert_eq!(self.pinned, 0, "guest memory is used beyond a stop");
        let Self { waiting, serving, served, poll, closing, .. } = *self;
        *self = Self { epoch, waiting, serving, served, poll, closing, ..Self::default() };
    }
}

/// One ring of a device.
pub struct Ring {
    device: Arc<dyn Device>,
    index: usize,
    mem: Memory,
    /// The library's vring lock is taken under it. The device is called without both.
    state: Mutex<State>,
    /// A copy of whether `state.phase` is another one than `Stopped`: see
    /// [`is_started`](Ring::is_started).
    started: AtomicBool,
    /// The ring was stopped, has started, is about to end with the process, or is pinned by one
    /// thread less.
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
            state: Mutex::ranked(Rank::Ring, State::default()),
            started: AtomicBool::new(false),
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

    /// Whether [`start`](Ring::start) would find the ring started already. No lock is taken.
    ///
    /// The ring's thread and the watchdog ask this before they start the ring; the front-end thread
    /// changes it, by a stop. An answer may be older than a stop or a start that runs meanwhile:
    ///
    /// - False for a ring that another thread has just started: `start()` looks again, under the
    ///   lock.
    /// - True for a ring that the front-end thread is about to stop: the ring's thread then drains
    ///   a ring, and finds under the lock that it is stopped.
    /// - True for a ring that was stopped, and whose next start has kicked the ring's thread, would
    ///   lose that kick. That can't be: the front-end thread stores false here before it makes the
    ///   vring ready again, under the library's vring lock; and the ring's thread has read the kick
    ///   under that lock before it comes here. The watchdog, which reads no kick, asks again after
    ///   its next tick.
    ///
    /// So that lock orders the two threads; Release and Acquire make the pair clear by itself.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    fn set_phase(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.started.store(phase != Phase::Stopped, Ordering::Release);
    }

    /// What was open is void, and the ring stopped.
    fn renew(&self, state: &mut State, epoch: Epoch) {
        state.renew(epoch);
        self.set_phase(state, Phase::Stopped);
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
            self.renew(&mut state, epoch);
            self.changed.notify_all();
        }
        self.vring.get_or_init(|| vring.clone());
        self.set_phase(&mut state, Phase::AwaitingWindow);
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
            self.set_phase(&mut state, Phase::Running);
            state.window_lost = window_lost;
            self.changed.notify_all();
            // A stop by the front-end thread waits until all of them are returned.
            state.pinned += 1;
            for answer in std::mem::take(&mut state.deferred) {
                state = self.give_back(state, answer);
            }
            self.unpinned(&mut state);
            if serves {
                self.drain_locked(state);
            } else {
                self.hand_out(state);
            }
        }
    }

    /// Stops the ring (GET_VRING_BASE). With [`InflightPolicy::Resubmit`] the base that the
    /// front-end will read is moved before the open requests, so that the next start takes them
    /// again. Waits for no request but for those whose threads use the guest's memory.
    pub fn stop(&self) {
        drop(self.stopped());
    }

    fn stopped(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.more = false;
        self.signal_used(&mut state);
        let hand_back = self.device.inflight_policy() == InflightPolicy::Resubmit;
        // A thread that has pinned the ring may still return its chain; no thread takes a new one.
        if state.phase == Phase::Running {
            self.set_phase(&mut state, Phase::Stopping);
        }
        while state.pinned > 0 {
            state = self.wait(state);
        }
        let epoch = state.epoch.next();
        let started = self.vring.get().filter(|_| state.phase != Phase::Stopped);
        let Some(vring) = started else {
            if hand_back {
                // The front-end thread has stopped, started and stopped the ring before the ring's
                // thread saw the start: the ring goes on where it was stopped first.
                let stopped_at = state.stopped_at;
                self.renew(&mut state, epoch);
                state.stopped_at = stopped_at;
            }
            return state;
        };
        let mut vring = vring.get_mut();
        let queue = vring.get_queue_mut();
        if hand_back {
            let base = queue.next_avail().wrapping_sub(state.inflight);
            queue.set_next_avail(base);
            self.renew(&mut state, epoch);
            state.stopped_at = base;
        } else {
            state.stopped_at = queue.next_avail();
            self.set_phase(&mut state, Phase::Stopped);
        }
        drop(vring);
        state
    }

    /// The front-end has gone: whatever is open is void.
    pub fn end(&self) {
        let mut state = self.stopped();
        let epoch = state.epoch.next();
        self.renew(&mut state, epoch);
        self.changed.notify_all();
    }

    /// The process is about to end: threads that wait for the ring to go on wait no more.
    pub(crate) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// Waits until the ring has [changed](Self::changed).
    fn wait<'a>(&self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        state.waiting += 1;
        state = self.changed.wait(state);
        state.waiting -= 1;
        state
    }

    /// This thread uses the guest's memory no more.
    fn unpinned(&self, state: &mut State) {
        state.pinned -= 1;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }

    /// Stores the reply, puts the head into the used ring (unless it has no place there), and tells
    /// the driver if it is time to. The ring runs, or stops and waits for this thread. A long reply
    /// is stored without the lock; other threads may return their chains meanwhile.
    fn give_back<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        answer: Answer,
    ) -> MutexGuard<'a, State> {
        let Some(vring) = self.vring.get() else { return state };
        if let Some(head) = answer.head {
            let ram = self.mem.ram();
            let stored = if answer.bytes() > MOST_UNDER_LOCK {
                // This thread stores without the lock, and the front-end thread stops the ring:
                // the stop waits for the pin, so that the memory is this driver's until then.
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
            // The reply before the used index: the driver reads it as soon as the index moves.
            let returned = vring.get_mut().get_queue_mut().add_used(&*ram, head, stored);
            self.warn_of(UNRETURNED, returned);
        }
        state.inflight -= 1;
        state.unsignalled += 1;
        self.signal_in_time(&mut state);
        state
    }

    /// Tells the driver of the chains that went back, unless more of them are about to.
    fn signal_in_time(&self, state: &mut State) {
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
            self.warn_of(UNRETURNED, self.signal(vring));
        }
    }

    fn signal(&self, vring: &Vring) -> Result<(), QueueError> {
        let mut guard = vring.get_mut();
        if guard.get_queue_mut().needs_notification(&*self.mem.ram())? {
            // A front-end that closed its end of the call is about to stop the ring: not our fault.
            let _ = guard.signal_used_queue();
        }
        Ok(())
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
            // Served by others: this may be the end of one that was taken here.
            self.hand_out(state);
        }
    }
}
