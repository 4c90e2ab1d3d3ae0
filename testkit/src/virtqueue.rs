// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of one split virtqueue (virtio 1.4 section 2.7): a driver that obeys the rules,
//! as Linux does, and raw access with which a hostile driver breaks them.
//!
//! The content of the buffers is defined by the drivers on top: [`crate::driver`] (virtio-pmem),
//! [`crate::queue`] (FUSE messages of any form), and the driver of `benches/process`.

use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMem;
use crate::strict_vmm::Ring;
use crate::{HANG, eventually};

/// VIRTQ_DESC_F_NEXT: the chain continues in `next`.
pub const NEXT: u16 = 1;
/// VIRTQ_DESC_F_WRITE: the buffer is device-writable.
pub const WRITE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT: the buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Limit on the queue's size, in descriptors.
pub const MOST_SIZE: u16 = 1024;
/// Length of the rings of a queue of [`MOST_SIZE`], in bytes.
pub const RINGS_BYTES: u64 = 0x9000;
/// Offset of the available ring from the descriptor table, in bytes.
const AVAIL_RING: u64 = 0x4000;
/// Offset of the used ring from the descriptor table, in bytes.
const USED_RING: u64 = 0x6000;
const DESC_BYTES: u64 = 16;

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    /// The buffer's guest address.
    pub addr: u64,
    /// The buffer's length in bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the next descriptor.
    pub next: u16,
}

impl Desc {
    /// A device-readable buffer.
    pub fn read(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: 0, next: 0 }
    }

    /// A device-writable buffer.
    pub fn write(addr: u64, len: u32) -> Self {
        Self { addr, len, flags: WRITE, next: 0 }
    }
}

/// The features that the driver negotiates, and the queue's size.
#[derive(Debug, Clone, Copy)]
pub struct DriverOptions {
    /// The queue's size in descriptors; 128 is QEMU's `vq_size` in README.md.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC.
    pub indirect: bool,
}

impl Default for DriverOptions {
    fn default() -> Self {
        Self { size: 128, event_idx: true, indirect: true }
    }
}

/// A chain that was made available.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offered(u64);

/// A chain that the device has returned.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    /// The chain.
    pub offered: Offered,
    /// The index of its first descriptor in the queue's table.
    pub head: u16,
    /// The used element's length.
    pub len: u32,
}

struct Outstanding {
    offered: Offered,
    /// Descriptors that become free when the chain is returned.
    descs: Vec<u16>,
}

/// The guest's side of one virtqueue.
pub struct Virtqueue {
    /// The RAM that contains the rings.
    pub mem: GuestMem,
    at: u64,
    options: DriverOptions,
    free: Vec<u16>,
    /// Outstanding chains, by the index of their first descriptor.
    outstanding: Vec<Option<Outstanding>>,
    offered: u64,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
    call_epoll: Epoll,
}

impl Virtqueue {
    /// A queue with empty rings at guest address `at` of `mem`.
    pub fn new(mem: GuestMem, at: u64, options: DriverOptions) -> Self {
        let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let call_epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        call_epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        let mut queue = Self {
            mem,
            at,
            options,
            free: Vec::new(),
            outstanding: Vec::new(),
            offered: 0,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call,
            call_epoll,
        };
        queue.reset(options);
        queue
    }

    /// Resets the driver's state, as after a device reset: new rings, no outstanding chain.
    pub fn reset(&mut self, options: DriverOptions) {
        assert!(options.size.is_power_of_two() && options.size <= MOST_SIZE);
        self.mem.write_slice(&[0u8; RINGS_BYTES as usize], GuestAddress(self.at)).unwrap();
        self.options = options;
        self.free = (0..options.size).rev().collect();
        self.outstanding = (0..options.size).map(|_| None).collect();
        (self.next_avail, self.kicked, self.last_used) = (0, 0, 0);
        let _ = self.call.read();
    }

    /// What the driver negotiated.
    pub fn options(&self) -> DriverOptions {
        self.options
    }

    /// The rings' guest addresses: descriptor table, available ring, used ring.
    pub fn rings(&self) -> [u64; 3] {
        [self.at, self.at + AVAIL_RING, self.at + USED_RING]
    }

    // --- descriptors ---

    /// The number of free descriptors.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Takes `n` descriptors out of the free list.
    pub fn take_descs(&mut self, n: usize) -> Vec<u16> {
        assert!(self.free.len() >= n, "the ring is full");
        (0..n).map(|_| self.free.pop().unwrap()).collect()
    }

    /// Writes a descriptor to the queue's table.
    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.set_desc_in(self.at, index, desc);
    }

    /// Writes a descriptor to the table at guest address `table`.
    pub fn set_desc_in(&self, table: u64, index: u16, desc: Desc) {
        let at = table + u64::from(index) * DESC_BYTES;
        self.mem.write_slice(&encoded(desc), GuestAddress(at)).unwrap();
    }

    /// Writes `descs` as one chain, and returns the descriptors of the queue's table that it takes.
    /// An indirect table is written to guest address `table`.
    pub fn write_chain(&mut self, table: u64, descs: &[Desc]) -> Vec<u16> {
        if self.options.indirect {
            let taken = self.take_descs(1);
            self.write_indirect(taken[0], table, descs);
            return taken;
        }
        let taken = self.take_descs(descs.len());
        for (i, desc) in descs.iter().enumerate() {
            let (more, next) = taken.get(i + 1).map_or((0, 0), |&next| (NEXT, next));
            self.set_desc(taken[i], Desc { flags: desc.flags | more, next, ..*desc });
        }
        taken
    }

    /// Writes `descs` as an indirect table to guest address `table`, and descriptor `head` that
    /// refers to it.
    pub fn write_indirect(&self, head: u16, table: u64, descs: &[Desc]) {
        let mut bytes = Vec::with_capacity(descs.len() * DESC_BYTES as usize);
        for (i, desc) in descs.iter().enumerate() {
            let more = if i + 1 < descs.len() { NEXT } else { 0 };
            let (flags, next) = (desc.flags | more, i as u16 + 1);
            bytes.extend_from_slice(&encoded(Desc { flags, next, ..*desc }));
        }
        self.mem.write_slice(&bytes, GuestAddress(table)).unwrap();
        self.set_desc(
            head,
            Desc { addr: table, len: bytes.len() as u32, flags: INDIRECT, next: 0 },
        );
    }

    // --- the available ring ---

    /// Makes the chain that begins with `descs[0]` available. `descs` become free when it is
    /// returned.
    pub fn offer(&mut self, descs: Vec<u16>) -> Offered {
        let offered = self.add(descs);
        self.publish();
        offered
    }

    /// Like [`offer`](Self::offer), but the device does not see the chain before
    /// [`publish`](Self::publish).
    pub fn add(&mut self, descs: Vec<u16>) -> Offered {
        let head = descs[0];
        self.add_with(head, descs)
    }

    /// Like [`add`](Self::add), for a chain that begins with `head` and whose descriptors the
    /// caller manages.
    pub fn add_kept(&mut self, head: u16) -> Offered {
        self.add_with(head, Vec::new())
    }

    fn add_with(&mut self, head: u16, descs: Vec<u16>) -> Offered {
        self.offered += 1;
        let offered = Offered(self.offered);
        self.add_head(head);
        let before = self.outstanding[usize::from(head)].replace(Outstanding { offered, descs });
        assert!(before.is_none(), "descriptor {head} is outstanding");
        offered
    }

    /// Makes any word available as a head. If the device returns it, [`pop_used`](Self::pop_used)
    /// panics.
    pub fn offer_untracked(&mut self, head: u16) {
        self.add_head(head);
        self.publish();
    }

    fn add_head(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.options.size);
        let entry = self.at + AVAIL_RING + 4 + slot * 2;
        self.mem.write_obj(head, GuestAddress(entry)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Publishes all chains that were added.
    pub fn publish(&self) {
        self.publish_avail_idx(self.next_avail);
    }

    /// Writes the available index; it may be invalid.
    pub fn publish_avail_idx(&self, idx: u16) {
        let index = GuestAddress(self.at + AVAIL_RING + 2);
        self.mem.store(idx, index, Ordering::Release).unwrap();
    }

    /// The available index of a driver that obeys the rules.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// Kicks unless the device has suppressed kicks (virtio 1.4 section 2.7.10).
    pub fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_avail, self.kicked);
        self.kicked = new;
        let wanted = if self.options.event_idx {
            new.wrapping_sub(self.avail_event()).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(USED_RING) & 1 == 0
        };
        if wanted {
            self.force_kick();
        }
    }

    /// Kicks even if the device has suppressed kicks.
    pub fn force_kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits until the device has taken all offered chains and has asked for the next kick. Needs
    /// EVENT_IDX: the device then publishes the index of the next kick.
    pub fn wait_taken(&self) {
        assert!(self.options.event_idx);
        eventually("the device to take all requests", || self.avail_event() == self.next_avail);
    }

    // --- the used ring ---

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.load(USED_RING + 2)
    }

    /// The used index up to which this driver has taken chains.
    pub fn collected(&self) -> u16 {
        self.last_used
    }

    /// The number of offered chains that this driver has not seen returned.
    pub fn num_outstanding(&self) -> usize {
        self.outstanding.iter().flatten().count()
    }

    /// The next returned chain, if there is one. Does not wait.
    pub fn pop_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.last_used {
            return None;
        }
        let slot = u64::from(self.last_used % self.options.size);
        let element = self.at + USED_RING + 4 + slot * 8;
        let id: u32 = self.mem.read_obj(GuestAddress(element)).unwrap();
        let len: u32 = self.mem.read_obj(GuestAddress(element + 4)).unwrap();
        self.last_used = self.last_used.wrapping_add(1);
        // Linux's error "id %u is not a head!". A chain that is returned twice is found here, too.
        let back = self.outstanding.get_mut(id as usize).and_then(Option::take);
        let Outstanding { offered, descs } =
            back.unwrap_or_else(|| panic!("the device returned {id}, which is no head"));
        self.free.extend(descs.into_iter().rev());
        Some(Used { offered, head: id as u16, len })
    }

    /// Writes used_event: requests a call for the next used element after those that were taken.
    pub fn ask_for_call(&self) {
        let used_event = self.at + AVAIL_RING + 4 + u64::from(self.options.size) * 2;
        self.mem.store(self.last_used, GuestAddress(used_event), Ordering::Relaxed).unwrap();
    }

    /// Waits until a returned chain can be taken.
    pub fn sleep_until_used(&self, deadline: Instant) {
        self.ask_for_call();
        fence(Ordering::SeqCst);
        if self.used_idx() != self.last_used {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let mut events = [EpollEvent::default()];
        let ready = self.call_epoll.wait(left.as_millis() as i32, &mut events);
        assert!(
            !matches!(ready, Ok(0)),
            "hang: no call; used index {}, {} chains outstanding",
            self.used_idx(),
            self.num_outstanding()
        );
        let _ = self.call.read();
    }

    /// The time at which a wait that begins now counts as hung.
    pub fn deadline() -> Instant {
        Instant::now() + HANG
    }

    fn load(&self, at: u64) -> u16 {
        self.mem.load(GuestAddress(self.at + at), Ordering::Acquire).unwrap()
    }

    fn avail_event(&self) -> u16 {
        self.load(USED_RING + 4 + u64::from(self.options.size) * 8)
    }
}

fn encoded(desc: Desc) -> [u8; DESC_BYTES as usize] {
    let mut bytes = [0; DESC_BYTES as usize];
    bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
    bytes
}

impl Ring for Virtqueue {
    fn options(&self) -> DriverOptions {
        self.options
    }

    fn host_addresses(&self) -> [u64; 3] {
        self.rings().map(|ring| self.mem.get_host_address(GuestAddress(ring)).unwrap() as u64)
    }

    /// A new eventfd: QEMU does not keep a kick over a stop either.
    fn fresh_kick(&mut self) -> EventFd {
        self.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        self.kick.try_clone().unwrap()
    }

    fn call(&self) -> EventFd {
        self.call.try_clone().unwrap()
    }
}
