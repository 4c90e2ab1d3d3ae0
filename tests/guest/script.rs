// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A scripted back-end: a virtio-fs device without a file system, which only maps and unmaps. The
//! stock guest's built-in driver starts the device and sends no requests, so the test alone uses
//! the window, at any rate.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;
use vhost::vhost_user::message::{
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend, Listener};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringT};
use vhost_user_dax::device::memory::GuestMemory;
use vhost_user_dax::ring::Vring;
use vhost_user_dax::window::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};
use virtio_queue::QueueT;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The unit in which a guest's driver asks for maps, in bytes.
pub const RANGE: u64 = 2 << 20;
/// Size of the window in bytes.
pub const WINDOW: u64 = 128 << 20;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// The high-priority queue and one request queue.
const QUEUES: usize = 2;
const CONFIG_BYTES: usize = 44;
/// Time limit that tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(60);

/// Makes the mapper under test, from the back-end channel and the question "is the device
/// started?".
pub type MakeMapper = fn(Backend, Box<dyn Fn() -> bool + Send + Sync>) -> Arc<dyn Mapper>;

struct Device {
    make: MakeMapper,
    vrings: Arc<Mutex<Vec<Vring>>>,
    mapper: Mutex<Option<Arc<dyn Mapper>>>,
    mapper_set: Condvar,
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as P;
        P::MQ
            | P::CONFIG
            | P::BACKEND_REQ
            | P::BACKEND_SEND_FD
            | P::REPLY_ACK
            | P::SHMEM
            | P::SHARED_OBJECT
            | P::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = [0; CONFIG_BYTES];
        config[..6].copy_from_slice(b"script");
        config[36] = 1; // num_request_queues
        config[offset as usize..(offset + size) as usize].to_vec()
    }

    fn update_memory(&self, _mem: GuestMemory) -> io::Result<()> {
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        let vrings = self.vrings.clone();
        // GET_VRING_BASE makes a ring unready before it is answered; SET_VRING_KICK makes the ring
        // ready.
        let started = move || {
            let vrings = vrings.lock().unwrap();
            !vrings.is_empty() && vrings.iter().all(|vring| vring.get_ref().get_queue().ready())
        };
        *self.mapper.lock().unwrap() = Some((self.make)(channel, Box::new(started)));
        self.mapper_set.notify_all();
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[WINDOW]))
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        vrings: &[Vring],
        _thread: usize,
    ) -> io::Result<()> {
        *self.vrings.lock().unwrap() = vrings.to_vec();
        Ok(())
    }
}

/// The back-end; a thread serves one VM.
pub struct Script {
    device: Arc<Device>,
    file: File,
    socket: PathBuf,
    _folder: TempDir,
    _serving: JoinHandle<()>,
}

impl Script {
    pub fn start(make: MakeMapper) -> Self {
        let folder = TempDir::new().unwrap();
        let socket = folder.path().join("script");
        let file = tempfile::tempfile().unwrap();
        file.set_len(WINDOW).unwrap();
        let (vrings, mapper) = (Arc::default(), Mutex::new(None));
        let device = Arc::new(Device { make, vrings, mapper, mapper_set: Condvar::new() });
        let mut listener = Listener::new(&socket, true).unwrap();
        let shared_device = device.clone();
        let serving = thread::spawn(move || {
            let mem = GuestMemory::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("script".into(), shared_device, mem).unwrap();
            daemon.start(&mut listener).unwrap();
            // QEMU closes the connection at its end, at any point of the protocol.
            let _ = daemon.wait();
        });
        Self { device, file, socket, _folder: folder, _serving: serving }
    }

    /// QEMU's arguments for the device.
    pub fn qemu_arguments(&self) -> Vec<String> {
        vec![
            "-chardev".into(),
            format!("socket,id=script,path={}", Path::display(&self.socket)),
            "-device".into(),
            format!(
                "vhost-user-test-device-pci,chardev=script,virtio-id=26,num_vqs={QUEUES},\
                 vq_size=128,config_size={CONFIG_BYTES}"
            ),
        ]
    }

    /// Waits until QEMU has handed over the back-end channel, and returns the mapper.
    pub fn mapper(&self) -> Arc<dyn Mapper> {
        let guard = self.device.mapper.lock().unwrap();
        let mapper =
            self.device.mapper_set.wait_timeout_while(guard, HANG, |mapper| mapper.is_none());
        mapper.unwrap().0.clone().expect("QEMU sent no back-end channel")
    }

    /// Maps range `i` of the file to range `i` of the window.
    pub fn map(&self, mapper: &dyn Mapper, i: u64) -> Result<(), MapError> {
        mapper.map(WindowOffset(i * RANGE), &self.file, FileOffset(i * RANGE), WindowBytes(RANGE))
    }

    pub fn unmap(&self, mapper: &dyn Mapper, i: u64) -> Result<(), MapError> {
        mapper.unmap(WindowOffset(i * RANGE), WindowBytes(RANGE))
    }
}
