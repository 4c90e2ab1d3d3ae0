// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A SIGBUS handler: an access to a mapped file that another program has truncated, or whose memory
//! has failed, must not kill the daemon. In a [`Guarded`] range SIGBUS becomes an error of that
//! range.
//!
//! The handler maps a page of zeros over the missing page, so that the interrupted instruction can
//! end, and marks the range as failed. From then on no access to the range may be reported as
//! successful. The page of zeros has the page size of the mapping: the kernel replaces no smaller
//! part of a mapping of huge pages (hugetlbfs) or of a device-DAX node.

#![allow(unsafe_code)] // sigaction(2), and mmap(2) in the handler.

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Largest number of guarded ranges at a time: more than the number of maps that a window can have
/// (509), with room for files that are being closed.
const MOST: usize = 4096;

/// One entry of the table: a guarded range, if `start` is not 0.
struct Slot {
    /// The address of the range's first byte.
    start: AtomicUsize,
    /// The address behind the range's last byte. Not 0 in a slot that is taken.
    end: AtomicUsize,
    /// The page size of the mapping in bytes: a power of two.
    page: AtomicUsize,
    /// An access to the range has met a missing page.
    gone: AtomicBool,
}

/// A table that a signal handler can read without a lock and without an allocation. A use of a
/// range stores nothing here: a store right after the write-back of a page's lines would take
/// longer than the write-back.
static SLOTS: [Slot; MOST] = [const {
    Slot {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        gone: AtomicBool::new(false),
    }
}; MOST];

/// A guarded range of a mapping. Drop it before the range is unmapped.
pub(crate) struct Guarded {
    slot: &'static Slot,
}

impl Guarded {
    /// Guards `bytes` bytes from address `start` on. Both must be multiples of `page`, the page
    /// size of the mapping in bytes.
    ///
    /// # Errors
    /// ENOMEM if there are [`MOST`] ranges already; the error of sigaction(2).
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

    /// Whether an access of any thread to the range has met a missing page. If so, the accesses of
    /// this thread may have gone to the page of zeros.
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

/// Installs the handler, once in the process. Later calls return the result of the first.
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
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo_t, which has an address for SIGBUS.
    let at = unsafe { (*info).si_addr() }.addr();
    // The page sizes of the matching slots, as bits.
    let mut sizes = 0;
    // All slots that match are marked. A slot that another thread is filling or clearing may match
    // by mistake, which only reports an error too many; the slot of the touched range matches.
    for slot in &SLOTS {
        let start = slot.start.load(SeqCst);
        if start != 0 && (start..slot.end.load(SeqCst)).contains(&at) {
            // Marked before the zeros are mapped: a thread that reads the zeros sees the mark.
            slot.gone.store(true, SeqCst);
            sizes |= slot.page.load(SeqCst);
        }
    }
    // The smallest size first: the kernel refuses a size below the mapping's page size, and a size
    // above it would replace more than the missing page.
    while sizes != 0 {
        let page = 1 << sizes.trailing_zeros();
        sizes &= !page;
        if put_zeros(at & !(page - 1), page) {
            return;
        }
    }
    // The address is in no guarded range: with the default action restored, the instruction runs
    // again, raises SIGBUS again, and ends the process.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action runs no code of this process.
    let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
}

/// Maps `bytes` bytes of zeros at address `start`. False if the kernel refuses.
fn put_zeros(start: usize, bytes: usize) -> bool {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // MAP_NORESERVE: only a few words of the page will be touched.
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
    // SAFETY: the page is part of a guarded mapping of this process, which stays mapped while a
    // thread accesses it.
    let map =
        unsafe { libc::mmap(ptr::without_provenance_mut(start), bytes, protection, flags, -1, 0) };
    map != libc::MAP_FAILED
}
