// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One request, and the return of its chain. Knows no ring: a request returns to its
//! `RequestOwner`.

use std::sync::Arc;

use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap};

use super::chain::{Chain, Malformed, Parsed, WORD_BYTES};
use super::memory::Memory;

/// The header of a virtio-fs reply (struct fuse_out_header), as stored in guest memory.
pub type Header = [u8; 16];

/// A period of a ring in which a chain may be returned; see the module `ring`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Epoch(u64);

impl Epoch {
    /// The epoch after this one.
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// The ring from which a request was taken, as the request sees it.
pub(crate) trait RequestOwner: Send + Sync {
    /// The guest's memory.
    fn memory(&self) -> &Memory;

    /// Keeps the ring from being stopped, if it runs in `epoch`. None if it does not. `wait`: waits
    /// while the ring is stopped in that epoch.
    fn pin(self: Arc<Self>, epoch: Epoch, wait: bool) -> Option<PinGuard>;

    /// Ends one [`pin`](Self::pin).
    fn unpin(&self);

    /// Stores the reply and returns the chain to the driver, if the ring is still in `epoch`.
    fn complete(self: Arc<Self>, epoch: Epoch, answer: Answer);
}

/// Pins a ring: a stop of the ring waits until this is dropped.
pub(crate) struct PinGuard(Arc<dyn RequestOwner>);

impl PinGuard {
    /// The guard of a pin that `owner` has already counted.
    pub(crate) fn new(owner: Arc<dyn RequestOwner>) -> Self {
        Self(owner)
    }
}

impl Drop for PinGuard {
    fn drop(&mut self) {
        self.0.unpin();
    }
}

/// One request, taken from a ring. It must be completed. If it is dropped instead, it stays open
/// until the ring is reset; with [`InflightPolicy::Resubmit`](super::InflightPolicy) the next stop
/// hands it back.
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
    /// Whether the window could not be mapped: the guest's stores have not reached the file, so a
    /// flush must fail.
    pub fn window_lost(&self) -> bool {
        self.window_lost
    }

    /// The le32 of a virtio-pmem request.
    ///
    /// # Errors
    /// The fault of the chain ([`Malformed`]).
    pub fn read_le32(&self) -> Result<u32, Malformed> {
        match self.parsed.fault {
            Some(fault) => Err(fault),
            None => self.parsed.chain.read_le32(&self.ram()),
        }
    }

    /// The buffers of the chain.
    ///
    /// # Errors
    /// The fault of the chain ([`Malformed`]).
    pub fn chain(&self) -> Result<&Chain, Malformed> {
        match self.parsed.fault {
            Some(fault) => Err(fault),
            None => Ok(&self.parsed.chain),
        }
    }

    /// The guest's current memory, including windows. Only for addresses that are passed to system
    /// calls: a load or store may end the process by SIGBUS.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.owner.memory().all()
    }

    /// The part of the guest's memory that may be read and written by loads and stores.
    pub fn ram(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.owner.memory().ram()
    }

    /// Keeps the ring from being stopped until this request is completed or
    /// [unpinned](Self::unpin): until then the request may read and write guest memory. Waits while
    /// the ring is stopped. False if the ring was reset, or if the process is about to end.
    ///
    /// While the ring is pinned the caller must not wait for the front-end, which may be waiting
    /// for the stop.
    #[must_use = "if it is false, guest memory must not be accessed"]
    pub fn pin(&mut self) -> bool {
        self.pin_with(true)
    }

    /// Like [`pin`](Self::pin), but does not wait: also false while the ring is stopped.
    #[must_use = "if it is false, guest memory must not be accessed"]
    pub fn pin_now(&mut self) -> bool {
        self.pin_with(false)
    }

    fn pin_with(&mut self, wait: bool) -> bool {
        if self.pinned.is_none() {
            self.pinned = self.owner.clone().pin(self.epoch, wait);
        }
        self.pinned.is_some()
    }

    /// Ends the pin, if there is one.
    pub fn unpin(&mut self) {
        self.pinned = None;
    }

    /// Answers with the le32 `status` and returns the chain to the driver.
    ///
    /// Does nothing if the request's epoch is over.
    pub fn complete(self, status: u32) {
        // A chain with an address outside guest memory gets no status.
        let room = self.parsed.chain.word_room(&self.ram());
        let whole =
            room == Ok(WORD_BYTES) && !matches!(self.read_le32(), Err(Malformed::Address(_)));
        let reply = if whole { status.to_le_bytes().to_vec() } else { Vec::new() };
        self.complete_with(None, reply, 0);
    }

    /// Stores the `header` of a reply and then `body`, and returns the chain to the driver.
    /// `behind` is the number of reply bytes that have been stored after these already. If the ring
    /// is stopped, the chain is returned when the ring resumes.
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
        drop(self.pinned); // After this a stop goes on.
    }
}

/// The reply of one request, and the chain to store it in.
pub(crate) struct Answer {
    /// The head to return; none if it is invalid (`Malformed::Head`).
    pub(crate) head: Option<u16>,
    chain: Chain,
    header: Option<Header>,
    body: Vec<u8>,
    behind: u32,
}

impl Answer {
    /// Number of bytes to store.
    pub(crate) fn bytes(&self) -> usize {
        self.header.map_or(0, |header| header.len()) + self.body.len()
    }

    /// Stores the reply. Returns its length in bytes for the used ring.
    pub(crate) fn store(&self, mem: &GuestMemoryMmap) -> u32 {
        let header = self.header.as_ref().map_or(&[][..], |header| header);
        self.chain.store(mem, [header, &self.body]) + self.behind
    }
}
