// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: one descriptor chain, checked and taken. Knows no device.
//!
//! [`parse`] checks the shape of a chain once: its length, its order, its end. Whether its addresses
//! are guest memory is looked at when they are used, since the memory table may change in between. What is
//! loaded and stored here lies in RAM (`ram.rs`).

use std::ops::Deref;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend};
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use crate::ring::{Epoch, Ring, Touching};

/// What a reply of virtio-fs begins with.
pub type Header = [u8; 16];

/// Bytes in a request of virtio-pmem, and in its reply.
pub const WORD_BYTES: usize = 4;

/// What is wrong with a chain. The guest's fault: it is answered, counted, and never fatal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// The head is no index into the descriptor table. It can't be returned: the used ring has no word for it.
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
    /// So many of them come first, and are to be read.
    readable: usize,
}

/// The first `most` bytes of `segments`, as one address for each byte: the driver may split at will.
fn addresses(segments: &[Segment], most: usize) -> Result<Vec<GuestAddress>, Malformed> {
    let mut found = Vec::with_capacity(most);
    for segment in segments {
        let want = (most - found.len()).min(segment.bytes as usize) as u64;
        for i in 0..want {
            let bad = Malformed::Address(segment.at.raw_value());
            found.push(segment.at.checked_add(i).ok_or(bad)?);
        }
    }
    Ok(found)
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
    fn word(&self, mem: &GuestMemoryMmap) -> Result<u32, Malformed> {
        let mut word = [0; WORD_BYTES];
        let request = addresses(self.readable(), WORD_BYTES)?;
        for (byte, at) in word.iter_mut().zip(&request) {
            *byte = mem.read_obj(*at).map_err(|_| Malformed::Address(at.raw_value()))?;
        }
        let reply = self.reply(mem)?;
        if request.len() < WORD_BYTES {
            return Err(Malformed::ShortRequest(request.len()));
        }
        if reply.len() < WORD_BYTES {
            return Err(Malformed::ShortReply(reply.len()));
        }
        Ok(u32::from_le_bytes(word))
    }

    fn reply(&self, mem: &GuestMemoryMmap) -> Result<Vec<GuestAddress>, Malformed> {
        let reply = addresses(self.writable(), WORD_BYTES)?;
        match reply.iter().find(|at| !mem.address_in_range(**at)) {
            Some(bad) => Err(Malformed::Address(bad.raw_value())),
            None => Ok(reply),
        }
    }

    /// Stores `pieces`, one behind the other, from the start of the reply on, as far as there is room and guest
    /// memory. Returns how many bytes were stored.
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
                // The table may have changed since the request was taken: then they have no place to go.
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

/// A checked chain, or what there is of one that went wrong: it is answered all the same if it can be.
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

/// One request, taken from a ring. It must be completed; one that is dropped instead stays open until
/// the ring is reset (and is handed back at the next stop where the device [wants that](crate::ring::AtStop)).
#[must_use = "a request that is never completed stays open until the ring is reset"]
pub struct Request {
    pub(crate) ring: Arc<Ring>,
    pub(crate) epoch: Epoch,
    pub(crate) window_lost: bool,
    pub(crate) head: u16,
    pub(crate) parsed: Parsed,
    pub(crate) touching: Option<Touching>,
}

impl Request {
    /// The guest has no window: what it stored is nowhere, so no promise can be made about it.
    pub fn window_lost(&self) -> bool {
        self.window_lost
    }

    /// The request's le32, or what is wrong with the chain.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn word(&self) -> Result<u32, Malformed> {
        match self.parsed.fault {
            Some(fault) => Err(fault),
            None => self.parsed.chain.word(&self.ram()),
        }
    }

    /// The buffers.
    ///
    /// # Errors
    /// What is wrong with the chain.
    pub fn chain(&self) -> Result<&Chain, Malformed> {
        match self.parsed.fault {
            Some(fault) => Err(fault),
            None => Ok(&self.parsed.chain),
        }
    }

    /// The guest's memory as it is now, windows and all: for system calls. To touch it otherwise may end the
    /// process.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.ring.memory().all()
    }

    /// The part of it that may be loaded from and stored to.
    pub fn ram(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.ring.memory().ram()
    }

    /// Keeps the ring from being stopped until this request is completed or [lets go](Self::let_go): until
    /// then it may read and write the guest's memory. Waits while the ring is stopped. False if it
    /// was reset meanwhile: then the request is void.
    ///
    /// Until then nothing may wait for the front-end, which waits for the stop.
    #[must_use = "without it guest memory must be left alone"]
    pub fn touch(&mut self) -> bool {
        if self.touching.is_none() {
            self.touching = Ring::touch(&self.ring, self.epoch);
        }
        self.touching.is_some()
    }

    /// The same, for who must not wait: false also while the ring is stopped.
    #[must_use = "without it guest memory must be left alone"]
    pub fn touch_now(&mut self) -> bool {
        if self.touching.is_none() {
            self.touching = Ring::touch_now(&self.ring, self.epoch);
        }
        self.touching.is_some()
    }

    /// Ends what [`touch`](Self::touch) began.
    pub fn let_go(&mut self) {
        self.touching = None;
    }

    /// Answers with the le32 `status` and returns the chain to the driver.
    ///
    /// Does nothing if the ring was stopped since the request was taken: it was handed back.
    pub fn complete(self, status: u32) {
        // One address that is no memory, and the chain gets no status at all.
        let room = self.parsed.chain.reply(&self.ram());
        let whole = room.is_ok_and(|room| room.len() == WORD_BYTES)
            && !matches!(self.word(), Err(Malformed::Address(_)));
        let reply = if whole { status.to_le_bytes().to_vec() } else { Vec::new() };
        self.complete_with(None, reply, 0);
    }

    /// Stores the `header` of a reply and its `body`, behind which `behind` bytes have been stored already,
    /// and returns the chain to the driver. If the ring is stopped meanwhile, that is done when it goes on.
    pub fn complete_with(self, header: Option<Header>, body: Vec<u8>, behind: u32) {
        let returnable = !matches!(self.parsed.fault, Some(Malformed::Head(_)));
        let answer = Answer {
            head: returnable.then_some(self.head),
            chain: self.parsed.chain,
            header,
            body,
            behind,
        };
        self.ring.complete(self.epoch, answer);
        drop(self.touching); // Now the ring may be stopped.
    }
}

/// What a chain goes back to the driver with.
pub(crate) struct Answer {
    /// None: it has no place in the used ring.
    pub(crate) head: Option<u16>,
    chain: Chain,
    header: Option<Header>,
    body: Vec<u8>,
    behind: u32,
}

impl Answer {
    /// Stores the reply. Returns what the used ring says of its length.
    pub(crate) fn store(&self, mem: &GuestMemoryMmap) -> u32 {
        let header = self.header.as_ref().map_or(&[][..], |header| header);
        self.chain.store(mem, [header, &self.body]) + self.behind
    }
}
