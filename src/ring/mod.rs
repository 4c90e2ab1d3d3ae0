// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains one vring into requests and returns their chains. Knows no device.
//!
//! A ring is stopped, awaiting its window (started, but the window is not mapped yet; requests stay
//! in the ring), running, or stopping. At a stop, open requests are either handed back to the
//! driver or kept until the ring resumes ([`InflightPolicy`]). A new [`Epoch`] begins with a start
//! from another place than where the ring was stopped, and with a stop that hands requests back.
//! Requests of an older epoch are void: so a flush whose sync ends after the stop does not write
//! the ring.

mod drain;
mod poll;
#[cfg(test)]
mod tests;
mod vring;
mod wake;
mod watchdog;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use vhost_user_backend::VringT;
use virtio_queue::QueueT;

use crate::device::memory::Memory;
use crate::device::request::{Answer, Epoch};
use crate::device::{Device, InflightPolicy, RingStart};
use crate::ring::poll::Poll;
use crate::support::lock::{Condvar, Mutex, MutexGuard, Rank, lock};
use crate::support::log_limit::RateLimit;

pub use crate::ring::vring::Vring;
pub(crate) use drain::Progress;
pub(crate) use wake::Wake;
pub(crate) use watchdog::Watchdog;

/// The result of a ring's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// The epoch to name when the ring is released.
    pub epoch: Epoch,
    /// The place from which the ring was started.
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
    /// Number of chains taken and not completed. With [`InflightPolicy::Resubmit`] the device
    /// completes requests in order, so these are the chains taken last: the stop moves the base
    /// back by this number, and so hands exactly these chains back.
    inflight: u16,
    /// Number of threads that read or write guest memory for this ring without its lock: for a
    /// request that is [pinned](crate::device::request::Request::pin), for a request that is being
    /// handed to the device, or for a long reply. A stop waits until it is 0.
    pinned: u16,
    /// A thread takes chains, and has released the lock to hand one of them to the device.
    handing_over: bool,
    /// The process is about to end: no thread waits for a stopped ring any more.
    closing: bool,
    /// Answers of requests that were completed while the ring was stopped.
    deferred: Vec<Answer>,
    /// The available index at the last stop. The used index was lower by the number of open
    /// requests.
    stopped_at: u16,
    /// The window can't be mapped: the guest's stores do not reach the file, so every flush fails.
    window_lost: bool,
    /// Chains were left in the ring because `inflight` had reached the queue's size.
    ring_full: bool,
    /// Number of threads that wait for [`Ring::changed`].
    waiting: u16,
    /// The ring's thread serves a request, and more chains are available.
    more: bool,
    /// Number of returned chains of which the driver was not notified, and when the first was
    /// returned.
    unsignalled: u16,
    unsignalled_since: Option<Instant>,
    /// Number of requests that are being served by the thread that took them.
    serving: u32,
    /// Number of such requests that have ended.
    served: u64,
    poll: Poll,
}

impl State {
    /// Whether a ring that starts at these indices continues where it was stopped.
    fn goes_on(&self, next_avail: u16, next_used: u16) -> bool {
        next_avail == self.stopped_at && next_used == next_avail.wrapping_sub(self.inflight)
    }

    /// Voids open requests, and sets the ring stopped.
    fn renew(&mut self, epoch: Epoch) {
        debug_assert_eq!(self.pinned, 0, "guest memory is pinned after a stop");
        let Self { waiting, serving, served, poll, closing, .. } = *self;
        *self = Self { epoch, waiting, serving, served, poll, closing, ..Self::default() };
    }
}

/// One ring of a device.
pub struct Ring {
    device: Arc<dyn Device>,
    index: usize,
    mem: Memory,
    /// The library's vring lock is taken under it. The device is called without either lock.
    state: Mutex<State>,
    /// Whether `state.phase` is not `Stopped`, readable without the lock: see
    /// [`is_started`](Ring::is_started).
    started: AtomicBool,
    /// Notified when the ring runs, when its open requests become void, when the process is about
    /// to end, and when a thread has unpinned the ring.
    changed: Condvar,
    wake: Arc<Wake>,
    /// The library's vring, set at the first start. It stays the same during a session.
    vring: OnceLock<Vring>,
    log_limit: RateLimit,
}

impl Ring {
    /// The device's stopped ring number `index` in the guest memory `mem`.
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

    /// The number of the ring in the device.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The library's vring; none before the first start.
    pub(crate) fn vring(&self) -> Option<&Vring> {
        self.vring.get()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether [`start`](Ring::start) would find the ring started. Takes no lock.
    ///
    /// The ring's thread and the watchdog read this before they start the ring; the front-end
    /// thread changes it by a stop. The value may be older than a stop or a start that runs
    /// meanwhile:
    ///
    /// - False, although another thread has just started the ring: `start()` looks again under the
    ///   lock.
    /// - True, although the front-end thread is about to stop the ring: the ring's thread then
    ///   drains the ring, and finds under the lock that it is stopped.
    /// - True, although the ring was stopped and its next start has kicked the ring's thread: this
    ///   would lose the kick, and can't happen. The front-end thread stores false before it makes
    ///   the vring ready again under the library's vring lock; the ring's thread reads the kick
    ///   under that lock before it calls this. The watchdog, which reads no kick, looks again after
    ///   its next tick.
    ///
    /// So the vring lock orders the two threads. Release and Acquire make the pair correct without
    /// it.
    pub(crate) fn is_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    fn set_phase(&self, state: &mut State, phase: Phase) {
        state.phase = phase;
        self.started.store(phase != Phase::Stopped, Ordering::Release);
    }

    /// Voids open requests, and sets the ring stopped.
    fn renew(&self, state: &mut State, epoch: Epoch) {
        state.renew(epoch);
        self.set_phase(state, Phase::Stopped);
    }

    /// Starts the ring if the library has set `vring` up and the ring is stopped. The ring then
    /// awaits its window. The caller must map the window and then call [`release`](Ring::release)
    /// with the returned epoch.
    pub fn start(&self, vring: &Vring) -> Option<Started> {
        let mut state = self.lock();
        // Read under the ring's lock. At GET_VRING_BASE the front-end thread clears `ready` and
        // then calls stop(). This thread, the ring's or the watchdog, either sees `ready` cleared,
        // or that stop() comes later and undoes this start.
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

    /// Whether the library has set the stopped ring up at another place than where it was stopped.
    pub(crate) fn is_afresh(&self) -> bool {
        let state = self.lock();
        let Some(vring) = self.vring.get().filter(|_| state.phase == Phase::Stopped) else {
            return false;
        };
        let vring = vring.get_ref();
        let queue = vring.get_queue();
        queue.ready() && !state.goes_on(queue.next_avail(), queue.next_used())
    }

    /// Lets requests leave the ring: the window of this epoch is mapped. `serves`: this thread may
    /// serve them.
    pub fn release(self: &Arc<Self>, epoch: Epoch, serves: bool) {
        self.run(epoch, false, serves);
    }

    /// Lets requests leave the ring, though the window can't be mapped: every flush fails.
    pub fn release_without_window(self: &Arc<Self>, epoch: Epoch) {
        self.run(epoch, true, true);
    }

    fn run(self: &Arc<Self>, epoch: Epoch, window_lost: bool, serves: bool) {
        let mut state = self.lock();
        if state.phase == Phase::AwaitingWindow && state.epoch == epoch {
            self.set_phase(&mut state, Phase::Running);
            state.window_lost = window_lost;
            self.changed.notify_all();
            // A stop by the front-end thread waits until this thread has returned all deferred
            // answers.
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
    /// front-end reads afterwards is moved back before the open requests, so that the next start
    /// takes them again. Waits only for threads that have pinned the ring.
    pub fn stop(&self) {
        drop(self.stopped());
    }

    fn stopped(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.more = false;
        self.signal_used(&mut state);
        let hand_back = self.device.inflight_policy() == InflightPolicy::Resubmit;
        // A thread that has pinned the ring may still return its chain; no thread takes a new
        // chain.
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

    /// Stops the ring after the front-end has disconnected: open requests are void.
    pub fn end(&self) {
        let mut state = self.stopped();
        let epoch = state.epoch.next();
        self.renew(&mut state, epoch);
        self.changed.notify_all();
    }

    /// Wakes all threads that wait for the ring to run: the process is about to end.
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

    /// Ends one pin of this thread, and wakes a stop that waits for it.
    fn unpinned(&self, state: &mut State) {
        state.pinned -= 1;
        if state.waiting > 0 {
            self.changed.notify_all();
        }
    }
}
