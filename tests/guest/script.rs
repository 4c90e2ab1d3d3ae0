// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A scripted back-end: a virtio-fs device without a file system, of which only the window works. A
//! stock guest's built-in driver starts it and then leaves it alone, so the test has the window for
//! itself, as busy as it likes.

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

/// What a guest's driver asks for at a time.
pub const RANGE: u64 = 2 << 20;
/// The window.
pub const WINDOW: u64 = 128 << 20;

const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// high priority, request
const QUEUES: usize = 2;
const CONFIG_BYTES: usize = 44;
/// Only tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(60);

/// Makes the mapper under test of the channel and of "is the device started?".
pub type MakeMapper = fn(Backend, Box<dyn Fn() -> bool + Send + Sync>) -> Arc<dyn Mapper>;

struct Device {
    make: MakeMapper,
    vrings: Arc<Mutex<Vec<Vring>>>,
    mapper: Mutex<Option<Arc<dyn Mapper>>>,
    came: Condvar,
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
        // GET_VRING_BASE makes a ring unready before it is answered; SET_VRING_KICK makes it ready.
        let started = move || {
            let vrings = vrings.lock().unwrap();
            !vrings.is_empty() && vrings.iter().all(|vring| vring.get_ref().get_queue().ready())
        };
        *self.mapper.lock().unwrap() = Some((self.make)(channel, Box::new(started)));
        self.came.notify_all();
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

/// The back-end, serving one VM in a thread.
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
        let device = Arc::new(Device { make, vrings, mapper, came: Condvar::new() });
        let mut listener = Listener::new(&socket, true).unwrap();
        let theirs = device.clone();
        let serving = thread::spawn(move || {
            let mem = GuestMemory::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("script".into(), theirs, mem).unwrap();
            daemon.start(&mut listener).unwrap();
            // QEMU hangs up at the end, in the middle of anything.
            let _ = daemon.wait();
        });
        Self { device, file, socket, _folder: folder, _serving: serving }
    }

    /// What QEMU needs to have the device.
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

    /// The mapper, as soon as there is a front-end.
    pub fn mapper(&self) -> Arc<dyn Mapper> {
        let guard = self.device.mapper.lock().unwrap();
        let came = self.device.came.wait_timeout_while(guard, HANG, |mapper| mapper.is_none());
        came.unwrap().0.clone().expect("QEMU gave us a back-end channel")
    }

    /// Shows range `i` of the file in range `i` of the window.
    pub fn map(&self, mapper: &dyn Mapper, i: u64) -> Result<(), MapError> {
        mapper.map(WindowOffset(i * RANGE), &self.file, FileOffset(i * RANGE), WindowBytes(RANGE))
    }

    pub fn unmap(&self, mapper: &dyn Mapper, i: u64) -> Result<(), MapError> {
        mapper.unmap(WindowOffset(i * RANGE), WindowBytes(RANGE))
    }
}
