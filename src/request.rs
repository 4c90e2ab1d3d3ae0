// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: one descriptor chain, checked and taken. Knows no device.
//!
//! All that the guest wrote passes [`parse`] once. What comes out holds at most four bytes
//! of request and four checked addresses for the reply, however long the chain was:
//! virtio-pmem's request and reply are one le32 each (virtio 1.4 section 5.19.6).

use std::ops::Deref;
use std::sync::Arc;

use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::vring::{Epoch, Ring};

/// Bytes in a request, and in a reply.
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

/// Where the reply goes: one address for each byte, since the driver may split it at will.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyArea([GuestAddress; WORD_BYTES]);

impl ReplyArea {
    /// Stores `value`, little-endian, and returns the number of bytes stored.
    pub(crate) fn store(&self, mem: &GuestMemoryMmap, value: u32) -> u32 {
        let mut stored = 0;
        for (address, byte) in self.0.iter().zip(value.to_le_bytes()) {
            // The table may have changed since parse(): then the byte has no place to go.
            stored += u32::from(mem.write_obj(byte, *address).is_ok());
        }
        stored
    }
}

/// A checked chain.
#[derive(Debug, PartialEq, Eq)]
pub struct Parsed {
    /// The request's word, or what is wrong with the chain.
    pub word: Result<u32, Malformed>,
    /// Where to answer, if the chain has room for an answer (also when `word` is an error).
    pub reply: Option<ReplyArea>,
}

#[derive(Default)]
struct Gather {
    request: Vec<u8>,
    reply: Vec<GuestAddress>,
}

impl Gather {
    fn take(&mut self, mem: &GuestMemoryMmap, desc: &Descriptor) -> Result<(), Malformed> {
        let writable = desc.is_write_only();
        if !writable && !self.reply.is_empty() {
            return Err(Malformed::Order);
        }
        let have = if writable { self.reply.len() } else { self.request.len() };
        let want = (WORD_BYTES - have).min(desc.len() as usize) as u64;
        for i in 0..want {
            let bad = Malformed::Address(desc.addr().raw_value());
            let address = desc.addr().checked_add(i).ok_or(bad)?;
            if writable {
                if !mem.address_in_range(address) {
                    return Err(bad);
                }
                self.reply.push(address);
            } else {
                self.request.push(mem.read_obj(address).map_err(|_| bad)?);
            }
        }
        Ok(())
    }
}

/// Checks one chain of a queue of `queue_size` descriptors.
pub fn parse<M>(chain: DescriptorChain<M>, queue_size: u16) -> Parsed
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    let head = chain.head_index();
    if head >= queue_size {
        return Parsed { word: Err(Malformed::Head(head)), reply: None };
    }
    let mut gather = Gather::default();
    let walked = walk(chain, queue_size, &mut gather);
    let reply = <[GuestAddress; WORD_BYTES]>::try_from(gather.reply.as_slice()).ok();
    let word = walked.and_then(|()| {
        let bytes = <[u8; WORD_BYTES]>::try_from(gather.request.as_slice())
            .map_err(|_| Malformed::ShortRequest(gather.request.len()))?;
        reply.ok_or(Malformed::ShortReply(gather.reply.len()))?;
        Ok(u32::from_le_bytes(bytes))
    });
    Parsed { word, reply: reply.map(ReplyArea) }
}

fn walk<M>(chain: DescriptorChain<M>, queue_size: u16, gather: &mut Gather) -> Result<(), Malformed>
where
    M: Deref<Target = GuestMemoryMmap> + Clone,
{
    let mem = chain.clone();
    // The iterator ends without a word where a chain goes wrong; a last descriptor that
    // still names a next one gives that away.
    let mut open = true;
    for (i, desc) in chain.enumerate() {
        if i >= usize::from(queue_size) {
            return Err(Malformed::TooLong);
        }
        open = desc.has_next();
        gather.take(mem.memory(), &desc)?;
    }
    if open { Err(Malformed::Broken) } else { Ok(()) }
}

/// One request, taken from a ring. It must be [completed](Request::complete); one that is
/// dropped instead stays open, and the ring's next stop hands it back to the driver.
#[must_use = "a request that is never completed stays open until the ring stops"]
pub struct Request {
    pub(crate) ring: Arc<Ring>,
    pub(crate) epoch: Epoch,
    pub(crate) window_lost: bool,
    pub(crate) head: u16,
    pub(crate) parsed: Parsed,
}

impl Request {
    /// The guest has no window: what it stored is nowhere, so no promise can be made about it.
    pub fn window_lost(&self) -> bool {
        self.window_lost
    }

    /// The request's le32, or what is wrong with the chain.
    pub fn word(&self) -> Result<u32, Malformed> {
        self.parsed.word
    }

    /// Answers with `status` and returns the chain to the driver.
    ///
    /// Does nothing if the ring was stopped since the request was taken: it was handed back.
    pub fn complete(self, status: u32) {
        let returnable = !matches!(self.parsed.word, Err(Malformed::Head(_)));
        let head = returnable.then_some(self.head);
        self.ring.complete(self.epoch, head, self.parsed.reply, status);
    }
}
