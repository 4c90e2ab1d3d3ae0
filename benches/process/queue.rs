// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A virtqueue driver with little overhead. It has fixed slots. Each slot has buffers laid out as
//! Linux lays out a FUSE request (headers and arguments, then the data page by page) and an
//! indirect table. It uses EVENT_IDX, and waits by a blocking read of the call eventfd. Of a reply
//! it checks only the error.

use testkit::fuse_abi::{IN_HEADER, OUT_HEADER, in_header};
use testkit::memory::GuestMem;
use testkit::strict_vmm::Ring;
pub use testkit::virtqueue::RINGS_BYTES;
use testkit::virtqueue::{Desc, DriverOptions, MOST_SIZE, Virtqueue};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

/// Chains of 1 MiB of pages are longer than QEMU's usual 128: the longest chain is the queue's
/// size.
const SIZE: u16 = MOST_SIZE;
const PAGE: u64 = 4096;
/// In a slot: the table, the request's head, the reply's header, its body, and the data.
const HEAD_AT: u64 = 2 * PAGE;
const REPLY_AT: u64 = 3 * PAGE;
const BODY_AT: u64 = 4 * PAGE;
const DATA_AT: u64 = 5 * PAGE;
const MOST_DATA: u64 = 1 << 20;
const SLOT_BYTES: u64 = DATA_AT + MOST_DATA;

/// How many requests a queue can have in flight.
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

/// The driver of one queue: the chain of slot `n` begins with descriptor `n`.
pub struct QueueDriver {
    queue: Virtqueue,
    slots_at: u64,
    posted: u64,
}

impl QueueDriver {
    /// A queue whose rings are at `at` and whose slots are at `slots_at`. Queues may share their
    /// slots if only one of them is used at a time.
    pub fn new(mem: GuestMem, at: u64, slots_at: u64) -> Self {
        let options = DriverOptions { size: SIZE, ..DriverOptions::default() };
        Self { queue: Virtqueue::new(mem, at, options), slots_at, posted: 0 }
    }

    fn slot(&self, slot: usize) -> u64 {
        self.slots_at + slot as u64 * SLOT_BYTES
    }

    /// Puts a request into the ring; [`kick`](Self::kick) makes it visible to the device.
    pub fn post(&mut self, slot: usize, request: &Request) {
        let at = self.slot(slot);
        let args = request.args.len() as u32;
        let bytes = IN_HEADER as u32 + args + request.data_in;
        self.posted += 1;
        let head = in_header(bytes, request.opcode, self.posted, request.nodeid);
        let mem = &self.queue.mem;
        mem.write_slice(&head, GuestAddress(at + HEAD_AT)).unwrap();
        let args_at = at + HEAD_AT + IN_HEADER as u64;
        mem.write_slice(&request.args, GuestAddress(args_at)).unwrap();
        let mut descs = vec![Desc::read(at + HEAD_AT, IN_HEADER as u32)];
        descs.extend((args > 0).then(|| Desc::read(args_at, args)));
        descs.extend(pages(at + DATA_AT, request.data_in, Desc::read));
        if let Some(body) = request.body {
            descs.push(Desc::write(at + REPLY_AT, OUT_HEADER as u32));
            descs.extend((body > 0).then(|| Desc::write(at + BODY_AT, body)));
            descs.extend(pages(at + DATA_AT, request.data_out, Desc::write));
        }
        self.queue.write_indirect(slot as u16, at, &descs);
        let _ = self.queue.add_kept(slot as u16);
    }

    /// Publishes the posted requests, and kicks if the device asks for it (EVENT_IDX).
    pub fn kick(&mut self) {
        self.queue.publish();
        self.queue.kick();
    }

    /// Waits until the device has used descriptors, and collects their slots.
    pub fn reap(&mut self, slots: &mut Vec<usize>) {
        slots.clear();
        let deadline = Virtqueue::deadline();
        loop {
            while let Some(used) = self.queue.pop_used() {
                slots.push(usize::from(used.head));
            }
            if !slots.is_empty() {
                // As Linux does after each buffer.
                self.queue.ask_for_call();
                return;
            }
            self.queue.sleep_until_used(deadline);
        }
    }

    /// The first `bytes` bytes of a reply's body. The reply must not be an error.
    pub fn body(&self, slot: usize, bytes: usize) -> Vec<u8> {
        self.check(slot);
        let mut body = vec![0u8; bytes];
        self.queue.mem.read_slice(&mut body, GuestAddress(self.slot(slot) + BODY_AT)).unwrap();
        body
    }

    /// Asserts that a reply is not an error.
    pub fn check(&self, slot: usize) {
        let error = GuestAddress(self.slot(slot) + REPLY_AT + 4);
        let error: i32 = self.queue.mem.read_obj(error).unwrap();
        assert_eq!(error, 0, "a request of the bench failed");
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

/// Data as Linux describes it: a descriptor for each page.
fn pages(at: u64, bytes: u32, desc: fn(u64, u32) -> Desc) -> impl Iterator<Item = Desc> {
    (0..bytes)
        .step_by(PAGE as usize)
        .map(move |from| desc(at + u64::from(from), (bytes - from).min(PAGE as u32)))
}

impl Ring for QueueDriver {
    fn options(&self) -> DriverOptions {
        self.queue.options()
    }

    fn host_addresses(&self) -> [u64; 3] {
        self.queue.host_addresses()
    }

    fn fresh_kick(&mut self) -> EventFd {
        self.queue.fresh_kick()
    }

    fn call(&self) -> EventFd {
        self.queue.call()
    }
}
