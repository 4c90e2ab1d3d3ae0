// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user messages of cloud-hypervisor's `--fs`, in its order
//! (virtio-devices/src/vhost_user/fs.rs and vu_common_ctrl.rs). Taken from its source:
//! cloud-hypervisor needs KVM, so the tests do not run it. It uses the same `Frontend` of the vhost
//! crate.
//!
//! It serves the config space itself (no GET_CONFIG), has no back-end channel and no SHMEM, sets
//! NEED_REPLY in every message, and pauses a device by disabling its rings, without GET_VRING_BASE.

use std::os::unix::net::UnixStream;
use std::path::Path;

use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{Error as VhostError, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryBackend;

use crate::HANG;
use crate::driver::DriverOptions;
use crate::fs::FsHost;
use crate::fuse::FsGuest;
use crate::memory::{GuestMem, guest_ram_with};
use crate::queue::{QUEUE_BYTES, Queue};
use crate::strict_vmm::{F_EVENT_IDX, F_INDIRECT_DESC, F_PROTOCOL_FEATURES, F_VERSION_1, Ring};
use crate::watchdog::Watchdog;

/// The queue's size, in descriptors: the default of `queue_size=` of `--fs`.
const QUEUE_SIZE: u16 = 1024;
/// Guest memory for tests, in bytes, after that of the queues.
const SCRATCH_BYTES: u64 = 16 << 20;
/// VIRTIO_F_IN_ORDER, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_NOTIFICATION_DATA.
const LATER_FEATURES: u64 = 1 << 35 | 1 << 36 | 1 << 38;
/// DEFAULT_VIRTIO_FEATURES of cloud-hypervisor's vhost_user/mod.rs.
const VIRTIO_FEATURES: u64 =
    F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | LATER_FEATURES | F_PROTOCOL_FEATURES;

/// The front-end.
pub struct CloudHypervisor {
    frontend: Frontend,
    watchdog: Watchdog,
    features: u64,
    /// The negotiated protocol features.
    pub protocol: VhostUserProtocolFeatures,
    /// The number of queues (GET_QUEUE_NUM).
    pub queues: u64,
    /// The numbers of the rings that were set up, in order.
    active: Vec<usize>,
}

impl CloudHypervisor {
    /// Connects and negotiates, as at the device's creation before the VM boots.
    pub fn connect(path: &Path, queues: usize) -> Self {
        use VhostUserProtocolFeatures as P;
        let stream = UnixStream::connect(path).unwrap();
        let watchdog = Watchdog::new(stream.try_clone().unwrap());
        let frontend = Frontend::from_stream(stream, queues as u64);
        let (features, protocol) = (0, P::empty());
        let mut vmm = Self { frontend, watchdog, features, protocol, queues: 0, active: vec![] };
        vmm.call("SET_OWNER", |f| f.set_owner());
        vmm.features = VIRTIO_FEATURES & vmm.call("GET_FEATURES", |f| f.get_features());
        assert_ne!(vmm.features & F_PROTOCOL_FEATURES, 0);
        let offered = vmm.call("GET_PROTOCOL_FEATURES", |f| f.get_protocol_features());
        // DEVICE_STATE: since 2026, for snapshots and migration.
        let wanted = P::MQ
            | P::CONFIGURE_MEM_SLOTS
            | P::REPLY_ACK
            | P::INFLIGHT_SHMFD
            | P::LOG_SHMFD
            | P::DEVICE_STATE;
        vmm.protocol = offered & wanted;
        let acked = vmm.protocol;
        vmm.call("SET_PROTOCOL_FEATURES", |f| f.set_protocol_features(acked));
        assert!(acked.contains(P::REPLY_ACK | P::MQ), "it would use two queues, no acks");
        // For all later messages.
        vmm.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        vmm.queues = vmm.call("GET_QUEUE_NUM", |f| f.get_queue_num());
        assert!(vmm.queues >= queues as u64, "it would fail: BadQueueNum");
        vmm
    }

    fn call<T>(
        &mut self,
        what: &str,
        message: impl FnOnce(&mut Frontend) -> Result<T, VhostError>,
    ) -> T {
        let mut frontend = self.frontend.clone();
        let result = self.watchdog.guard(HANG / 2, || message(&mut frontend));
        let result = result.unwrap_or_else(|| panic!("{what} was not answered"));
        result.unwrap_or_else(|e| panic!("{what}: {e:?}"))
    }

    /// DRIVER_OK (setup_vhost_user). The memory table has the first `regions` regions of `ram`.
    pub fn activate(&mut self, ram: &GuestMem, regions: usize, rings: &mut [Queue]) {
        // All negotiated bits: the daemon offers none of cloud-hypervisor's newest bits.
        let features = self.features;
        self.call("SET_FEATURES", |f| f.set_features(features));
        let table: Vec<_> = ram.iter().take(regions).map(region_info).collect();
        self.call("SET_MEM_TABLE", |f| f.set_mem_table(&table).map(drop));
        for (i, ring) in rings.iter().enumerate() {
            let num = ring.options().size;
            self.call("SET_VRING_NUM", |f| f.set_vring_num(i, num));
        }
        assert!(
            !self.protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD),
            "not implemented"
        );
        for (i, ring) in rings.iter_mut().enumerate() {
            let (addresses, base) = (vring_addresses(ring), 0);
            let (call, kick) = (ring.call(), ring.fresh_kick());
            self.call("SET_VRING_ADDR", |f| f.set_vring_addr(i, &addresses));
            self.call("SET_VRING_BASE", |f| f.set_vring_base(i, base));
            self.call("SET_VRING_CALL", |f| f.set_vring_call(i, &call));
            self.call("SET_VRING_KICK", |f| f.set_vring_kick(i, &kick));
        }
        self.active = (0..rings.len()).collect();
        self.enable(true);
    }

    fn enable(&mut self, on: bool) {
        for i in self.active.clone() {
            self.call("SET_VRING_ENABLE", |f| f.set_vring_enable(i, on));
        }
    }

    /// `pause` of its API: disables the rings, without GET_VRING_BASE.
    pub fn pause(&mut self) {
        self.enable(false);
    }

    /// `resume` of its API: enables the rings.
    pub fn resume(&mut self) {
        self.enable(true);
    }

    /// A virtio reset: disables each ring, and ignores the reply of its GET_VRING_BASE.
    pub fn reset(&mut self) {
        for i in std::mem::take(&mut self.active) {
            self.call("SET_VRING_ENABLE", |f| f.set_vring_enable(i, false));
            self.call("GET_VRING_BASE", |f| f.get_vring_base(i).map(drop));
        }
    }

    /// Memory hotplug (`--memory hotplug_size=`): adds region number `region` of `ram`.
    pub fn add_memory(&mut self, ram: &GuestMem, region: usize) {
        assert!(self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS));
        let info = region_info(ram.iter().nth(region).unwrap());
        self.call("ADD_MEM_REG", |f| f.add_mem_region(&info).map(drop));
    }

    /// Returns after the back-end has carried out all earlier messages.
    pub fn round_trip(&mut self) {
        self.call("GET_FEATURES", |f| f.get_features());
    }
}

fn region_info(region: &vm_memory::GuestRegionMmap<()>) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo::from_guest_region(region).unwrap()
}

fn vring_addresses(ring: &Queue) -> VringConfigData {
    let [desc, avail, used] = ring.host_addresses();
    VringConfigData {
        queue_max_size: ring.options().size,
        queue_size: ring.options().size,
        flags: 0,
        desc_table_addr: desc,
        used_ring_addr: used,
        avail_ring_addr: avail,
        log_addr: None,
    }
}

impl FsHost {
    /// A VM of cloud-hypervisor whose guest has not loaded its driver yet. Queues: hiprio and
    /// `request_queues` request queues. The RAM has two regions; the second is for
    /// [`CloudHypervisor::add_memory`].
    pub fn plug_cloud_hypervisor(&self, request_queues: usize) -> FsGuest<CloudHypervisor> {
        let queues = 1 + request_queues;
        let vmm = CloudHypervisor::connect(&self.dir.path().join("sock"), queues);
        let scratch = queues as u64 * QUEUE_BYTES;
        let ram = guest_ram_with(scratch + SCRATCH_BYTES, 2);
        let driver = DriverOptions { size: QUEUE_SIZE, ..DriverOptions::default() };
        let queue = |i| Queue::new(ram.clone(), i * QUEUE_BYTES, driver);
        let queues = (0..queues as u64).map(queue).collect();
        FsGuest::new(vmm, ram, queues, scratch)
    }
}

impl FsGuest<CloudHypervisor> {
    /// Starts the device at DRIVER_OK, with the first RAM region.
    pub fn activate(&mut self) {
        self.vmm.activate(&self.ram, 1, &mut self.queues);
    }

    /// A virtio reset, and the start of a new driver without INIT.
    pub fn reset_and_activate(&mut self) {
        self.vmm.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        self.activate();
    }
}
