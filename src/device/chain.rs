// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One descriptor chain, checked once. Knows no ring.
//!
//! [`parse`] checks the shape of a chain: its length, its order, its end. Whether its addresses are
//! guest memory is checked at each access, since the memory table may change in between. The loads
//! and stores of this file go to RAM only (`memory.rs`).

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Length of a virtio-pmem request, and of its reply, in bytes.
pub const WORD_BYTES: usize = 4;

/// The fault of a malformed chain. The guest has caused it: the chain is returned and counted, and
/// the daemon goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The head is no index of the descriptor table. The chain can't be returned: an element of the
    /// used ring names a head.
    #[error("head {0} is outside the descriptor table")]
    Head(u16),
    /// The chain is empty, loops, leaves its table, or nests indirect tables.
    #[error("the chain loops or leaves its table")]
    Broken,
    /// The chain has more descriptors than the queue (virtio 1.4 sections 2.7.5.2 and 2.7.5.3.1).
    #[error("the chain is longer than the queue")]
    TooLong,
    /// A device-readable descriptor follows a device-writable one (virtio 1.4 section 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A buffer is not, or not completely, guest memory.
    #[error("address {0:#x} is not guest memory")]
    Address(u64),
    /// The chain has fewer than [`WORD_BYTES`] readable bytes.
    #[error("the request has {0} bytes, not {WORD_BYTES}")]
    ShortRequest(usize),
    /// The chain has fewer than [`WORD_BYTES`] writable bytes: a status does not fit.
    #[error("the reply has room for {0} bytes, not {WORD_BYTES}")]
    ShortReply(usize),
}

/// One buffer of a chain; its address is not checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// The guest-physical address.
    pub at: GuestAddress,
    /// The length in bytes.
    pub bytes: u32,
}

/// The buffers of a chain, in the order of its descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    segments: Vec<Segment>,
    /// Number of device-readable segments. They precede the device-writable ones.
    readable: usize,
}

impl Chain {
    /// The device-readable buffers: the request.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// The device-writable buffers: room for the reply.
    pub fn writable(&self) -> &[Segment] {
        self.segments.get(self.readable..).unwrap_or_default()
    }

    fn take(&mut self, desc: &Descriptor) -> Result<(), Malformed> {
        if !desc.is_write_only() {
            if self.readable < self.segments.len() {
                return Err(Malformed::Order);
            }
            self.readable += 1;
        }
        self.segments.push(Segment { at: desc.addr(), bytes: desc.len() });
        Ok(())
    }

    /// The le32 of a virtio-pmem request, if the chain also has room for the le32 of its reply.
    pub(crate) fn read_le32(&self, mem: &GuestMemoryMmap) -> Result<u32, Malformed> {
        let mut word = [0; WORD_BYTES];
        let loaded = self.load(mem, &mut word)?;
        let room = self.word_room(mem)?;
        if loaded < WORD_BYTES {
            return Err(Malformed::ShortRequest(loaded));
        }
        if room < WORD_BYTES {
            return Err(Malformed::ShortReply(room));
        }
        Ok(u32::from_le_bytes(word))
    }

    /// Loads the first bytes of the request into `to`, and returns the number of bytes loaded. (The
    /// `Reader` of virtio-queue is not used: it reads the descriptors a second time, and the driver
    /// may have changed them since their check.)
    fn load(&self, mem: &GuestMemoryMmap, to: &mut [u8]) -> Result<usize, Malformed> {
        let mut loaded = 0;
        for Segment { at, bytes } in self.readable() {
            let Some(rest) = to.get_mut(loaded..) else { break };
            let now = rest.len().min(*bytes as usize);
            let (part, _) = rest.split_at_mut(now);
            mem.read_slice(part, *at).map_err(|_| Malformed::Address(at.raw_value()))?;
            loaded += now;
        }
        Ok(loaded)
    }

    /// Number of writable bytes, at most [`WORD_BYTES`].
    pub(crate) fn word_room(&self, mem: &GuestMemoryMmap) -> Result<usize, Malformed> {
        let mut room = 0;
        for Segment { at, bytes } in self.writable() {
            let now = (WORD_BYTES - room).min(*bytes as usize);
            if now > 0 && !GuestMemoryBackend::check_range(mem, *at, now) {
                return Err(Malformed::Address(at.raw_value()));
            }
            room += now;
        }
        Ok(room)
    }

    /// Stores `pieces` one after another from the start of the writable buffers. Stops where the
    /// room or the guest memory ends. Returns the number of bytes stored.
    pub(crate) fn store(&self, mem: &GuestMemoryMmap, pieces: [&[u8]; 2]) -> u32 {
        let mut stored = 0;
        let mut segments = self.writable().iter();
        let mut room = Segment { at: GuestAddress(0), bytes: 0 };
        for mut rest in pieces {
            while !rest.is_empty() {
                if room.bytes == 0 {
                    let Some(next) = segments.next() else { return stored };
                    room = *next;
                    continue;
                }
                let (now, later) = rest.split_at(rest.len().min(room.bytes as usize));
                // Fails if the memory table has changed since the request was taken, and the buffer
                // is not in it.
                if mem.write_slice(now, room.at).is_err() {
                    return stored;
                }
                let bytes = now.len() as u32;
                room =
                    Segment { at: room.at.unchecked_add(bytes.into()), bytes: room.bytes - bytes };
                stored += bytes;
                rest = later;
            }
        }
        stored
    }
}

/// A checked chain, or the buffers of a malformed chain up to its fault: a malformed chain is
/// returned to the driver, too, if its head is valid.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The buffers up to the fault.
    pub chain: Chain,
    /// The fault, if the chain is malformed.
    pub fault: Option<Malformed>,
}

/// Checks one chain of a queue of `queue_size` descriptors.
pub fn parse<M>(chain: DescriptorChain<M>, queue_size: u16) -> Parsed
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    let head = chain.head_index();
    let mut taken = Chain::default();
    let fault = if head >= queue_size {
        Some(Malformed::Head(head))
    } else {
        walk(chain, queue_size, &mut taken).err()
    };
    Parsed { chain: taken, fault }
}

fn walk<M>(chain: DescriptorChain<M>, queue_size: u16, taken: &mut Chain) -> Result<(), Malformed>
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    // The iterator ends without an error where a chain is broken. The last descriptor shows that:
    // it still names a next one.
    let mut open = true;
    for (i, desc) in chain.enumerate() {
        if i >= usize::from(queue_size) {
            return Err(Malformed::TooLong);
        }
        open = desc.has_next();
        taken.take(&desc)?;
    }
    if open { Err(Malformed::Broken) } else { Ok(()) }
}
