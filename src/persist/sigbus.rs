// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mapped file that is cut off by somebody else, or whose memory fails, must not kill the daemon:
//! in a [`Guarded`] range SIGBUS is an error of that range, and of nothing else.
//!
//! The handler puts a page of zeros where the bad one was, so that the instruction that hit it can
//! end, and marks the range: nothing that was done in it counts from then on. A page is as large as
//! the mapping's own are: the kernel takes no smaller piece out of a mapping of huge pages
//! (hugetlbfs) or of a device-DAX node.

#![allow(unsafe_code)] // A signal handler, and the map that it makes.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// How many ranges there can be: more than a window has slots, and room for files that have just
/// gone.
const MOST: usize = 4096;

/// A range, if `start` is not 0.
struct Slot {
    start: AtomicUsize,
    /// Not 0 in a slot that is taken.
    end: AtomicUsize,
    /// The size of a page of it: a power of two.
    page: AtomicUsize,
    /// A page of it was gone when it was touched.
    gone: AtomicBool,
}

/// A table that a signal handler can read: no lock, no memory to be had, and no store where a range
/// is used (one right behind a page of dirty lines costs more than their write-back).
static SLOTS: [Slot; MOST] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        gone: AtomicBool::new(false),
    }
}; MOST];

/// A range of a mapping, until dropped: before it is unmapped.
pub(crate) struct Guarded {
    slot: &'static Slot,
}

impl Guarded {
    /// Both `start` and `bytes` are multiples of `page`, which is the size of the mapping's pages.
    ///
    /// # Errors
    /// ENOMEM when there are too many; the system's.
    pub(crate) fn new(start: usize, bytes: usize, page: usize) -> io::Result<Self> {
        install()?;
        let take =
            |slot: &&Slot| slot.end.compare_exchange(0, start + bytes, SeqCst, SeqCst).is_ok();
        let slot = SLOTS.iter().find(take).ok_or(Errno::ENOMEM)?;
        slot.gone.store(false, SeqCst);
        slot.page.store(page, SeqCst);
        slot.start.store(start, SeqCst);
        Ok(Self { slot })
    }

    /// Whether a page of it was gone when it was touched, by whatever thread: another one's work
    /// may have been on zeros.
    pub(super) fn is_gone(&self) -> bool {
        self.slot.gone.load(SeqCst)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.slot.start.store(0, SeqCst);
        self.slot.end.store(0, SeqCst);
    }
}

/// Installs the handler, once in the process.
fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), Errno>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let handler = SigHandler::SigAction(on_sigbus);
        let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: the handler calls mmap() and sigaction() only, and touches nothing but atomics.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
    });
    Ok((*done)?)
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid one, and for SIGBUS it has an address.
    let at = unsafe { (*info).si_addr() }.addr();
    // The sizes of its pages, as bits.
    let mut sizes = 0;
    // All that match: one that is being taken or left may seem to, and the one that was touched is
    // there.
    for slot in &SLOTS {
        let start = slot.start.load(SeqCst);
        if start != 0 && (start..slot.end.load(SeqCst)).contains(&at) {
            // Before the zeros are there: whoever meets them sees it.
            slot.gone.store(true, SeqCst);
            sizes |= slot.page.load(SeqCst);
        }
    }
    // The smallest first: the kernel refuses one that is smaller than the mapping's.
    while sizes != 0 {
        let page = 1 << sizes.trailing_zeros();
        sizes &= !page;
        if put_zeros(at & !(page - 1), page) {
            return;
        }
    }
    // Not ours: the instruction is run again, and what it does then is what it did without us.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action has no conditions.
    let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
}

/// Puts zeros where a page of a range was. False if the kernel refuses.
fn put_zeros(start: usize, bytes: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // No memory is set aside: hardly more than a word of it will be touched.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page is part of a mapping of ours, which stays mapped while it is worked in.
    let map =
        unsafe { libc::mmap(ptr::without_provenance_mut(start), bytes, protection, flags, -1, 0) };
    map != libc::MAP_FAILED
}
