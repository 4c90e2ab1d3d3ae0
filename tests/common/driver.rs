// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of one split virtqueue (virtio 1.4 section 2.7): a driver that keeps the
//! rules, as Linux does, and the raw access with which a hostile one breaks them.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::memory::GuestMem;
use super::strict_vmm::Ring;
use super::{HANG, eventually};

/// The descriptor goes on in `next`.
pub const NEXT: u16 = 1;
/// The device may write.
pub const WRITE: u16 = 2;
/// The descriptor names a table of descriptors.
pub const INDIRECT: u16 = 4;

const DESC_TABLE: u64 = 0x1000;
const AVAIL_RING: u64 = 0x3000;
const USED_RING: u64 = 0x5000;
const RINGS_END: u64 = 0x8000;
/// For each head: the request at +0, the reply at +16, its indirect table at +64.
const REQUESTS: u64 = 0x1_0000;
const REQUEST_STRIDE: u64 = 256;
const REPLY_AT: u64 = 16;
const TABLE_AT: u64 = 64;
/// Free for tests: tables and buffers of their own.
pub const SCRATCH: u64 = 0x10_0000;

/// What a reply holds before the device has written it.
pub const UNANSWERED: u32 = 0x5a5a_5a5a;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (virtio 1.4 section 5.19.6).
pub const FLUSH: u32 = 0;
/// What a successful flush answers.
pub const OK: u32 = 0;
/// What a failed flush answers: le32 -1. Linux makes EIO of it.
pub const FAILED: u32 = u32::MAX;

/// One descriptor.
#[derive(Debug, Clone, Copy)]
pub struct Desc {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// The index of the next descriptor.
    pub next: u16,
}

/// What the driver negotiates.
#[derive(Debug, Clone, Copy)]
pub struct DriverOptions {
    /// The queue's size; QEMU's `vq_size` is 128 in our documentation.
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

/// A chain that was offered and not yet waited for.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offered(u64);

/// A chain that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The used element's length.
    pub len: u32,
    /// The word at the reply address, [`UNANSWERED`] if nobody wrote it.
    pub status: u32,
}

impl Answer {
    /// A flush that succeeded.
    pub const OK: Self = Self { len: 4, status: OK };
    /// A flush that failed, or a request that was answered with a failure.
    pub const FAILED: Self = Self { len: 4, status: FAILED };
    /// A chain that was returned without an answer.
    pub const RETURNED: Self = Self { len: 0, status: UNANSWERED };
}

struct Outstanding {
    id: Offered,
    descs: Vec<u16>,
}

/// The driver.
pub struct Driver {
    /// The RAM that the rings lie in.
    pub mem: GuestMem,
    options: DriverOptions,
    free: Vec<u16>,
    outstanding: HashMap<u16, Outstanding>,
    answers: HashMap<Offered, Answer>,
    offered: u64,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
    call_epoll: Epoll,
}

impl Driver {
    /// A driver with empty rings in `mem`.
    pub fn new(mem: GuestMem, options: DriverOptions) -> Self {
        let call = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let call_epoll = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        call_epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        let mut driver = Self {
            mem,
            options,
            free: Vec::new(),
            outstanding: HashMap::new(),
            answers: HashMap::new(),
            offered: 0,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call,
            call_epoll,
        };
        driver.reset(options);
        driver
    }

    /// What a driver does after a device reset: new rings, nothing outstanding.
    pub fn reset(&mut self, options: DriverOptions) {
        assert!(options.size.is_power_of_two() && options.size <= 256);
        let zeros = vec![0u8; (RINGS_END - DESC_TABLE) as usize];
        self.mem.write_slice(&zeros, GuestAddress(DESC_TABLE)).unwrap();
        self.options = options;
        self.free = (0..options.size).rev().collect();
        self.outstanding.clear();
        self.answers.clear();
        self.next_avail = 0;
        self.kicked = 0;
        self.last_used = 0;
        let _ = self.call.read();
    }

    /// What the driver negotiated.
    pub fn options(&self) -> DriverOptions {
        self.options
    }

    /// The rings' guest-physical addresses: descriptor table, available ring, used ring.
    pub fn rings() -> [u64; 3] {
        [DESC_TABLE, AVAIL_RING, USED_RING]
    }

    // --- a driver that keeps the rules ---

    /// Offers one flush, without a kick.
    pub fn add_flush(&mut self) -> Offered {
        let descs = self.take_descs(if self.options.indirect { 1 } else { 2 });
        let head = descs[0];
        let [request, reply] = self.flush_buffers(head);
        if self.options.indirect {
            let table = REQUESTS + u64::from(head) * REQUEST_STRIDE + TABLE_AT;
            self.set_desc_in(table, 0, Desc { next: 1, ..request });
            self.set_desc_in(table, 1, reply);
            self.set_desc(head, Desc { addr: table, len: 32, flags: INDIRECT, next: 0 });
        } else {
            self.set_desc(head, Desc { next: descs[1], ..request });
            self.set_desc(descs[1], reply);
        }
        self.offer(descs)
    }

    /// Offers one flush and kicks.
    pub fn flush(&mut self) -> Offered {
        let flush = self.add_flush();
        self.kick();
        flush
    }

    /// Flushes and waits for the answer.
    pub fn flush_and_wait(&mut self) -> Answer {
        let flush = self.flush();
        self.wait(flush)
    }

    /// Kicks if the device wants to be kicked (virtio 1.4 section 2.7.10).
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
            self.kick.write(1).unwrap();
        }
    }

    /// Kicks whatever the device wants.
    pub fn force_kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits for one answer.
    pub fn wait(&mut self, offered: Offered) -> Answer {
        let deadline = Instant::now() + HANG;
        loop {
            self.collect();
            if let Some(answer) = self.answers.remove(&offered) {
                return answer;
            }
            self.sleep_until_used(deadline);
        }
    }

    /// Whether the answer has come, without waiting.
    pub fn is_answered(&mut self, offered: Offered) -> bool {
        self.collect();
        self.answers.contains_key(&offered)
    }

    /// Waits until the device has taken all that was offered and asked for the next kick.
    /// Needs EVENT_IDX, where the device says so.
    pub fn wait_taken(&self) {
        assert!(self.options.event_idx);
        eventually("the device to take all requests", || self.avail_event() == self.next_avail);
    }

    /// How many chains are offered and not returned.
    pub fn outstanding(&mut self) -> usize {
        self.collect();
        self.outstanding.len()
    }

    // --- raw access ---

    /// Takes `n` descriptors out of the free list.
    pub fn take_descs(&mut self, n: usize) -> Vec<u16> {
        if self.free.len() < n {
            self.collect();
        }
        assert!(self.free.len() >= n, "the ring is full");
        (0..n).map(|_| self.free.pop().unwrap()).collect()
    }

    /// A well-formed request and reply descriptor for `head`; the reply is marked unanswered.
    pub fn flush_buffers(&self, head: u16) -> [Desc; 2] {
        let request = REQUESTS + u64::from(head) * REQUEST_STRIDE;
        self.mem.write_obj(FLUSH, GuestAddress(request)).unwrap();
        self.mem.write_obj(UNANSWERED, GuestAddress(request + REPLY_AT)).unwrap();
        [
            Desc { addr: request, len: 4, flags: NEXT, next: 0 },
            Desc { addr: request + REPLY_AT, len: 4, flags: WRITE, next: 0 },
        ]
    }

    /// Writes a descriptor of the queue's table.
    pub fn set_desc(&self, index: u16, desc: Desc) {
        self.set_desc_in(DESC_TABLE, index, desc);
    }

    /// Writes a descriptor of any table.
    pub fn set_desc_in(&self, table: u64, index: u16, desc: Desc) {
        let at = table + u64::from(index) * 16;
        self.mem.write_obj(desc.addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(desc.len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(desc.flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(desc.next, GuestAddress(at + 14)).unwrap();
    }

    /// Offers the chain that begins with `descs[0]`; they are free again when it comes back.
    pub fn offer(&mut self, descs: Vec<u16>) -> Offered {
        self.offered += 1;
        let id = Offered(self.offered);
        let head = descs[0];
        self.offer_untracked(head);
        assert!(self.outstanding.insert(head, Outstanding { id, descs }).is_none());
        id
    }

    /// Puts any word into the available ring. If it comes back, [`collect`](Self::wait) panics.
    pub fn offer_untracked(&mut self, head: u16) {
        let slot = u64::from(self.next_avail % self.options.size);
        self.mem.write_obj(head, GuestAddress(AVAIL_RING + 4 + slot * 2)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        self.publish_avail_idx(self.next_avail);
    }

    /// Writes the available index, right or wrong.
    pub fn publish_avail_idx(&self, idx: u16) {
        self.mem.store(idx, GuestAddress(AVAIL_RING + 2), Ordering::Release).unwrap();
    }

    /// The available index that a well-behaved driver would have published.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The device's used index.
    pub fn used_idx(&self) -> u16 {
        self.mem.load(GuestAddress(USED_RING + 2), Ordering::Acquire).unwrap()
    }

    /// The used index up to which this driver has collected.
    pub fn collected(&self) -> u16 {
        self.last_used
    }

    fn load(&self, at: u64) -> u16 {
        self.mem.load(GuestAddress(at), Ordering::Relaxed).unwrap()
    }

    fn avail_event(&self) -> u16 {
        self.load(USED_RING + 4 + u64::from(self.options.size) * 8)
    }

    fn collect(&mut self) {
        while self.used_idx() != self.last_used {
            let slot = u64::from(self.last_used % self.options.size);
            let element = USED_RING + 4 + slot * 8;
            let id: u32 = self.mem.read_obj(GuestAddress(element)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(element + 4)).unwrap();
            self.last_used = self.last_used.wrapping_add(1);
            // As Linux: "id %u is not a head!". It is also how a double answer shows.
            let back = u16::try_from(id).ok().and_then(|head| self.outstanding.remove(&head));
            let Outstanding { id: offered, descs } =
                back.unwrap_or_else(|| panic!("the device returned {id}, which is no head"));
            let reply = REQUESTS + u64::from(descs[0]) * REQUEST_STRIDE + REPLY_AT;
            let status = self.mem.read_obj(GuestAddress(reply)).unwrap();
            self.free.extend(descs.into_iter().rev());
            self.answers.insert(offered, Answer { len, status });
        }
    }

    fn sleep_until_used(&self, deadline: Instant) {
        // used_event: "call me for the element after the ones that I have seen".
        let used_event = AVAIL_RING + 4 + u64::from(self.options.size) * 2;
        self.mem.store(self.last_used, GuestAddress(used_event), Ordering::Relaxed).unwrap();
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
            self.outstanding.len()
        );
        let _ = self.call.read();
    }
}

impl Ring for Driver {
    fn options(&self) -> DriverOptions {
        self.options
    }

    fn host_addresses(&self) -> [u64; 3] {
        Self::rings().map(|ring| self.mem.get_host_address(GuestAddress(ring)).unwrap() as u64)
    }

    /// QEMU gives no kick across a stop either.
    fn fresh_kick(&mut self) -> EventFd {
        self.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        self.kick.try_clone().unwrap()
    }

    fn call(&self) -> EventFd {
        self.call.try_clone().unwrap()
    }
}
