// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: what the front-end asks. Knows the device only behind its seam.

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

/// The largest ring that a front-end may ask for (its vq_size).
const MAX_QUEUE_SIZE: usize = 1024;

/// One front-end's use of a device.
#[derive(Clone)]
pub(crate) struct Session(Arc<Inner>);

struct Inner {
    device: Arc<dyn Device>,
    rings: Vec<Arc<Ring>>,
    memory: Memory,
    /// None where no request is served by the thread that takes it, and after the end.
    watchdog: Mutex<Option<Watchdog>>,
    window: Arc<dyn SessionWindow>,
    /// Whether messages about the window may be sent (Q1).
    life: Arc<Life>,
    /// A ring has started afresh since the last stop. Changed in `life`'s steps.
    restarted: AtomicBool,
    /// The device is told of that before any ring goes on.
    restarts: Restarts<Due>,
    /// Why this front-end is turned away; its connection is cut then.
    refusal: OnceLock<String>,
    connection: Mutex<Option<ShutdownHandle>>,
    /// What the library's threads were told to end by: it never closes them (vhost-user-backend
    /// 0.24).
    exit_events: Mutex<Vec<RawFd>>,
}

/// A ring that was started, and whose requests are to be let out.
struct Due {
    ring: Arc<Ring>,
    started: Started,
}

impl Session {
    /// # Errors
    /// The system's: no thread can be started.
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

    /// Gives the session the means to cut its own connection.
    pub(crate) fn connected(&self, handle: ShutdownHandle) {
        *self.connection() = Some(handle);
        self.cut_if_refused();
    }

    /// The connection is gone: whatever is still open is void.
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

    /// The library's threads have ended: closes what it leaves open. Once.
    pub(crate) fn close_exit_events(&self) {
        let events = std::mem::take(&mut *self.exit_events());
        for event in events {
            if let Err(e) = close(event) {
                debug!("an exit event was closed already: {e}");
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

    /// Starts the ring, if it can be, and finds out whether the driver has begun anew. A ring that
    /// was never used does not tell: one of the others does, whose own thread may come later.
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

    /// Starts the ring, if it can be and is not, and lets its requests out, which `serves` says
    /// whether this thread may serve. False if there was nothing to start.
    fn begin(&self, ring: &Arc<Ring>, vring: &Vring, serves: bool) -> bool {
        // Nearly each kick is of a ring that runs: it takes no lock that all rings share.
        if ring.is_started() {
            return false;
        }
        let Some(started) = self.start(ring, vring) else { return false };
        let due = Due { ring: ring.clone(), started };
        let mut due = self.0.restarts.settle(due, || self.0.device.restarted());
        // Its own ring comes last: to serve that may take long.
        due.sort_by_key(|due| Arc::ptr_eq(&due.ring, ring));
        for Due { ring: its, started } in due {
            self.go_on(&its, started, serves && Arc::ptr_eq(&its, ring));
        }
        true
    }

    /// Brings the window up, if it is not, then lets the requests out of the ring.
    fn go_on(&self, ring: &Arc<Ring>, started: Started, serves: bool) {
        // Stopped again at once: then it must not be told; and bring_up() finds out by itself, and
        // so does a ring that goes on although another one was stopped.
        if self.0.life.go_on(|| self.0.window.started(started.start)) == Some(true) {
            debug!("ring {} started", ring.index());
            return ring.release(started.epoch, serves);
        }
        let (session, its) = (self.clone(), ring.clone());
        // A thread of its own: the ack comes only after this session's other threads have
        // answered a memory update (Q3).
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
        // F_VERSION_1 missing or the device's own bits missing: a driver that is too old. The
        // guest sees no region then, so say why.
        let missing = self.0.device.features() & !features;
        if features & (1 << VIRTIO_F_VERSION_1) != 0 && missing != 0 {
            error!(
                "the guest's driver does not know feature bits {missing:#x} \
                 (Linux does since 6.9): it will not find the device's memory"
            );
        }
    }

    /// SHARED_OBJECT only to find out whether the front-end acks (see [`ShmemMapper::probe_acks`]).
    /// No STATUS (the library has none), no RESET_DEVICE (QEMU sends none at a virtio reset).
    /// CONFIGURE_MEM_SLOTS is the device's choice: with it, a reset with a live map kills QEMU
    /// (Q12); without it, a pause with many maps kills the device (Q13).
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

    /// A thread for each ring: one that is served holds up no other.
    fn queues_per_thread(&self) -> Vec<u64> {
        (0..self.0.rings.len()).map(|ring| 1 << ring).collect()
    }

    /// The event index is kept by the library's queue.
    fn set_event_idx(&self, _enabled: bool) {}

    /// Exactly the bytes asked for, or none: the front-end takes none as an error.
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

    /// QEMU makes one BAR of all regions together, and aborts if that is no power of two. So a
    /// second region, which nobody maps, makes up the rest.
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
        made.inspect_err(|e| error!("no exit event: {e}")).ok()
    }

    /// GET_VRING_BASE: the ring is not ours any more, and its maps may be dropped unsaid (Q10).
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

    /// A kick; also called by the library when the ring has become ready and enabled.
    /// Never an error: the library would end the ring's thread.
    fn handle_event(
        &self,
        device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        thread_id: usize,
    ) -> io::Result<()> {
        // Each thread has one ring.
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
