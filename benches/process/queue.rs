// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue driver with little overhead. It has fixed slots. Each slot has buffers laid out as
//! Linux lays out a FUSE request (headers and arguments, then the data page by page) and an
//! indirect table. It uses EVENT_IDX, and waits by a blocking read of the call eventfd. Of a reply
//! it checks only the error.

use std::sync::atomic::{Ordering, fence};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use crate::common::driver::{DriverOptions, INDIRECT, NEXT, WRITE};
use crate::common::fuse_abi::{IN_HEADER, OUT_HEADER, in_header};
use crate::common::memory::GuestMem;
use crate::common::strict_vmm::Ring;

/// The queue size is the limit of a chain's length, and a chain with 1 MiB of pages is longer than
/// QEMU's usual queue size of 128.
const SIZE: u16 = 1024;
const PAGE: u64 = 4096;
const AVAIL_RING: u64 = 0x4000;
const USED_RING: u64 = 0x6000;
/// Offsets in a slot: the indirect table is at 0, then the request's headers, the reply's header,
/// its body, and the data.
const HEAD_AT: u64 = 2 * PAGE;
const REPLY_AT: u64 = 3 * PAGE;
const BODY_AT: u64 = 4 * PAGE;
const DATA_AT: u64 = 5 * PAGE;
const MOST_DATA: u64 = 1 << 20;
const SLOT_BYTES: u64 = DATA_AT + MOST_DATA;

/// Bytes of guest memory for a queue's rings.
pub const RINGS_BYTES: u64 = 0x9000;

/// Number of requests that a queue can have in flight.
pub const DEPTH: usize = 32;
/// Bytes of guest memory for a queue's slots.
pub const SLOTS_BYTES: u64 = DEPTH as u64 * SLOT_BYTES;

/// A request: the message, and the numbers of data bytes in and out.
pub struct Request {
    pub opcode: u32,
    pub nodeid: u64,
    pub args: Vec<u8>,
    /// Number of bytes of the slot's data that belong to the request.
    pub data_in: u32,
    /// Size of the reply's body; `None` for FORGET, which has no reply.
    pub body: Option<u32>,
    /// Size of the data after the reply's header, in the slot's data pages.
    pub data_out: u32,
}

impl Request {
    /// A request with arguments and a reply of at most `body` bytes.
    pub fn new(opcode: u32, nodeid: u64, args: Vec<u8>, body: usize) -> Self {
        Self { opcode, nodeid, args, data_in: 0, body: Some(body as u32), data_out: 0 }
    }
}

/// The driver of one queue.
pub struct QueueDriver {
    mem: GuestMem,
    at: u64,
    slots_at: u64,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
    kick: EventFd,
    call: EventFd,
}

impl QueueDriver {
    /// A queue whose rings are at `at` and whose slots are at `slots_at`. Queues may share their
    /// slots if only one of them is used at a time.
    pub fn new(mem: GuestMem, at: u64, slots_at: u64) -> Self {
        mem.write_slice(&[0u8; RINGS_BYTES as usize], GuestAddress(at)).unwrap();
        let call = EventFd::new(0).unwrap();
        let kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self { mem, at, slots_at, next_avail: 0, kicked: 0, last_used: 0, kick, call }
    }

    fn slot(&self, slot: usize) -> u64 {
        self.slots_at + slot as u64 * SLOT_BYTES
    }

    /// Puts a request into the ring; [`kick`](Self::kick) makes it visible to the device.
    pub fn post(&mut self, slot: usize, request: &Request) {
        let at = self.slot(slot);
        let args = request.args.len() as u32;
        let bytes = IN_HEADER as u32 + args + request.data_in;
        let unique = u64::from(self.next_avail) << 8 | slot as u64;
        let head = in_header(bytes, request.opcode, unique, request.nodeid);
        self.mem.write_slice(&head, GuestAddress(at + HEAD_AT)).unwrap();
        let args_at = at + HEAD_AT + IN_HEADER as u64;
        self.mem.write_slice(&request.args, GuestAddress(args_at)).unwrap();
        let mut descs = vec![(at + HEAD_AT, IN_HEADER as u32, 0)];
        descs.extend((args > 0).then_some((args_at, args, 0)));
        pages(&mut descs, at + DATA_AT, request.data_in, 0);
        if let Some(body) = request.body {
            descs.push((at + REPLY_AT, OUT_HEADER as u32, WRITE));
            descs.extend((body > 0).then_some((at + BODY_AT, body, WRITE)));
            pages(&mut descs, at + DATA_AT, request.data_out, WRITE);
        }
        self.write_table(slot, &descs);
        let index = u64::from(self.next_avail % SIZE);
        let entry = GuestAddress(self.at + AVAIL_RING + 4 + index * 2);
        self.mem.write_obj(slot as u16, entry).unwrap();
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    fn write_table(&self, slot: usize, descs: &[(u64, u32, u16)]) {
        let at = self.slot(slot);
        let mut table = Vec::with_capacity(descs.len() * 16);
        for (i, &(addr, len, flags)) in descs.iter().enumerate() {
            let more = if i + 1 < descs.len() { NEXT } else { 0 };
            table.extend_from_slice(&addr.to_le_bytes());
            table.extend_from_slice(&len.to_le_bytes());
            table.extend_from_slice(&(flags | more).to_le_bytes());
            table.extend_from_slice(&(i as u16 + 1).to_le_bytes());
        }
        self.mem.write_slice(&table, GuestAddress(at)).unwrap();
        let desc = GuestAddress(self.at + slot as u64 * 16);
        self.mem.write_obj(at, desc).unwrap();
        self.mem.write_obj(table.len() as u32, GuestAddress(desc.0 + 8)).unwrap();
        self.mem.write_obj(u32::from(INDIRECT), GuestAddress(desc.0 + 12)).unwrap();
    }

    /// Publishes the posted requests, and kicks if the device asks for it (EVENT_IDX).
    pub fn kick(&mut self) {
        let index = GuestAddress(self.at + AVAIL_RING + 2);
        self.mem.store(self.next_avail, index, Ordering::Release).unwrap();
        fence(Ordering::SeqCst);
        let event = GuestAddress(self.at + USED_RING + 4 + u64::from(SIZE) * 8);
        let event: u16 = self.mem.load(event, Ordering::Acquire).unwrap();
        let (new, old) = (self.next_avail, self.kicked);
        self.kicked = new;
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            self.kick.write(1).unwrap();
        }
    }

    /// Waits until the device has used descriptors, and collects their slots.
    pub fn reap(&mut self, slots: &mut Vec<usize>) {
        slots.clear();
        loop {
            let index = GuestAddress(self.at + USED_RING + 2);
            let used: u16 = self.mem.load(index, Ordering::Acquire).unwrap();
            while self.last_used != used {
                let index = u64::from(self.last_used % SIZE);
                let element = GuestAddress(self.at + USED_RING + 4 + index * 8);
                slots.push(self.mem.read_obj::<u32>(element).unwrap() as usize);
                self.last_used = self.last_used.wrapping_add(1);
            }
            let event = GuestAddress(self.at + AVAIL_RING + 4 + u64::from(SIZE) * 2);
            self.mem.store(self.last_used, event, Ordering::Release).unwrap();
            if !slots.is_empty() {
                return;
            }
            fence(Ordering::SeqCst);
            let used: u16 = self.mem.load(index, Ordering::Acquire).unwrap();
            if used == self.last_used {
                self.call.read().unwrap();
            }
        }
    }

    /// The first `bytes` bytes of a reply's body. The reply must not be an error.
    pub fn body(&self, slot: usize, bytes: usize) -> Vec<u8> {
        self.check(slot);
        let mut body = vec![0u8; bytes];
        self.mem.read_slice(&mut body, GuestAddress(self.slot(slot) + BODY_AT)).unwrap();
        body
    }

    /// Asserts that a reply is not an error.
    pub fn check(&self, slot: usize) {
        let error = GuestAddress(self.slot(slot) + REPLY_AT + 4);
        let error: i32 = self.mem.read_obj(error).unwrap();
        assert_eq!(error, 0, "a request of the benchmark failed");
    }

    /// Sends one request, and waits for the body of its reply.
    pub fn ask(&mut self, request: &Request) -> Vec<u8> {
        self.post(0, request);
        self.kick();
        let mut slots = Vec::new();
        self.reap(&mut slots);
        assert_eq!(slots, [0]);
        self.body(0, request.body.unwrap_or(0) as usize)
    }
}

/// Adds one descriptor per page of data, as Linux does.
fn pages(descs: &mut Vec<(u64, u32, u16)>, at: u64, bytes: u32, flags: u16) {
    for from in (0..bytes).step_by(PAGE as usize) {
        descs.push((at + u64::from(from), (bytes - from).min(PAGE as u32), flags));
    }
}

impl Ring for QueueDriver {
    fn options(&self) -> DriverOptions {
        DriverOptions { size: SIZE, ..DriverOptions::default() }
    }

    fn host_addresses(&self) -> [u64; 3] {
        let host = |offset| {
            self.mem.get_host_address(GuestAddress(self.at + offset)).unwrap().addr() as u64
        };
        [host(0), host(AVAIL_RING), host(USED_RING)]
    }

    fn fresh_kick(&mut self) -> EventFd {
        self.kick = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        self.kick.try_clone().unwrap()
    }

    fn call(&self) -> EventFd {
        self.call.try_clone().unwrap()
    }
}
