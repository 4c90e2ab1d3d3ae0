// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's virtio-pmem driver: flushes on one virtqueue, and malformed chains of a hostile
//! driver.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMem;
use crate::strict_vmm::Ring;
use crate::virtqueue::Virtqueue;
pub use crate::virtqueue::{Desc, DriverOptions, INDIRECT, NEXT, Offered, WRITE};

/// Guest address of the rings.
const RINGS: u64 = 0x1000;
/// Layout of each head's memory, in bytes: the request at 0, the reply at 16, the indirect table at
/// 64.
const REQUESTS: u64 = 0x1_0000;
const REQUEST_STRIDE: u64 = 256;
const REPLY_AT: u64 = 16;
const TABLE_AT: u64 = 64;
/// Guest address of memory that tests may use for tables and buffers.
pub const SCRATCH: u64 = 0x10_0000;

/// The content of a reply before the device has written it.
pub const UNANSWERED: u32 = 0x5a5a_5a5a;
/// VIRTIO_PMEM_REQ_TYPE_FLUSH (virtio 1.4 section 5.19.6).
pub const FLUSH: u32 = 0;
/// The status of a successful flush.
pub const OK: u32 = 0;
/// The status of a failed flush: le32 -1. Linux turns it into EIO.
pub const FAILED: u32 = u32::MAX;

/// A chain that the device has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Answer {
    /// The used element's length.
    pub len: u32,
    /// The word at the reply address; [`UNANSWERED`] if the device has not written it.
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

/// The driver.
pub struct Driver {
    queue: Virtqueue,
    answers: HashMap<Offered, Answer>,
}

impl Deref for Driver {
    type Target = Virtqueue;

    fn deref(&self) -> &Virtqueue {
        &self.queue
    }
}

impl DerefMut for Driver {
    fn deref_mut(&mut self) -> &mut Virtqueue {
        &mut self.queue
    }
}

impl Driver {
    /// A driver with empty rings in `mem`.
    pub fn new(mem: GuestMem, options: DriverOptions) -> Self {
        Self { queue: Virtqueue::new(mem, RINGS, options), answers: HashMap::new() }
    }

    /// Resets the driver's state, as after a device reset: new rings, no outstanding chain.
    pub fn reset(&mut self, options: DriverOptions) {
        self.queue.reset(options);
        self.answers.clear();
    }

    /// Makes one flush available, without a kick.
    pub fn add_flush(&mut self) -> Offered {
        let descs = self.take_descs(if self.options().indirect { 1 } else { 2 });
        let head = descs[0];
        let [request, reply] = self.flush_buffers(head);
        if self.options().indirect {
            let table = REQUESTS + u64::from(head) * REQUEST_STRIDE + TABLE_AT;
            self.write_indirect(head, table, &[request, reply]);
        } else {
            self.set_desc(head, Desc { next: descs[1], ..request });
            self.set_desc(descs[1], reply);
        }
        self.offer(descs)
    }

    /// Makes one flush available and kicks.
    pub fn flush(&mut self) -> Offered {
        let flush = self.add_flush();
        self.kick();
        flush
    }

    /// Sends a flush and waits for the answer.
    pub fn flush_and_wait(&mut self) -> Answer {
        let flush = self.flush();
        self.wait(flush)
    }

    /// Waits for the answer to one chain.
    pub fn wait(&mut self, offered: Offered) -> Answer {
        let deadline = Virtqueue::deadline();
        loop {
            self.collect();
            if let Some(answer) = self.answers.remove(&offered) {
                return answer;
            }
            self.queue.sleep_until_used(deadline);
        }
    }

    /// Whether the chain has been answered. Does not wait.
    pub fn is_answered(&mut self, offered: Offered) -> bool {
        self.collect();
        self.answers.contains_key(&offered)
    }

    /// The number of chains that are offered and not returned.
    pub fn outstanding(&mut self) -> usize {
        self.collect();
        self.queue.num_outstanding()
    }

    /// Takes `n` descriptors out of the free list.
    pub fn take_descs(&mut self, n: usize) -> Vec<u16> {
        if self.queue.num_free() < n {
            self.collect();
        }
        self.queue.take_descs(n)
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

    fn collect(&mut self) {
        while let Some(used) = self.queue.pop_used() {
            let reply = REQUESTS + u64::from(used.head) * REQUEST_STRIDE + REPLY_AT;
            let status = self.queue.mem.read_obj(GuestAddress(reply)).unwrap();
            self.answers.insert(used.offered, Answer { len: used.len, status });
        }
    }
}

impl Ring for Driver {
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
