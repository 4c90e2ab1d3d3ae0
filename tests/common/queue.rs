// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of one of several virtqueues, for requests and replies of any length. Keeps
//! the rules, as Linux does; a hostile guest gives it descriptors of its own.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::HANG;
use super::driver::{Desc, DriverOptions, INDIRECT, NEXT, WRITE};
use super::memory::GuestMem;
use super::strict_vmm::Ring;

/// Guest memory of one queue: its rings, then its slots.
pub const QUEUE_BYTES: u64 = 8 << 20;
const AVAIL_RING: u64 = 0x4000;
const USED_RING: u64 = 0x6000;
const RINGS_END: u64 = 0x9000;
const SLOTS: u64 = 0x1_0000;
/// Each chain's own memory: a table of descriptors, what the device reads, what it writes.
const SLOT_BYTES: u64 = 0x4_0000;
const NUM_SLOTS: u64 = 24;
const IN_AT: u64 = 0x1000;
const OUT_AT: u64 = 0x2_0000;
/// The most that the device may read or write of one slot.
pub const MOST_BYTES: usize = 0x1_f000;
/// What a reply holds before the device has written it.
const UNWRITTEN: u8 = 0x5a;

/// A piece of guest memory that is none of a slot's: an address and a length.
pub type Extern = (u64, u32);

/// A chain to offer.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    /// What the device reads first, in as many descriptors.
    pub input: Vec<Vec<u8>>,
    /// What the device reads then, from anywhere.
    pub input_at: Vec<Extern>,
    /// The lengths of what the device writes first, a descriptor each.
    pub output: Vec<usize>,
    /// Where the device writes then.
    pub output_at: Vec<Extern>,
}

/// A chain that was offered.
#[must_use]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Offered(u64);

/// A chain that came back.
#[derive(Debug, Clone)]
pub struct Returned {
    /// The used element's length.
    pub len: u32,
    /// The slot's output, as far as the used element's length reaches.
    pub output: Vec<u8>,
    /// Whether the device has written to the slot behind that length.
    pub wrote_more: bool,
}

struct Outstanding {
    id: Offered,
    descs: Vec<u16>,
    slot: u64,
    output: usize,
}

/// The queue.
pub struct Queue {
    mem: GuestMem,
    at: u64,
    options: DriverOptions,
    free: Vec<u16>,
    slots: Vec<u64>,
    outstanding: HashMap<u16, Outstanding>,
    returned: HashMap<Offered, Returned>,
    offered: u64,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
    call_epoll: Epoll,
}

impl Queue {
    /// A queue whose memory begins at `at`.
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
            slots: Vec::new(),
            outstanding: HashMap::new(),
            returned: HashMap::new(),
            offered: 0,
            next_avail: 0,
            kicked: 0,
            last_used: 0,
            kick: EventFd::new(libc::EFD_NONBLOCK).unwrap(),
            call,
            call_epoll,
        };
        queue.reset();
        queue
    }

    /// What a driver does after a device reset: new rings, nothing outstanding.
    pub fn reset(&mut self) {
        assert!(self.options.size.is_power_of_two() && self.options.size <= 1024);
        self.mem.write_slice(&[0u8; RINGS_END as usize], GuestAddress(self.at)).unwrap();
        self.free = (0..self.options.size).rev().collect();
        self.slots = (0..NUM_SLOTS).rev().map(|i| self.at + SLOTS + i * SLOT_BYTES).collect();
        self.outstanding.clear();
        self.returned.clear();
        (self.next_avail, self.kicked, self.last_used) = (0, 0, 0);
        let _ = self.call.read();
    }

    /// Offers a chain and kicks.
    pub fn offer(&mut self, chain: &Chain) -> Offered {
        self.collect();
        let slot = self.slots.pop().expect("too many chains in flight");
        let output = chain.output.iter().sum();
        let descs = self.lay_out(slot, chain);
        assert!(!descs.is_empty(), "a chain of nothing");
        self.mem.write_slice(&vec![UNWRITTEN; MOST_BYTES], GuestAddress(slot + OUT_AT)).unwrap();
        let descs = self.write_descs(slot, &descs);
        self.offered += 1;
        let id = Offered(self.offered);
        let head = descs[0];
        let ring_slot = u64::from(self.next_avail % self.options.size);
        self.mem.write_obj(head, GuestAddress(self.at + AVAIL_RING + 4 + ring_slot * 2)).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
        let index = GuestAddress(self.at + AVAIL_RING + 2);
        self.mem.store(self.next_avail, index, Ordering::Release).unwrap();
        let outstanding = Outstanding { id, descs, slot, output };
        assert!(self.outstanding.insert(head, outstanding).is_none());
        self.kick();
        id
    }

    fn lay_out(&self, slot: u64, chain: &Chain) -> Vec<Desc> {
        let mut descs = Vec::new();
        let mut at = slot + IN_AT;
        for part in &chain.input {
            self.mem.write_slice(part, GuestAddress(at)).unwrap();
            descs.push(Desc { addr: at, len: part.len() as u32, flags: 0, next: 0 });
            at += part.len() as u64;
        }
        assert!(at <= slot + IN_AT + MOST_BYTES as u64, "too much to read for a slot");
        descs.extend(chain.input_at.iter().map(|&(addr, len)| Desc {
            addr,
            len,
            flags: 0,
            next: 0,
        }));
        let mut at = slot + OUT_AT;
        for &len in &chain.output {
            descs.push(Desc { addr: at, len: len as u32, flags: WRITE, next: 0 });
            at += len as u64;
        }
        assert!(at <= slot + OUT_AT + MOST_BYTES as u64, "too much to write for a slot");
        let output_at = chain.output_at.iter();
        descs.extend(output_at.map(|&(addr, len)| Desc { addr, len, flags: WRITE, next: 0 }));
        descs
    }

    /// Writes `descs` as one chain and returns the ring's descriptors that it takes.
    fn write_descs(&mut self, slot: u64, descs: &[Desc]) -> Vec<u16> {
        let last = descs.len() - 1;
        if self.options.indirect {
            for (i, desc) in descs.iter().enumerate() {
                let flags = desc.flags | if i < last { NEXT } else { 0 };
                self.set_desc(slot, i as u16, Desc { flags, next: i as u16 + 1, ..*desc });
            }
            let head = self.free.pop().expect("the ring is full");
            let len = descs.len() as u32 * 16;
            self.set_desc(self.at, head, Desc { addr: slot, len, flags: INDIRECT, next: 0 });
            return vec![head];
        }
        assert!(self.free.len() >= descs.len(), "the ring is full");
        let taken: Vec<u16> = descs.iter().map(|_| self.free.pop().unwrap()).collect();
        for (i, desc) in descs.iter().enumerate() {
            let flags = desc.flags | if i < last { NEXT } else { 0 };
            let next = taken.get(i + 1).copied().unwrap_or(0);
            self.set_desc(self.at, taken[i], Desc { flags, next, ..*desc });
        }
        taken
    }

    fn set_desc(&self, table: u64, index: u16, desc: Desc) {
        let at = table + u64::from(index) * 16;
        self.mem.write_obj(desc.addr, GuestAddress(at)).unwrap();
        self.mem.write_obj(desc.len, GuestAddress(at + 8)).unwrap();
        self.mem.write_obj(desc.flags, GuestAddress(at + 12)).unwrap();
        self.mem.write_obj(desc.next, GuestAddress(at + 14)).unwrap();
    }

    /// Kicks, whatever was offered.
    pub fn kick_by_hand(&self) {
        self.kick.write(1).unwrap();
    }

    /// Kicks if the device wants to be kicked (virtio 1.4 section 2.7.10).
    fn kick(&mut self) {
        fence(Ordering::SeqCst);
        let (new, old) = (self.next_avail, self.kicked);
        self.kicked = new;
        let wanted = if self.options.event_idx {
            let event = self.load(USED_RING + 4 + u64::from(self.options.size) * 8);
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.load(USED_RING) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
    }

    /// Waits for one chain.
    pub fn wait(&mut self, offered: Offered) -> Returned {
        let deadline = Instant::now() + HANG;
        loop {
            self.collect();
            if let Some(returned) = self.returned.remove(&offered) {
                return returned;
            }
            self.sleep_until_used(deadline);
        }
    }

    /// Whether the chain has come back, without waiting.
    pub fn is_returned(&mut self, offered: Offered) -> bool {
        self.collect();
        self.returned.contains_key(&offered)
    }

    /// How many chains are offered and not returned.
    pub fn outstanding(&mut self) -> usize {
        self.collect();
        self.outstanding.len()
    }

    fn load(&self, at: u64) -> u16 {
        self.mem.load(GuestAddress(self.at + at), Ordering::Acquire).unwrap()
    }

    fn collect(&mut self) {
        while self.load(USED_RING + 2) != self.last_used {
            let slot = u64::from(self.last_used % self.options.size);
            let element = self.at + USED_RING + 4 + slot * 8;
            let id: u32 = self.mem.read_obj(GuestAddress(element)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(element + 4)).unwrap();
            self.last_used = self.last_used.wrapping_add(1);
            // As Linux: "id %u is not a head!". It is also how a double answer shows.
            let back = u16::try_from(id).ok().and_then(|head| self.outstanding.remove(&head));
            let back = back.unwrap_or_else(|| panic!("the device returned {id}, which is no head"));
            let mut output = vec![0u8; MOST_BYTES];
            self.mem.read_slice(&mut output, GuestAddress(back.slot + OUT_AT)).unwrap();
            let told = back.output.min(len as usize);
            let wrote_more = output[told..].iter().any(|&byte| byte != UNWRITTEN);
            output.truncate(told);
            self.free.extend(back.descs.into_iter().rev());
            self.slots.push(back.slot);
            self.returned.insert(back.id, Returned { len, output, wrote_more });
        }
    }

    fn sleep_until_used(&self, deadline: Instant) {
        // used_event: "call me for the element after the ones that I have seen".
        let event = AVAIL_RING + 4 + u64::from(self.options.size) * 2;
        let event = GuestAddress(self.at + event);
        self.mem.store(self.last_used, event, Ordering::Relaxed).unwrap();
        fence(Ordering::SeqCst);
        if self.load(USED_RING + 2) != self.last_used {
            return;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let mut events = [EpollEvent::default()];
        let ready = self.call_epoll.wait(left.as_millis() as i32, &mut events);
        assert!(!matches!(ready, Ok(0)), "hang: no call; {} chains out", self.outstanding.len());
        let _ = self.call.read();
    }
}

impl Ring for Queue {
    fn options(&self) -> DriverOptions {
        self.options
    }

    fn host_addresses(&self) -> [u64; 3] {
        [0, AVAIL_RING, USED_RING]
            .map(|ring| self.mem.get_host_address(GuestAddress(self.at + ring)).unwrap() as u64)
    }

    fn fresh_kick(&mut self) -> EventFd {
        self.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        self.kick.try_clone().unwrap()
    }

    fn call(&self) -> EventFd {
        self.call.try_clone().unwrap()
    }
}
