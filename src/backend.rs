// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: what the front-end asks. Knows the device only behind its seam.

use std::io;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::Builder;

use log::{debug, error, info};
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

use crate::device::Device;
use crate::vring::{Epoch, GuestMemory, Ring, Vring};
use crate::window::{MapError, ShmemMapper, WholeFile};

/// The largest ring that a front-end may ask for (its vq_size).
const MAX_QUEUE_SIZE: usize = 1024;

/// What to use instead of a front-end that can't do it.
const USE_INSTEAD: &str = "use QEMU 11.1 or newer with -device \
     vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16";

/// One front-end's use of a device.
#[derive(Clone)]
pub(crate) struct Session(Arc<Inner>);

struct Inner {
    device: Arc<dyn Device>,
    ring: Arc<Ring>,
    window: Arc<WholeFile>,
    /// Why this front-end is turned away; its connection is cut then.
    refusal: OnceLock<String>,
    connection: Mutex<Option<ShutdownHandle>>,
}

impl Session {
    pub(crate) fn new(device: Arc<dyn Device>, mem: GuestMemory) -> Self {
        let window = WholeFile::new(device.window_file().clone(), device.window_bytes());
        Self(Arc::new(Inner {
            ring: Ring::new(device.clone(), mem),
            device,
            window: Arc::new(window),
            refusal: OnceLock::new(),
            connection: Mutex::new(None),
        }))
    }

    /// Gives the session the means to cut its own connection.
    pub(crate) fn connected(&self, handle: ShutdownHandle) {
        *self.connection() = Some(handle);
        self.cut_if_refused();
    }

    /// The connection is gone: whatever is still open is void.
    pub(crate) fn end(&self) -> Option<String> {
        *self.connection() = None;
        self.0.ring.stop();
        self.0.device.session_ended();
        self.0.refusal.get().cloned()
    }

    fn connection(&self) -> std::sync::MutexGuard<'_, Option<ShutdownHandle>> {
        self.0.connection.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn refuse(&self, lacks: &str) {
        let line = format!("the front-end lacks {lacks}; {USE_INSTEAD}");
        let _ = self.0.refusal.set(line);
        self.cut_if_refused();
    }

    fn cut_if_refused(&self) {
        if let (Some(_), Some(handle)) = (self.0.refusal.get(), &*self.connection()) {
            handle.shutdown();
        }
    }

    /// The device was started: bring the window up, then let the requests out of the ring.
    fn started(&self, epoch: Epoch) {
        if self.0.window.is_shown() {
            // Q10: it outlived a pause. A map would be refused, and would be a message under way
            // that a quick second pause turns into a crash of QEMU (Q1).
            debug!("started; the window is still mapped");
            return self.0.ring.release(epoch);
        }
        let session = self.clone();
        // A thread of its own: the ack comes only after this session's other threads have
        // answered a memory update (Q3).
        let spawned = Builder::new().name("window".into()).spawn(move || session.map(epoch));
        if let Err(e) = spawned {
            error!("can't start the window thread: {e}");
            self.0.ring.release_without_window(epoch);
        }
    }

    fn map(&self, epoch: Epoch) {
        match self.0.device.map_window(self.0.window.clone()) {
            Ok(()) => {
                info!("started; the window is mapped");
                self.0.ring.release(epoch);
            }
            Err(MapError::Stopped) => debug!("stopped before the window was mapped"),
            Err(MapError::Unsupported(what)) => self.refuse(what),
            Err(e) => {
                error!("the window can't be mapped: {e}; every flush will fail");
                self.0.ring.release_without_window(epoch);
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
        1
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
    /// No STATUS (the library has none), no RESET_DEVICE (QEMU sends none at a virtio reset), and
    /// no CONFIGURE_MEM_SLOTS: with it, a reset with a live map kills QEMU (Q12).
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::BACKEND_SEND_FD
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::SHMEM
            | VhostUserProtocolFeatures::SHARED_OBJECT
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
        self.0.window.table_came(mem.memory().deref());
        Ok(())
    }

    fn set_backend_req_fd(&self, backend: BackendChannel) {
        let ring = self.0.ring.clone();
        self.0.window.set_channel(ShmemMapper::new(backend, move || ring.is_started()));
        // Long before the first start, so that the first map need not wait for the answer.
        let session = self.clone();
        let asked = Builder::new().name("acks".into()).spawn(move || session.0.window.acks());
        if let Err(e) = asked {
            debug!("can't ask ahead whether the front-end acks: {e}");
        }
    }

    /// QEMU makes one BAR of all regions together, and aborts if that is no power of two. So a
    /// second region, which nobody maps, makes up the rest.
    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        let window = self.0.device.window_bytes().0;
        let whole = window.checked_next_power_of_two().unwrap_or(window);
        let regions = if whole == window { 1 } else { 2 };
        Ok(VhostUserShMemConfig::new(regions, &[window, whole - window]))
    }

    fn exit_event(&self, _thread_index: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC)
            .inspect_err(|e| error!("no exit event: {e}"))
            .ok()
    }

    /// GET_VRING_BASE: the ring is not ours any more, and its maps may be dropped unsaid (Q10).
    fn stop_vring(&self, _queue_index: u32) -> io::Result<()> {
        self.0.ring.stop();
        self.0.window.stopped();
        Ok(())
    }

    /// A kick; also called by the library when the ring has become ready and enabled.
    /// Never an error: the library would end the ring's thread.
    fn handle_event(
        &self,
        _device_event: u16,
        _evset: EventSet,
        vrings: &[Vring],
        _thread_id: usize,
    ) -> io::Result<()> {
        let Some(vring) = vrings.first() else { return Ok(()) };
        match self.0.ring.start(vring) {
            Some(epoch) => self.started(epoch),
            None => self.0.ring.drain(),
        }
        Ok(())
    }
}
