// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One request, and its way back. Knows no ring: a request goes back to its owner (`RequestOwner`).

use std::sync::Arc;

use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use super::chain::{Chain, Malformed, Parsed, WORD_BYTES};
use super::memory::Memory;

/// What a reply of virtio-fs begins with.
pub type Header = [u8; 16];

/// One period in the life of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Epoch(u64);

impl Epoch {
    /// The one behind this one.
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// What a request goes back to: the ring that it was taken from.
pub(crate) trait RequestOwner: Send + Sync {
    /// The guest's memory.
    fn memory(&self) -> &Memory;

    /// Keeps the ring from being stopped, if it runs in `epoch`. `wait`: waits while it is stopped.
    fn pin(self: Arc<Self>, epoch: Epoch, wait: bool) -> Option<PinGuard>;

    /// Ends what one [`pin`](Self::pin) began.
    fn unpin(&self);

    /// Stores the reply, and returns the chain to the driver, if the ring is still in `epoch`.
    fn complete(self: Arc<Self>, epoch: Epoch, answer: Answer);
}

/// While there is one, its ring is not stopped.
pub(crate) struct PinGuard(Arc<dyn RequestOwner>);

impl PinGuard {
    /// The owner has counted it.
    pub(crate) fn new(owner: Arc<dyn RequestOwner>) -> Self {
        Self(owner)
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.0.unpin();
    }
}

/// One request, taken from a ring. It must be completed; one that is dropped instead stays open
/// until the ring is reset (and is handed back at the next stop where the device [wants
/// that](super::InflightPolicy)).
#[must_use = "a request that is never completed stays open until the ring is reset"]
pub struct Request {
    pub(crate) owner: Arc<dyn RequestOwner>,
    pub(crate) epoch: Epoch,
    pub(crate) window_lost: bool,
    pub(crate) head: u16,
    pub(crate) parsed: Parsed,
    pub(crate) pinned: Option<PinGuard>,
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
    pub fn read_le32(&self) -> Result<u32, Malformed> {
        match self.parsed.fault {
            Some(fault) => Err(fault),
            None => self.parsed.chain.read_le32(&self.ram()),
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

    /// The guest's memory as it is now, windows and all: for system calls. To touch it otherwise
    /// may end the process.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.owner.memory().all()
    }

    /// The part of it that may be loaded from and stored to.
    pub fn ram(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.owner.memory().ram()
    }

    /// Keeps the ring from being stopped until this request is completed or
    /// [unpinned](Self::unpin): until then it may read and write the guest's memory. Waits while
    /// the ring is stopped. False if it was reset meanwhile: then the request is void.
    ///
    /// Until then nothing may wait for the front-end, which waits for the stop.
    #[must_use = "without it guest memory must be left alone"]
    pub fn pin(&mut self) -> bool {
        self.pin_with(true)
    }

    /// The same, for who must not wait: false also while the ring is stopped.
    #[must_use = "without it guest memory must be left alone"]
    pub fn pin_now(&mut self) -> bool {
        self.pin_with(false)
    }

    fn pin_with(&mut self, wait: bool) -> bool {
        if self.pinned.is_none() {
            self.pinned = self.owner.clone().pin(self.epoch, wait);
        }
        self.pinned.is_some()
    }

    /// Ends what [`pin`](Self::pin) began.
    pub fn unpin(&mut self) {
        self.pinned = None;
    }

    /// Answers with the le32 `status` and returns the chain to the driver.
    ///
    /// Does nothing if the ring was stopped since the request was taken: it was handed back.
    pub fn complete(self, status: u32) {
        // One address that is no memory, and the chain gets no status at all.
        let room = self.parsed.chain.word_room(&self.ram());
        let whole =
            room == Ok(WORD_BYTES) && !matches!(self.read_le32(), Err(Malformed::Address(_)));
        let reply = if whole { status.to_le_bytes().to_vec() } else { Vec::new() };
        self.complete_with(None, reply, 0);
    }

    /// Stores the `header` of a reply and its `body`, behind which `behind` bytes have been stored
    /// already, and returns the chain to the driver. If the ring is stopped meanwhile, that is done
    /// when it goes on.
    pub fn complete_with(self, header: Option<Header>, body: Vec<u8>, behind: u32) {
        let returnable = !matches!(self.parsed.fault, Some(Malformed::Head(_)));
        let answer = Answer {
            head: returnable.then_some(self.head),
            chain: self.parsed.chain,
            header,
            body,
            behind,
        };
        self.owner.complete(self.epoch, answer);
        drop(self.pinned); // Now the ring may be stopped.
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
    /// Number of bytes that are to be stored.
    pub(crate) fn bytes(&self) -> usize {
        self.header.map_or(0, |header| header.len()) + self.body.len()
    }

    /// Stores the reply. Returns what the used ring says of its length.
    pub(crate) fn store(&self, mem: &GuestMemoryMmap) -> u32 {
        let header = self.header.as_ref().map_or(&[][..], |header| header);
        self.chain.store(mem, [header, &self.body]) + self.behind
    }
}
