// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's side of one of several virtqueues, for requests and replies of any length. It obeys
//! the virtio rules, as Linux does; a test of a hostile guest passes its own descriptors.

use std::collections::HashMap;
use std::ops::{Deref, DerefMut};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMem;
use crate::strict_vmm::Ring;
use crate::virtqueue::{Desc, DriverOptions, Offered, Virtqueue};

/// Guest memory of one queue in bytes: its rings, then its slots.
pub const QUEUE_BYTES: u64 = 8 << 20;
/// Offset of the slots in the queue's memory, in bytes.
const SLOTS: u64 = 0x1_0000;
/// Memory of one chain in bytes: an indirect table, the device-readable part, the device-writable
/// part.
const SLOT_BYTES: u64 = 0x4_0000;
/// Number of slots: limit on the chains in flight.
const NUM_SLOTS: u64 = 24;
/// Offset of the device-readable part in a slot, in bytes.
const IN_AT: u64 = 0x1000;
/// Offset of the device-writable part in a slot, in bytes.
const OUT_AT: u64 = 0x2_0000;
/// Limit on the device-readable bytes of a slot, and on the device-writable ones.
pub const MOST_BYTES: usize = 0x1_f000;
/// The content of a reply byte before the device has written it.
const UNWRITTEN: u8 = 0x5a;

/// Guest memory outside the slots: an address, and a length in bytes.
pub type Extern = (u64, u32);

/// A chain to offer.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    /// Device-readable data in the slot, one descriptor per element.
    pub input: Vec<Vec<u8>>,
    /// Device-readable memory outside the slot; these descriptors follow those of `input`.
    pub input_at: Vec<Extern>,
    /// Lengths in bytes of the device-writable descriptors in the slot.
    pub output: Vec<usize>,
    /// Device-writable memory outside the slot; these descriptors follow those of `output`.
    pub output_at: Vec<Extern>,
}

/// A chain that the device has returned.
#[derive(Debug, Clone)]
pub struct Returned {
    /// The used element's length.
    pub len: u32,
    /// The slot's output, as far as the used element's length reaches.
    pub output: Vec<u8>,
    /// Whether the device has written beyond that length in the slot.
    pub wrote_more: bool,
}

/// The memory of one chain, and the number of its device-writable bytes.
struct Slot {
    at: u64,
    output: usize,
}

/// The guest's side of one queue.
pub struct Queue {
    ring: Virtqueue,
    at: u64,
    free_slots: Vec<u64>,
    slots: HashMap<Offered, Slot>,
    returned: HashMap<Offered, Returned>,
}

impl Deref for Queue {
    type Target = Virtqueue;

    fn deref(&self) -> &Virtqueue {
        &self.ring
    }
}

impl DerefMut for Queue {
    fn deref_mut(&mut self) -> &mut Virtqueue {
        &mut self.ring
    }
}

impl Queue {
    /// A queue whose memory begins at guest address `at`.
    pub fn new(mem: GuestMem, at: u64, options: DriverOptions) -> Self {
        let ring = Virtqueue::new(mem, at, options);
        let (slots, returned) = (HashMap::new(), HashMap::new());
        let mut queue = Self { ring, at, free_slots: Vec::new(), slots, returned };
        queue.reset();
        queue
    }

    /// Resets the driver's state, as after a device reset: new rings, no outstanding chain.
    pub fn reset(&mut self) {
        self.ring.reset(self.ring.options());
        self.free_slots = (0..NUM_SLOTS).rev().map(|i| self.at + SLOTS + i * SLOT_BYTES).collect();
        self.slots.clear();
        self.returned.clear();
    }

    /// Makes a chain available and kicks.
    pub fn offer(&mut self, chain: &Chain) -> Offered {
        self.collect();
        let at = self.free_slots.pop().expect("too many chains in flight");
        let output = chain.output.iter().sum();
        let descs = self.lay_out(at, chain);
        assert!(!descs.is_empty(), "a chain of nothing");
        self.mem.write_slice(&vec![UNWRITTEN; MOST_BYTES], GuestAddress(at + OUT_AT)).unwrap();
        let descs = self.ring.write_chain(at, &descs);
        let offered = self.ring.offer(descs);
        self.slots.insert(offered, Slot { at, output });
        self.ring.kick();
        offered
    }

    fn lay_out(&self, slot: u64, chain: &Chain) -> Vec<Desc> {
        let mut descs = Vec::new();
        let mut at = slot + IN_AT;
        for part in &chain.input {
            self.mem.write_slice(part, GuestAddress(at)).unwrap();
            descs.push(Desc::read(at, part.len() as u32));
            at += part.len() as u64;
        }
        assert!(at <= slot + IN_AT + MOST_BYTES as u64, "too much to read for a slot");
        descs.extend(chain.input_at.iter().map(|&(addr, len)| Desc::read(addr, len)));
        let mut at = slot + OUT_AT;
        for &len in &chain.output {
            descs.push(Desc::write(at, len as u32));
            at += len as u64;
        }
        assert!(at <= slot + OUT_AT + MOST_BYTES as u64, "too much to write for a slot");
        descs.extend(chain.output_at.iter().map(|&(addr, len)| Desc::write(addr, len)));
        descs
    }

    /// Waits until the device returns the chain.
    pub fn wait(&mut self, offered: Offered) -> Returned {
        let deadline = Virtqueue::deadline();
        loop {
            self.collect();
            if let Some(returned) = self.returned.remove(&offered) {
                return returned;
            }
            self.ring.sleep_until_used(deadline);
        }
    }

    /// Whether the chain has been returned. Does not wait.
    pub fn is_returned(&mut self, offered: Offered) -> bool {
        self.collect();
        self.returned.contains_key(&offered)
    }

    /// The number of chains that are offered and not returned.
    pub fn outstanding(&mut self) -> usize {
        self.collect();
        self.slots.len()
    }

    fn collect(&mut self) {
        while let Some(used) = self.ring.pop_used() {
            let slot = self.slots.remove(&used.offered).expect("a chain has a slot");
            let mut output = vec![0u8; MOST_BYTES];
            self.ring.mem.read_slice(&mut output, GuestAddress(slot.at + OUT_AT)).unwrap();
            let reported = slot.output.min(used.len as usize);
            let wrote_more = output[reported..].iter().any(|&byte| byte != UNWRITTEN);
            output.truncate(reported);
            self.free_slots.push(slot.at);
            self.returned.insert(used.offered, Returned { len: used.len, output, wrote_more });
        }
    }
}

impl Ring for Queue {
    fn options(&self) -> DriverOptions {
        self.ring.options()
    }

    fn host_addresses(&self) -> [u64; 3] {
        self.ring.host_addresses()
    }

    fn fresh_kick(&mut self) -> EventFd {
        self.ring.fresh_kick()
    }

    fn call(&self) -> EventFd {
        self.ring.call()
    }
}
