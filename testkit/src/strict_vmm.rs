// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end that keeps QEMU's rules, and fails the test where QEMU would crash, abort or hang.
//!
//! It sends by vhost's real `Frontend`, and receives by `Channel`. QEMU's one big lock is
//! [`Shared::bql`]: an action of the guest or of QMP (start, stop, reset) and a request of the
//! back-end (SHMEM_MAP, SHMEM_UNMAP) never run at the same time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, VolatileSlice};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::HANG;
use crate::channel::Channel;
use crate::driver::{Driver, DriverOptions};
pub use crate::handshake::Offer;
use crate::handshake::{get_config, negotiate, set_up_ring};
use crate::machine::{CallError, Machine, Misbehaviour, Region, SharedMachine};
use crate::memory::GuestMem;
use crate::watchdog::Watchdog;

/// VHOST_USER_F_PROTOCOL_FEATURES.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_INDIRECT_DESC.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_PMEM_F_SHMEM_REGION.
pub const F_SHMEM_REGION: u64 = 1;
/// The configuration of the front-end and its guest.
pub struct VmmOptions {
    /// Protocol features that this front-end does not support.
    pub lacks: VhostUserProtocolFeatures,
    /// Time after which a missing reply counts as a deadlock.
    pub reply_deadline: Duration,
    /// `num_vqs` on QEMU's command line.
    pub queues: usize,
    /// `config_size` on QEMU's command line.
    pub config_bytes: u32,
    /// The device's own feature bits that the guest's driver supports.
    pub device_features: u64,
}

impl Default for VmmOptions {
    fn default() -> Self {
        Self {
            lacks: VhostUserProtocolFeatures::empty(),
            // Shorter than HANG, so that the test reports the deadlock before a wait ends.
            reply_deadline: HANG / 2,
            queues: 1,
            config_bytes: 16,
            device_features: F_SHMEM_REGION,
        }
    }
}

/// A virtqueue's driver, as the front-end sees it.
pub trait Ring {
    /// The features that the driver negotiates, and the queue's size.
    fn options(&self) -> DriverOptions;
    /// Host addresses of descriptor table, available ring and used ring.
    fn host_addresses(&self) -> [u64; 3];
    /// Creates a new kick for a new start.
    fn fresh_kick(&mut self) -> EventFd;
    /// The call that the driver waits for.
    fn call(&self) -> EventFd;
}

struct Shared {
    bql: Mutex<Channel>,
    machine: Arc<SharedMachine>,
}

impl Shared {
    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.machine.lock().unwrap()
    }
}

/// The front-end.
pub struct StrictVmm {
    shared: Arc<Shared>,
    main: UnixStream,
    offer: Offer,
    acked: VhostUserProtocolFeatures,
    bases: Vec<u16>,
    device_features: u64,
    /// Gets the calls while the guest has masked them.
    masked: EventFd,
    quit: EventFd,
    main_loop: Option<JoinHandle<()>>,
}

fn regions_of(ram: &GuestMem) -> Vec<Region> {
    ram.iter()
        .map(|r| Region {
            guest: r.start_addr().raw_value(),
            bytes: r.len(),
            host: r.as_ptr() as u64,
            fd_offset: 0,
            fd: r.file_offset().unwrap().file().as_raw_fd(),
        })
        .collect()
}

impl StrictVmm {
    /// Connects and negotiates in QEMU's order, up to the point where the guest boots.
    pub fn connect(path: &Path, ram: &GuestMem, options: VmmOptions) -> Result<Self, CallError> {
        let main = UnixStream::connect(path).unwrap();
        let frontend = Frontend::from_stream(main.try_clone().unwrap(), options.queues as u64);
        let watchdog = Watchdog::new(main.try_clone().unwrap());
        let machine = Machine::new(frontend, watchdog, options.reply_deadline, regions_of(ram));
        let machine =
            Arc::new(SharedMachine { machine: Mutex::new(machine), served: Condvar::new() });

        let mut channel = Channel::new(machine.clone(), options.reply_deadline);
        let masked = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (offer, acked) = {
            let mut machine = machine.machine.lock().unwrap();
            let (offer, acked) = negotiate(&mut machine, &mut channel, &options)?;
            for queue in 0..options.queues {
                machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(queue, &masked))?;
            }
            machine.slots = acked.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
            machine.window_bytes = offer.windows.first().copied().unwrap_or(0);
            (offer, acked)
        };
        let shared = Arc::new(Shared { bql: Mutex::new(channel), machine });
        let quit = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let main_loop = Some(spawn_main_loop(&shared, &quit));
        let (bases, device_features) = (vec![0; options.queues], options.device_features);
        Ok(Self { shared, main, offer, acked, bases, device_features, masked, quit, main_loop })
    }

    /// The features and sizes that the back-end offered.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// Starts the device, as at DRIVER_OK or QMP `cont`. `Err` is QEMU's error number.
    pub fn try_start(&mut self, driver: &mut Driver) -> Result<(), i32> {
        self.try_start_all(&mut [driver])
    }

    /// Starts the device with one driver per queue. `Err` is QEMU's error number.
    pub fn try_start_all(&mut self, rings: &mut [&mut dyn Ring]) -> Result<(), i32> {
        self.try_set_up_all(rings)?;
        (0..rings.len()).try_for_each(|i| self.try_enable(i))
    }

    /// The first part of a start: sets up all rings, and enables none.
    pub fn try_set_up_all(&mut self, rings: &mut [&mut dyn Ring]) -> Result<(), i32> {
        self.check();
        let mut bql = self.shared.bql.lock().unwrap();
        if !self.shared.machine().misbehaviour.deaf {
            bql.serve_pending();
        }
        let mut machine = self.shared.machine();
        assert!(!machine.started, "the test starts a started device");
        assert_eq!(rings.len(), self.bases.len(), "the test starts some of the queues");
        machine.in_flight = false;
        let features = self.wanted_features(rings[0].options());
        let proto = |e: CallError| {
            eprintln!("start: {e:?}");
            libc::EPROTO
        };
        // Guest notifiers are unmasked before the device starts.
        for (i, ring) in rings.iter().enumerate() {
            let call = ring.call();
            machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(i, &call)).map_err(proto)?;
        }
        machine.call("SET_FEATURES", false, |f| f.set_features(features)).map_err(proto)?;
        machine.send_regions_at_start()?;
        for (i, ring) in rings.iter_mut().enumerate() {
            set_up_ring(&mut machine, i, *ring, self.bases[i]).map_err(proto)?;
        }
        Ok(())
    }

    /// The second part of a start: enables one ring.
    pub fn try_enable(&mut self, ring: usize) -> Result<(), i32> {
        let _bql = self.shared.bql.lock().unwrap();
        let mut machine = self.shared.machine();
        let reply = machine.call("SET_VRING_ENABLE", true, |f| f.set_vring_enable(ring, true));
        machine.started = true;
        reply.map_err(|e| {
            eprintln!("start: {e:?}");
            libc::EPROTO
        })
    }

    /// Starts the device; the start must succeed.
    pub fn start(&mut self, driver: &mut Driver) {
        self.start_all(&mut [driver]);
    }

    /// Starts the device with one driver per queue; the start must succeed.
    pub fn start_all(&mut self, rings: &mut [&mut dyn Ring]) {
        let started = self.try_start_all(rings);
        self.check();
        assert_eq!(started, Ok(()), "the start failed");
    }

    fn wanted_features(&self, driver: DriverOptions) -> u64 {
        let mut wanted = F_PROTOCOL_FEATURES | F_VERSION_1 | self.device_features;
        if driver.event_idx {
            wanted |= F_EVENT_IDX;
        }
        if driver.indirect {
            wanted |= F_INDIRECT_DESC;
        }
        wanted & self.offer.features
    }

    /// QMP `stop`, or the first part of a reset: stops the rings; the maps stay.
    pub fn stop(&mut self) {
        self.check();
        let mut bql = self.shared.bql.lock().unwrap();
        // QEMU's main loop serves the requests that have arrived in the turn before the stop.
        bql.serve_pending();
        let mut machine = self.shared.machine();
        assert!(machine.started, "the test stops a stopped device");
        let queues = 0..self.bases.len();
        let mut replies = Vec::new();
        for i in queues.clone() {
            replies
                .push(machine.call("SET_VRING_ENABLE 0", true, |f| f.set_vring_enable(i, false)));
        }
        let bases: Vec<_> = queues
            .clone()
            .map(|i| machine.call("GET_VRING_BASE", false, |f| f.get_vring_base(i)))
            .collect();
        machine.started = false;
        for i in queues {
            let masked = &self.masked;
            replies.push(machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(i, masked)));
        }
        // A request that is in the channel now was sent in time, but QEMU would read it after the
        // stop.
        machine.in_flight = bql.has_request();
        drop(machine);
        drop(bql);
        self.check();
        assert!(replies.iter().all(Result::is_ok), "the stop failed: {replies:?}");
        self.bases = bases.into_iter().map(|base| base.unwrap() as u16).collect();
    }

    /// A virtio reset: stops the device if it is started, and drops the maps without a message. The
    /// driver's rings are new.
    pub fn reset(&mut self) {
        if self.shared.machine().started {
            self.stop();
        }
        let mut bql = self.shared.bql.lock().unwrap();
        bql.serve_pending();
        self.shared.machine().drop_maps();
        self.bases.fill(0);
    }

    /// A reboot, or a new bind of the guest's driver: two resets, new rings, a start.
    pub fn reboot(&mut self, driver: &mut Driver) {
        self.reset();
        self.reset();
        driver.reset(driver.options());
        self.start(driver);
    }

    /// The available index that GET_VRING_BASE returned for the first queue at the last stop.
    pub fn base(&self) -> u16 {
        self.bases[0]
    }

    // --- other messages ---

    /// GET_CONFIG, as QEMU sends it when the guest reads the config space.
    pub fn get_config(&mut self) -> Vec<u8> {
        let _bql = self.shared.bql.lock().unwrap();
        let bytes = self.offer.config.len() as u32;
        get_config(&mut self.shared.machine(), bytes).unwrap()
    }

    /// Sends a memory update whose cause is outside the device.
    pub fn update_memory(&mut self) -> Result<(), CallError> {
        let _bql = self.shared.bql.lock().unwrap();
        self.shared.machine().send_regions()
    }

    /// Changes the fields of `Misbehaviour`.
    pub(super) fn bend(&mut self, how: impl FnOnce(&mut Misbehaviour)) {
        how(&mut self.shared.machine().misbehaviour);
    }

    /// Whether every SHMEM_MAP fails.
    pub fn refuse_maps(&mut self, refuse: bool) {
        self.bend(|b| b.refuse_maps = refuse);
    }

    /// Omits live maps from the memory table at the start. `tell_before_refusing`: sends the
    /// complete table just before it refuses an overlapping map.
    pub fn hide_maps_at_start(&mut self, tell_before_refusing: bool) {
        self.bend(|b| {
            (b.hide_maps_at_start, b.tell_before_refusing) = (true, tell_before_refusing)
        });
    }

    /// Whether the rings' RAM region is omitted from the memory table.
    pub fn hide_rings(&mut self, hide: bool) {
        self.bend(|b| b.hide_rings = hide);
    }

    /// From now on a reset keeps the maps, as in crosvm.
    pub fn keep_maps(&mut self) {
        self.bend(|b| b.keep_maps = true);
    }

    /// The guest moves the BAR by 4 GiB.
    pub fn move_window(&mut self) {
        self.bend(|b| b.moved += 1 << 32);
    }

    /// From now on the back-end channel is not read.
    pub fn turn_deaf(&mut self) {
        self.bend(|b| b.deaf = true);
    }

    /// From now on a SHMEM_MAP is read, and neither done nor answered.
    pub fn hang_in_map(&mut self) {
        self.bend(|b| b.hang_in_map = true);
    }

    /// Whether a start follows a reset so soon that the regions freed by the reset still exist
    /// (Q12).
    pub fn start_at_once(&mut self, at_once: bool) {
        self.bend(|b| b.start_at_once = at_once);
    }

    /// Like [`start_at_once`](Self::start_at_once); that start sends no memory message.
    pub fn start_untold(&mut self) {
        self.bend(|b| (b.start_at_once, b.start_untold) = (true, true));
    }

    /// Waits until the back-end channel contains an unread request.
    pub fn wait_unread(&self) {
        crate::eventually("a request", || self.shared.bql.lock().unwrap().has_request());
    }

    /// Shuts the main connection down; the back-end channel stays open.
    pub fn hang_up(&self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
    }

    /// The back-end's end of the back-end channel, for messages that no library sends.
    pub fn play_back_end(&self) -> UnixStream {
        self.shared.bql.lock().unwrap().play_back_end()
    }

    // --- state for assertions ---

    /// Waits until `n` maps are live.
    pub fn wait_live(&self, n: usize) {
        self.wait("live maps", |m| m.live_maps() == n);
    }

    /// Waits until the back-end has sent `n` SHMEM_MAP requests since the connection.
    pub fn wait_map_requests(&self, n: usize) {
        self.wait("map requests", |m| m.map_requests >= n);
    }

    fn wait(&self, what: &str, done: impl Fn(&Machine) -> bool) {
        let served = &self.shared.machine.served;
        let guard = self.shared.machine();
        let stop = |m: &mut Machine| !done(m) && m.violations.is_empty();
        let (machine, timeout) = served.wait_timeout_while(guard, HANG, stop).unwrap();
        let seen = (machine.live_maps(), machine.map_requests, machine.refused.clone());
        drop(machine);
        self.check();
        assert!(!timeout.timed_out(), "hang: waited for {what}; live, requests, refused: {seen:?}");
    }

    /// The number of live maps.
    pub fn live_maps(&self) -> usize {
        self.shared.machine().live_maps()
    }

    /// The number of SHMEM_MAP requests so far, including refused ones.
    pub fn map_requests(&self) -> usize {
        self.shared.machine().map_requests
    }

    /// The number of SHMEM_UNMAP requests so far, including refused ones.
    pub fn unmap_requests(&self) -> usize {
        self.shared.machine().unmap_requests
    }

    /// The number of memory updates so far.
    pub fn table_updates(&self) -> usize {
        self.shared.machine().table_updates
    }

    /// The number of memory messages so far: see `Machine::memory_messages`.
    pub fn memory_messages(&self) -> usize {
        self.shared.machine().memory_messages
    }

    /// The number of requests so far that this front-end does not know.
    pub fn unknown_requests(&self) -> usize {
        self.shared.machine().unknown_requests
    }

    /// The largest number of regions so far: live maps and RAM regions.
    pub fn most_regions(&self) -> usize {
        self.shared.machine().most_regions
    }

    /// Whether a map covers the byte at window offset `at`.
    pub fn is_mapped(&self, at: u64) -> bool {
        self.shared.machine().is_mapped(at)
    }

    /// The number of bytes of the window that maps cover.
    pub fn mapped_bytes(&self) -> u64 {
        self.shared.machine().mapped_bytes()
    }

    /// The refused requests, each with the number of its rule in docs/front-ends.md.
    pub fn refused(&self) -> Vec<String> {
        self.shared.machine().refused.clone()
    }

    /// The negotiated protocol features.
    pub fn acked(&self) -> VhostUserProtocolFeatures {
        self.acked
    }

    /// Stores to the window as the guest does; false if a byte is not mapped.
    #[must_use]
    pub fn store(&self, at: u64, bytes: &[u8]) -> bool {
        self.shared.machine().store(at, bytes)
    }

    /// Loads from the window as the guest does; `None` if a byte is not mapped.
    pub fn fetch(&self, at: u64, bytes: usize) -> Option<Vec<u8>> {
        self.shared.machine().fetch(at, bytes)
    }

    /// Runs `work` on `bytes` bytes of the window from `at` on, without a copy. One map must cover
    /// them.
    pub fn view<T>(&self, at: u64, bytes: usize, work: impl FnOnce(VolatileSlice<'_>) -> T) -> T {
        work(self.shared.machine().view(at, bytes))
    }

    /// The time that this front-end has spent on requests of the back-end so far, up to their
    /// replies.
    pub fn spent(&self) -> Duration {
        self.shared.machine().spent
    }

    /// Panics if the back-end has broken a rule of QEMU.
    pub fn check(&self) {
        let violations = self.shared.machine().violations.clone();
        assert!(violations.is_empty(), "the back-end broke QEMU's rules: {violations:#?}");
    }

    /// Returns and clears the list of broken rules. For tests of this front-end.
    pub fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.machine().violations)
    }

    /// Shuts both connections down without a stop, as a killed QEMU does.
    pub fn kill(&self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        let bql = self.shared.bql.lock().unwrap();
        bql.cut();
    }
}

impl Drop for StrictVmm {
    fn drop(&mut self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        let _ = self.quit.write(1);
        self.bend(|b| b.hang_in_map = false);
        self.shared.machine.served.notify_all();
        if let Some(main_loop) = self.main_loop.take() {
            let _ = main_loop.join();
        }
        if let Ok(bql) = self.shared.bql.lock() {
            bql.cut();
        }
        if !thread::panicking() {
            self.check();
        }
    }
}

/// QEMU's main loop: waits without the big lock, and serves requests under it.
fn spawn_main_loop(shared: &Arc<Shared>, quit: &EventFd) -> JoinHandle<()> {
    let epoll = Epoll::new().unwrap();
    let channel = shared.bql.lock().unwrap().as_raw_fd();
    for (fd, data) in [(channel, 0), (quit.as_raw_fd(), 1)] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data)).unwrap();
    }
    let shared = shared.clone();
    thread::spawn(move || {
        let mut events = [EpollEvent::default(); 2];
        loop {
            let Ok(n) = epoll.wait(-1, &mut events) else { continue };
            let woke = Instant::now();
            let mut bql = shared.bql.lock().unwrap();
            let deaf = shared.machine().misbehaviour.deaf;
            if deaf {
                // From now on the thread waits only for the end: a deaf front-end reads no request
                // any more.
                let _ = epoll.ctl(ControlOperation::Delete, channel, EpollEvent::default());
            } else {
                bql.serve_since(woke);
            }
            if bql.broken || events.iter().take(n).any(|e| e.data() == 1) {
                return;
            }
        }
    })
}

/// Bytes of a file, read on the host.
pub fn file_bytes(file: &File, at: u64, bytes: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; bytes];
    file.read_exact_at(&mut buffer, at).unwrap();
    buffer
}
