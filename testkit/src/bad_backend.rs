// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A back-end that breaks QEMU's rules: the test holds its channel and sends any message at any
//! time. It shows that the strict front-end detects each broken rule.

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::{fs::File, io};

use vhost::vhost_user::message::{
    VhostUserMMap, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Backend, Listener, VhostUserFrontendReqHandler};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringMutex};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

struct Device {
    window_bytes: u64,
    more: VhostUserProtocolFeatures,
    channel: Mutex<Option<Backend>>,
    /// Taken by each memory update. A thread that holds it while it maps causes the deadlock of Q3.
    update_lock: Mutex<()>,
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        crate::strict_vmm::F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        use VhostUserProtocolFeatures as P;
        P::MQ | P::CONFIG | P::BACKEND_REQ | P::BACKEND_SEND_FD | P::SHMEM | self.more
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn get_config(&self, _offset: u32, size: u32) -> Vec<u8> {
        vec![0; size as usize]
    }

    fn update_memory(&self, _mem: Memory) -> io::Result<()> {
        drop(self.update_lock.lock().unwrap());
        Ok(())
    }

    fn set_backend_req_fd(&self, channel: Backend) {
        *self.channel.lock().unwrap() = Some(channel);
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        _vrings: &[Self::Vring],
        _thread: usize,
    ) -> io::Result<()> {
        Ok(())
    }

    fn get_shmem_config(&self) -> io::Result<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(1, &[self.window_bytes]))
    }
}

/// The back-end, under the control of a test.
pub struct BadBackend {
    device: Arc<Device>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl BadBackend {
    /// Listens on a socket in `dir`; offers a window, and the protocol features `more`.
    pub fn new(dir: &Path, window_bytes: u64, more: VhostUserProtocolFeatures) -> Self {
        let path = dir.join("bad.sock");
        let mut listener = Listener::new(&path, true).unwrap();
        let (channel, update_lock) = (Mutex::new(None), Mutex::new(()));
        let device = Arc::new(Device { window_bytes, more, channel, update_lock });
        let theirs = device.clone();
        let thread = thread::spawn(move || {
            let mem = Memory::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("bad".into(), theirs, mem).unwrap();
            daemon.start(&mut listener).unwrap();
            // An error: the front-end disconnects at any point of the protocol.
            let _ = daemon.wait();
        });
        Self { device, path, thread: Some(thread) }
    }

    /// The path of its socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn channel(&self) -> Backend {
        self.device.channel.lock().unwrap().clone().unwrap()
    }

    /// While the guard exists, memory updates are not answered.
    pub fn hold_memory_updates(&self) -> MutexGuard<'_, ()> {
        self.device.update_lock.lock().unwrap()
    }

    /// Sends SHMEM_MAP and waits for the ack.
    pub fn map(&self, file: &File, file_offset: u64, at: u64, bytes: u64) -> io::Result<u64> {
        self.channel().shmem_map(&message(file_offset, at, bytes), file as &dyn AsRawFd)
    }

    /// Sends SHMEM_UNMAP and waits for the ack.
    pub fn unmap(&self, at: u64, bytes: u64) -> io::Result<u64> {
        self.channel().shmem_unmap(&message(0, at, bytes))
    }
}

fn message(fd_offset: u64, shm_offset: u64, len: u64) -> VhostUserMMap {
    VhostUserMMap { shmid: 0, padding: [0; 7], fd_offset, shm_offset, len, flags: 1 }
}

impl Drop for BadBackend {
    fn drop(&mut self) {
        // The front-end has disconnected by now (tests drop it first), or the test is failing.
        if let Some(thread) = self.thread.take()
            && !thread::panicking()
        {
            let _ = thread.join();
        }
    }
}
