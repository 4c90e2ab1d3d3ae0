// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end that keeps QEMU's rules, and fails the test where QEMU would crash, abort or hang.
//!
//! It speaks through vhost's real `Frontend` and `FrontendReqHandler`. QEMU's one big lock is
//! [`Shared::bql`]: an action of the guest or of QMP (start, stop, reset) and a request of the
//! back-end (SHMEM_MAP, SHMEM_UNMAP) never run at the same time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::socket::{Shutdown, shutdown};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{
    Error as WireError, Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserProtocolFeatures,
};
use vhost::{VhostBackend, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::HANG;
use super::driver::Driver;
use super::machine::{Bends, CallError, ChannelHandler, Machine, Region, SharedMachine};
use super::memory::GuestMem;
use super::watchdog::Watchdog;

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
/// `config_size` on QEMU's command line.
const CONFIG_BYTES: u32 = 16;

/// How the front-end behaves.
pub struct VmmOptions {
    /// Protocol features that this front-end does not know.
    pub lacks: VhostUserProtocolFeatures,
    /// How long an answer may take before it counts as a deadlock.
    pub reply_deadline: Duration,
}

impl Default for VmmOptions {
    fn default() -> Self {
        // Shorter than HANG: the deadlock is reported, not the hang that follows from it.
        Self { lacks: VhostUserProtocolFeatures::empty(), reply_deadline: HANG / 2 }
    }
}

/// What the back-end said while it was set up.
#[derive(Debug, Clone)]
pub struct Offer {
    /// Virtio features.
    pub features: u64,
    /// vhost-user protocol features.
    pub protocol: VhostUserProtocolFeatures,
    /// GET_QUEUE_NUM.
    pub queues: u64,
    /// The config space.
    pub config: Vec<u8>,
    /// The shared memory regions' sizes.
    pub windows: Vec<u64>,
}

struct Channel {
    handler: FrontendReqHandler<ChannelHandler>,
    readable: Epoll,
    broken: bool,
}

impl Channel {
    fn has_request(&self) -> bool {
        let mut events = [EpollEvent::default()];
        !self.broken && self.readable.wait(0, &mut events).is_ok_and(|n| n > 0)
    }

    /// Serves what is already in the channel, as QEMU's main loop does in one turn.
    fn serve_pending(&mut self) {
        while self.has_request() {
            use WireError::{Disconnected, PartialMessage, SocketBroken};
            let result = self.handler.handle_request();
            self.broken = matches!(result, Err(Disconnected | PartialMessage | SocketBroken(_)));
        }
    }
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
    base: u16,
    /// Where calls go that the guest has masked.
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
        let frontend = Frontend::from_stream(main.try_clone().unwrap(), 1);
        let watchdog = Watchdog::new(main.try_clone().unwrap());
        let machine = Machine::new(frontend, watchdog, options.reply_deadline, regions_of(ram));
        let machine =
            Arc::new(SharedMachine { machine: Mutex::new(machine), served: Condvar::new() });

        let handler = FrontendReqHandler::new(Arc::new(ChannelHandler(machine.clone()))).unwrap();
        let readable = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        readable.ctl(ControlOperation::Add, handler.as_raw_fd(), event).unwrap();
        let mut channel = Channel { handler, readable, broken: false };

        let masked = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let (offer, acked) = {
            let mut machine = machine.machine.lock().unwrap();
            let (offer, acked) = negotiate(&mut machine, &mut channel, options.lacks)?;
            machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(0, &masked))?;
            machine.slots = acked.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
            machine.window_bytes = offer.windows.first().copied().unwrap_or(0);
            (offer, acked)
        };
        let shared = Arc::new(Shared { bql: Mutex::new(channel), machine });
        let quit = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let main_loop = Some(spawn_main_loop(&shared, &quit));
        Ok(Self { shared, main, offer, acked, base: 0, masked, quit, main_loop })
    }

    /// What the back-end offered.
    pub fn offer(&self) -> &Offer {
        &self.offer
    }

    /// The guest's driver is ready (DRIVER_OK), or QMP `cont`. `Err` is QEMU's error number.
    pub fn try_start(&mut self, driver: &mut Driver) -> Result<(), i32> {
        self.check();
        let mut bql = self.shared.bql.lock().unwrap();
        bql.serve_pending();
        let mut machine = self.shared.machine();
        assert!(!machine.started, "the test starts a started device");
        (machine.in_flight, machine.may_cross) = (false, false);
        let features = self.wanted_features(driver);
        let call = driver.call();
        let proto = |e: CallError| {
            eprintln!("start: {e:?}");
            libc::EPROTO
        };
        // Guest notifiers are unmasked before the device starts.
        machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(0, &call)).map_err(proto)?;
        machine.call("SET_FEATURES", false, |f| f.set_features(features)).map_err(proto)?;
        machine.tell_regions_at_start()?;
        let (num, base) = (driver.options().size, self.base);
        machine.call("SET_VRING_NUM", false, |f| f.set_vring_num(0, num)).map_err(proto)?;
        machine.call("SET_VRING_BASE", false, |f| f.set_vring_base(0, base)).map_err(proto)?;
        let rings = ring_addresses(driver);
        machine.call("SET_VRING_ADDR", true, |f| f.set_vring_addr(0, &rings)).map_err(proto)?;
        let kick = driver.fresh_kick();
        machine.call("SET_VRING_KICK", false, |f| f.set_vring_kick(0, &kick)).map_err(proto)?;
        machine.call("SET_VRING_ENABLE", true, |f| f.set_vring_enable(0, true)).map_err(proto)?;
        machine.started = true;
        Ok(())
    }

    /// A start that must succeed.
    pub fn start(&mut self, driver: &mut Driver) {
        let started = self.try_start(driver);
        self.check();
        assert_eq!(started, Ok(()), "the start failed");
    }

    fn wanted_features(&self, driver: &Driver) -> u64 {
        let mut wanted = F_PROTOCOL_FEATURES | F_VERSION_1 | F_SHMEM_REGION;
        if driver.options().event_idx {
            wanted |= F_EVENT_IDX;
        }
        if driver.options().indirect {
            wanted |= F_INDIRECT_DESC;
        }
        wanted & self.offer.features
    }

    /// QMP `stop`, or the first half of a reset: the rings stop, the maps stay.
    pub fn stop(&mut self) {
        self.check();
        let mut bql = self.shared.bql.lock().unwrap();
        // QEMU's main loop serves what is readable in the turn that comes before.
        bql.serve_pending();
        let mut machine = self.shared.machine();
        assert!(machine.started, "the test stops a stopped device");
        let disabled = machine.call("SET_VRING_ENABLE 0", true, |f| f.set_vring_enable(0, false));
        let base = machine.call("GET_VRING_BASE", false, |f| f.get_vring_base(0));
        machine.started = false;
        let masked = machine.call("SET_VRING_CALL", false, |f| f.set_vring_call(0, &self.masked));
        // What is in the channel now was sent in time, but will be read too late.
        (machine.in_flight, machine.may_cross) = (bql.has_request(), true);
        drop(machine);
        drop(bql);
        self.check();
        assert_eq!((disabled, masked), (Ok(()), Ok(())));
        self.base = base.unwrap() as u16;
    }

    /// A virtio reset: stop if started, drop the maps, tell nobody. The driver's rings are new.
    pub fn reset(&mut self) {
        if self.shared.machine().started {
            self.stop();
        }
        let mut bql = self.shared.bql.lock().unwrap();
        bql.serve_pending();
        self.shared.machine().drop_maps();
        self.base = 0;
    }

    /// The guest reboots, or its driver is bound anew: two resets, new rings, a start.
    pub fn reboot(&mut self, driver: &mut Driver) {
        self.reset();
        self.reset();
        driver.reset(driver.options());
        self.start(driver);
    }

    /// The base that the last stop read.
    pub fn base(&self) -> u16 {
        self.base
    }

    // --- other messages ---

    /// GET_CONFIG, as a guest's read of the config space causes it.
    pub fn get_config(&mut self) -> Vec<u8> {
        let _bql = self.shared.bql.lock().unwrap();
        get_config(&mut self.shared.machine()).unwrap()
    }

    /// A memory update for a reason that lies outside the device.
    pub fn update_memory(&mut self) -> Result<(), CallError> {
        let _bql = self.shared.bql.lock().unwrap();
        self.shared.machine().tell_regions()
    }

    /// Bends the machine; see the fields of `Bends`.
    pub(super) fn bend(&mut self, how: impl FnOnce(&mut Bends)) {
        how(&mut self.shared.machine().bends);
    }

    /// Answers every map with a failure.
    pub fn refuse_maps(&mut self, refuse: bool) {
        self.bend(|b| b.refuse_maps = refuse);
    }

    /// Lies about live maps at the start, and tells the truth just before it refuses the overlap.
    pub fn hide_maps_at_start(&mut self, tell_before_refusing: bool) {
        self.bend(|b| {
            (b.hide_maps_at_start, b.tell_before_refusing) = (true, tell_before_refusing)
        });
    }

    /// Leaves the rings' region out of the memory table, or puts it back.
    pub fn hide_rings(&mut self, hide: bool) {
        self.bend(|b| b.hide_rings = hide);
    }

    /// See `Bends::forgive_crossing_map`.
    pub fn forgive_crossing_map(&mut self) {
        self.bend(|b| b.forgive_crossing_map = true);
    }

    // --- what a test looks at ---

    /// Waits until `n` maps are live.
    pub fn wait_live(&self, n: usize) {
        self.wait("live maps", |m| m.live_maps() == n);
    }

    /// Waits until the back-end has asked for `n` maps in all.
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

    /// Live maps.
    pub fn live_maps(&self) -> usize {
        self.shared.machine().live_maps()
    }

    /// SHMEM_MAP requests so far, also refused ones.
    pub fn map_requests(&self) -> usize {
        self.shared.machine().map_requests
    }

    /// SHMEM_UNMAP requests so far, also refused ones.
    pub fn unmap_requests(&self) -> usize {
        self.shared.machine().unmap_requests
    }

    /// Memory updates so far.
    pub fn table_updates(&self) -> usize {
        self.shared.machine().table_updates
    }

    /// What was refused, with its row.
    pub fn refused(&self) -> Vec<String> {
        self.shared.machine().refused.clone()
    }

    /// Protocol features in use.
    pub fn acked(&self) -> VhostUserProtocolFeatures {
        self.acked
    }

    /// Stores as the guest does; false where the window shows nothing.
    #[must_use]
    pub fn store(&self, at: u64, bytes: &[u8]) -> bool {
        self.shared.machine().store(at, bytes)
    }

    /// Reads as the guest does; `None` where the window shows nothing.
    pub fn fetch(&self, at: u64, bytes: usize) -> Option<Vec<u8>> {
        self.shared.machine().fetch(at, bytes)
    }

    /// Panics if a rule was broken so far.
    pub fn check(&self) {
        let violations = self.shared.machine().violations.clone();
        assert!(violations.is_empty(), "the back-end broke QEMU's rules: {violations:#?}");
    }

    /// The broken rules, for tests of this front-end itself; they are forgotten.
    pub fn take_violations(&self) -> Vec<String> {
        std::mem::take(&mut self.shared.machine().violations)
    }

    /// Cuts both connections without a word, as a killed QEMU does.
    pub fn kill(&self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        let bql = self.shared.bql.lock().unwrap();
        let _ = shutdown(bql.handler.as_raw_fd(), Shutdown::Both);
    }
}

impl Drop for StrictVmm {
    fn drop(&mut self) {
        let _ = self.main.shutdown(std::net::Shutdown::Both);
        let _ = self.quit.write(1);
        if let Some(main_loop) = self.main_loop.take() {
            let _ = main_loop.join();
        }
        if let Ok(bql) = self.shared.bql.lock() {
            let _ = shutdown(bql.handler.as_raw_fd(), Shutdown::Both);
        }
        if !thread::panicking() {
            self.check();
        }
    }
}

fn negotiate(
    machine: &mut Machine,
    channel: &mut Channel,
    lacks: VhostUserProtocolFeatures,
) -> Result<(Offer, VhostUserProtocolFeatures), CallError> {
    use VhostUserProtocolFeatures as P;
    let features = machine.call("GET_FEATURES", false, |f| f.get_features())?;
    let protocol = machine.call("GET_PROTOCOL_FEATURES", false, |f| f.get_protocol_features())?;
    let known = P::MQ
        | P::REPLY_ACK
        | P::BACKEND_REQ
        | P::CONFIG
        | P::BACKEND_SEND_FD
        | P::CONFIGURE_MEM_SLOTS
        | P::RESET_DEVICE
        | P::STATUS
        | P::SHARED_OBJECT
        | P::SHMEM;
    let acked = protocol & known & !lacks;
    machine.call("SET_PROTOCOL_FEATURES", false, |f| f.set_protocol_features(acked))?;
    let queues = machine.call("GET_QUEUE_NUM", false, |f| f.get_queue_num())?;
    channel.handler.set_reply_ack_flag(acked.contains(P::REPLY_ACK));
    if acked.contains(P::BACKEND_REQ) {
        // FrontendReqHandler only lends its peer's end: QEMU sends it and closes it.
        let tx = channel.handler.get_tx_raw_fd();
        machine.call("SET_BACKEND_REQ_FD", false, |f| f.set_backend_request_fd(&tx))?;
    }
    let mut windows = Vec::new();
    if acked.contains(P::SHMEM) {
        let shmem = machine.call("GET_SHMEM_CONFIG", false, |f| f.get_shmem_config())?;
        windows.extend_from_slice(&shmem.memory_sizes[..shmem.nregions as usize]);
    }
    machine.call("SET_OWNER", false, |f| f.set_owner())?;
    let config = if acked.contains(P::CONFIG) { get_config(machine)? } else { Vec::new() };
    Ok((Offer { features, protocol, queues, config, windows }, acked))
}

fn get_config(machine: &mut Machine) -> Result<Vec<u8>, CallError> {
    let (flags, zeros) = (VhostUserConfigFlags::empty(), [0u8; CONFIG_BYTES as usize]);
    let reply =
        machine.call("GET_CONFIG", false, |f| f.get_config(0, CONFIG_BYTES, flags, &zeros))?;
    Ok(reply.1)
}

fn ring_addresses(driver: &Driver) -> VringConfigData {
    let [desc, avail, used] = Driver::rings().map(|ring| driver.host_address(ring));
    VringConfigData {
        queue_max_size: driver.options().size,
        queue_size: driver.options().size,
        flags: 0,
        desc_table_addr: desc,
        used_ring_addr: used,
        avail_ring_addr: avail,
        log_addr: None,
    }
}

/// QEMU's main loop: waits without the big lock, serves with it.
fn spawn_main_loop(shared: &Arc<Shared>, quit: &EventFd) -> JoinHandle<()> {
    let epoll = Epoll::new().unwrap();
    let channel = shared.bql.lock().unwrap().handler.as_raw_fd();
    for (fd, data) in [(channel, 0), (quit.as_raw_fd(), 1)] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, data)).unwrap();
    }
    let shared = shared.clone();
    thread::spawn(move || {
        let mut events = [EpollEvent::default(); 2];
        loop {
            let Ok(n) = epoll.wait(-1, &mut events) else { continue };
            let mut bql = shared.bql.lock().unwrap();
            bql.serve_pending();
            if bql.broken || events.iter().take(n).any(|e| e.data() == 1) {
                return;
            }
        }
    })
}

/// A file's bytes, as the host sees them.
pub fn file_bytes(file: &File, at: u64, bytes: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0u8; bytes];
    file.read_exact_at(&mut buffer, at).unwrap();
    buffer
}
