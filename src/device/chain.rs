// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One descriptor chain, checked once. Knows no ring.
//!
//! [`parse`] checks the shape of a chain: its length, its order, its end. Whether its addresses are
//! guest memory is looked at when they are used, since the memory table may change in between. What
//! is loaded and stored here lies in RAM (`memory.rs`).

use std::ops::Deref;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Bytes in a request of virtio-pmem, and in its reply.
pub const WORD_BYTES: usize = 4;

/// What is wrong with a chain. The guest's fault: it is answered, counted, and never fatal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The head is no index into the descriptor table. It can't be returned: the used ring has no
    /// word for it.
    #[error("head {0} is outside the descriptor table")]
    Head(u16),
    /// The chain is empty, loops, leaves its table, or nests indirect tables.
    #[error("the chain loops or leaves its table")]
    Broken,
    /// More descriptors than the queue has (virtio 1.4 sections 2.7.5.2 and 2.7.5.3.1).
    #[error("the chain is longer than the queue")]
    TooLong,
    /// A device-readable descriptor behind a device-writable one (virtio 1.4 section 2.7.4.2).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// A buffer that is not, or not wholly, guest memory.
    #[error("address {0:#x} is not guest memory")]
    Address(u64),
    /// Fewer than [`WORD_BYTES`] readable bytes.
    #[error("the request has {0} bytes, not {WORD_BYTES}")]
    ShortRequest(usize),
    /// Fewer than [`WORD_BYTES`] writable bytes: there is no room for a status.
    #[error("the reply has room for {0} bytes, not {WORD_BYTES}")]
    ShortReply(usize),
}

/// One buffer of a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Where it begins. Not checked.
    pub at: GuestAddress,
    /// How long it is.
    pub bytes: u32,
}

/// The buffers of a chain, in the driver's order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Chain {
    segments: Vec<Segment>,
    /// Number of device-readable segments, which stand before the device-writable ones.
    readable: usize,
}

impl Chain {
    /// The request.
    pub fn readable(&self) -> &[Segment] {
        self.segments.get(..self.readable).unwrap_or_default()
    }

    /// The room for the reply.
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

    /// The request's le32, if the chain also has room for a reply of that length.
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

    /// Loads the first bytes of the request into `to`, and returns how many bytes there were.
    /// (virtio-queue's `Reader` would read the descriptors a second time, which the driver may have
    /// changed since they were checked.)
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

    /// How many bytes of a reply of [`WORD_BYTES`] have room.
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

    /// Stores `pieces`, one behind the other, from the start of the reply on, as far as there is
    /// room and guest memory. Returns how many bytes were stored.
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
                // The table may have changed since the request was taken: then they have no place
                // to go.
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

/// A checked chain, or what there is of one that went wrong: it is answered all the same if it can
/// be.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The buffers.
    pub chain: Chain,
    /// What is wrong with the chain.
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
    // The iterator ends without a word where a chain goes wrong; a last descriptor that
    // still names a next one gives that away.
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
