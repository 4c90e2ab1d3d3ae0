// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: answers the vhost-user messages of the front-end. Knows the device only by the
//! trait `Device`.

use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;

use log::{debug, error, info};
use nix::unistd::close;
use vhost::vhost_user::Backend as BackendChannel;
use vhost::vhost_user::message::{
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserVirtioFeatures,
};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use crate::device::memory::{GuestMemory, Memory};
use crate::device::request::Epoch;
use crate::device::{Device, RingStart, SessionWindow};
use crate::ring::{Ring, Started, Vring, Wake, Watchdog};
use crate::session::closing::Closing;
use crate::session::lifecycle::Life;
use crate::session::restart::Restarts;
use crate::support::lock::{Mutex, MutexGuard, lock};
use crate::window::{MapError, ShmemMapper};

/// The largest ring, in descriptors, that a front-end may set up (`vq_size`).
const MAX_QUEUE_SIZE: usize = 1024;

/// One connection of a front-end to a device.
#[derive(Clone)]
pub(crate) struct Session(Arc<Inner>);

struct Inner {
    device: Arc<dyn Device>,
    rings: Vec<Arc<Ring>>,
    memory: Memory,
    /// None if the device serves no request on the ring's thread, and after the end of the session.
    watchdog: Mutex<Option<Watchdog>>,
    window: Arc<dyn SessionWindow>,
    /// Whether messages about the window may be sent (Q1).
    life: Arc<Life>,
    /// A new driver has started a ring since the last stop. Changed only inside a step of `life`.
    restarted: AtomicBool,
    /// Lets the device drop the last driver's state before any ring runs.
    restarts: Restarts<Due>,
    /// Why this front-end is refused; its connection is then shut down.
    refusal: OnceLock<String>,
    connection: Mutex<Option<ShutdownHandle>>,
    /// The event descriptors that end the library's threads; the library does not close them
    /// (vhost-user-backend 0.24).
    exit_events: Mutex<Vec<RawFd>>,
}

/// A ring that was started, and whose requests may not leave it yet.
struct Due {
    ring: Arc<Ring>,
    started: Started,
}

impl Session {
    /// # Errors
    /// The errno of clone(2) if the watchdog thread can't be started.
    pub(crate) fn new(
        device: Arc<dyn Device>,
        mem: GuestMemory,
        closing: &Closing,
    ) -> io::Result<Self> {
        let wake = Arc::new(Wake::default());
        let memory = Memory::new(mem);
        let ring = |index| Ring::new(device.clone(), index, memory.clone(), wake.clone());
        let rings: Vec<_> = (0..device.queues()).map(ring).collect();
        closing.watch(&rings);
        let session = Self(Arc::new(Inner {
            rings,
            memory,
            watchdog: Mutex::new(None),
            window: device.open_window(),
            life: Arc::default(),
            restarted: AtomicBool::new(false),
            restarts: Restarts::default(),
            device,
            refusal: OnceLock::new(),
            connection: Mutex::new(None),
            exit_events: Mutex::default(),
        }));
        if session.0.device.serves_at_once() {
            let theirs = Arc::downgrade(&session.0);
            let begin = move |ring: &Arc<Ring>| {
                if let (Some(inner), Some(vring)) = (theirs.upgrade(), ring.vring()) {
                    Self(inner).begin(ring, vring, false);
                }
            };
            let watchdog = Watchdog::start(&wake, session.0.rings.clone(), begin)?;
            *lock(&session.0.watchdog) = Some(watchdog);
        }
        Ok(session)
    }

    /// Stores the handle that shuts the connection down.
    pub(crate) fn connected(&self, handle: ShutdownHandle) {
        *self.connection() = Some(handle);
        self.cut_if_refused();
    }

    /// Ends the session after the front-end has disconnected: open requests are void. Returns why
    /// the front-end was refused, if it was.
    pub(crate) fn end(&self) -> Option<String> {
        *self.connection() = None;
        self.0.life.stop(|| self.0.window.stopped());
        self.0.window.ended();
        self.0.rings.iter().for_each(|ring| ring.end());
        // Not under the lock: this waits for the watchdog's thread.
        let watchdog = lock(&self.0.watchdog).take();
        drop(watchdog);
        self.0.device.session_ended();
        self.0.device.report();
        self.0.refusal.get().cloned()
    }

    /// Closes the event descriptors that the library leaves open. Called once, after the library's
    /// threads have ended.
    pub(crate) fn close_exit_events(&self) {
        let events = std::mem::take(&mut *self.exit_events());
        for event in events {
            if let Err(e) = close(event) {
                debug!("can't close an exit event: {e}");
            }
        }
    }

    fn exit_events(&self) -> MutexGuard<'_, Vec<RawFd>> {
        lock(&self.0.exit_events)
    }

    fn connection(&self) -> MutexGuard<'_, Option<ShutdownHandle>> {
        lock(&self.0.connection)
    }

    fn refuse(&self, lacks: &str) {
        let line = format!("the front-end lacks {lacks}; {}", self.0.device.use_instead());
        let _ = self.0.refusal.set(line);
        self.cut_if_refused();
    }

    fn cut_if_refused(&self) {
        if let (Some(_), Some(handle)) = (self.0.refusal.get(), &*self.connection()) {
            handle.shutdown();
        }
    }

    /// Starts the ring if the library has set it up, and finds out whether the driver has reset the
    /// device. A ring that was never used does not show a reset. Another ring does, whose own
    /// thread may come here later; so all rings are examined.
    fn start(&self, ring: &Ring, vring: &Vring) -> Option<Started> {
        self.0.life.start(|| {
            let started = ring.start(vring)?;
            let afresh = || self.0.rings.iter().any(|ring| ring.is_afresh());
            if (started.start == RingStart::Afresh || afresh())
                && !self.0.restarted.swap(true, Ordering::SeqCst)
            {
                self.0.restarts.begun();
            }
            Some(started)
        })
    }

    /// Starts the ring if the library has set it up and it is stopped, and lets requests leave it.
    /// `serves`: this thread may serve them. False if the ring was not started.
    fn begin(&self, ring: &Arc<Ring>, vring: &Vring, serves: bool) -> bool {
        // The common case, a kick of a started ring: takes no lock that the rings share.
        if ring.is_started() {
            return false;
        }
        let Some(started) = self.start(ring, vring) else { return false };
        let due = Due { ring: ring.clone(), started };
        let mut due = self.0.restarts.settle(due, || self.0.device.restarted());
        // The thread's own ring comes last: serving its requests may take long.
        due.sort_by_key(|due| Arc::ptr_eq(&due.ring, ring));
        for Due { ring: its, started } in due {
            self.go_on(&its, started, serves && Arc::ptr_eq(&its, ring));
        }
        true
    }

    /// Maps the window unless it is mapped, then lets requests leave the ring.
    fn go_on(&self, ring: &Arc<Ring>, started: Started, serves: bool) {
        // None: a stop by the front-end thread came after the start, and started() must not be
        // called. bring_up() then returns MapError::Stopped. The same holds if another ring was
        // stopped.
        if self.0.life.go_on(|| self.0.window.started(started.start)) == Some(true) {
            debug!("ring {} started", ring.index());
            return ring.release(started.epoch, serves);
        }
        let (session, its) = (self.clone(), ring.clone());
        // A thread of its own: the ack of a map comes only after another thread of this session,
        // the front-end thread, has answered a memory update (Q3).
        let map = move || session.bring_up(&its, started.epoch);
        if let Err(e) = Builder::new().name("window".into()).spawn(map) {
            error!("can't start the window thread: {e}");
            ring.release_without_window(started.epoch);
        }
    }

    fn bring_up(&self, ring: &Arc<Ring>, epoch: Epoch) {
        match self.0.window.bring_up() {
            Ok(()) => {
                info!("started; the window is mapped");
                ring.release(epoch, true);
            }
            Err(MapError::Stopped) => debug!("stopped before the window was mapped"),
            Err(MapError::Unsupported(what)) => self.refuse(what),
            Err(e) => {
                error!("the window can't be mapped: {e}; every flush will fail");
                ring.release_without_window(epoch);
            }
        }
    }
}

fn virtio_features(device: &dyn Device) -> u64 {
    1 << VIRTIO_F_VERSION_1
        | 1 << VIRTIO_RING_F_INDIRECT_DESC
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
        | device.features()
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        self.0.rings.len()
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        virtio_features(&*self.0.device)
    }

    fn acked_features(&self, features: u64) {
        // A driver with VIRTIO_F_VERSION_1 and without the device's own bits is too old, and shows
        // no region in the guest.
        let missing = self.0.device.features() & !features;
        if features & (1 << VIRTIO_F_VERSION_1) != 0 && missing != 0 {
            error!(
                "the guest's driver does not support feature bits {missing:#x} (Linux does since \
                 6.9): it will not find the device's memory"
            );
        }
    }

    /// SHARED_OBJECT serves only to find out whether the front-end acks (see
    /// [`ShmemMapper::probe_acks`]). STATUS is not offered: the library does not implement it.
    /// RESET_DEVICE is not offered: QEMU does not send it at a virtio reset. The device decides
    /// about CONFIGURE_MEM_SLOTS: with it, a reset with a live map kills QEMU (Q12); without it, a
    /// pause with many maps kills the device (Q13).
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let mut offered = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        if self.0.device.window_bytes().0 > 0 {
            offered |= VhostUserProtocolFeatures::BACKEND_REQ
                | VhostUserProtocolFeatures::BACKEND_SEND_FD
                | VhostUserProtocolFeatures::SHMEM
                | VhostUserProtocolFeatures::SHARED_OBJECT;
        }
        if self.0.device.mem_slots() {
            offered |= VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        }
        offered
    }

    /// One thread per ring: a request of one ring does not delay another ring.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.0.rings.len()).map(|ring| 1 << ring).collect()
    }

    /// The library's queue stores the event index.
    fn set_event_idx(&self, _enabled: bool) {}

    /// Returns `size` bytes, or none if the range leaves the config space: the front-end takes an
    /// empty reply as an error.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let start = offset as usize;
        let range: Range<usize> = start..start.saturating_add(size as usize);
        self.0.device.config().get(range).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&self, mem: GuestMemory) -> io::Result<()> {
        self.0.memory.table_came();
        self.0.window.table_came(mem.memory().deref());
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: BackendChannel) {
        let life = self.0.life.clone();
        let channel = ShmemMapper::new(backend, move || life.is_started());
        self.0.window.set_channel(channel);
    }

    /// QEMU makes one BAR of all regions, and aborts if its length is no power of two. A second
    /// region, in which nothing is mapped, fills the BAR up to the next power of two.
    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        self.0.window.region_asked();
        let window = self.0.device.window_bytes().0;
        let whole = window.checked_next_power_of_two().unwrap_or(window);
        let regions = if whole == window { 1 } else { 2 };
        Ok(VhostUserShMemConfig::new(regions, &[window, whole - window]))
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        let made = new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC);
        if let Ok((consumer, _)) = &made {
            self.exit_events().push(consumer.as_raw_fd());
        }
        made.inspect_err(|e| error!("can't create an exit event: {e}")).ok()
    }

    /// GET_VRING_BASE: after the reply the back-end must not write the ring. QEMU may drop the maps
    /// without a message (Q10).
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        self.0.life.stop(|| {
            self.0.restarted.store(false, Ordering::SeqCst);
            self.0.window.stopped();
        });
        if let Some(ring) = self.0.rings.get(queue_index as usize) {
            ring.stop();
        }
        Ok(())
    }

    /// A kick; the library also calls this when the ring has become ready and enabled. Never
    /// returns an error: the library would end the ring's thread.
    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // Each library thread has one ring, of the thread's number.
        let vring = vrings.get(usize::from(device_event));
        let (Some(vring), Some(ring)) = (vring, self.0.rings.get(thread_id)) else {
            return Ok(());
        };
        if !self.begin(ring, vring, true) {
            ring.drain();
        }
        Ok(())
    }
}
