// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mapped file that is cut off by somebody else, or whose memory fails, must not kill the daemon: in a
//! [`guarded`] range SIGBUS is an error of that range, and of nothing else.
//!
//! The handler puts a page of zeros where the bad one was, so that the instruction that hit it can end,
//! and says so. The whole mapping is not to be trusted from then on.

#![allow(unsafe_code)] // A signal handler, and the map that it makes.

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::dax::entry::PAGE_BYTES;

/// A range of addresses that one thread is at work in.
#[derive(Clone, Copy)]
struct Guard {
    start: usize,
    end: usize,
    /// Set when a page of it is gone. It outlives the guard.
    gone: *const AtomicBool,
}

thread_local! {
    // No destructor and no lazy start, so a handler may read it.
    static GUARD: Cell<Option<Guard>> = const { Cell::new(None) };
}

/// Installs the handler, once in the process.
///
/// # Errors
/// The system's.
pub(super) fn install() -> io::Result<()> {
    static DONE: OnceLock<Result<(), Errno>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let handler = SigHandler::SigAction(on_sigbus);
        let action = SigAction::new(handler, SaFlags::SA_SIGINFO, SigSet::empty());
        // SAFETY: the handler calls mmap() and sigaction() only, and touches nothing but atomics
        // and its own thread's guard.
        unsafe { sigaction(Signal::SIGBUS, &action) }.map(drop)
    });
    Ok((*done)?)
}

/// Runs `work`, which touches `range` of a mapping, and says whether all pages of it were there.
///
/// # Errors
/// EIO when a page was gone, now or in the time of an earlier `work`: then nothing that was done in that
/// mapping counts. `gone` is the mapping's.
pub(super) fn guarded<T>(
    range: Range<usize>,
    gone: &AtomicBool,
    work: impl FnOnce() -> T,
) -> io::Result<T> {
    GUARD.set(Some(Guard { start: range.start, end: range.end, gone }));
    let done = work();
    GUARD.set(None);
    // Also if it was another thread that met the page: ours may have worked on its zeros.
    if gone.load(Ordering::SeqCst) { Err(Errno::EIO.into()) } else { Ok(done) }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid one, and for SIGBUS it has an address.
    let at = unsafe { (*info).si_addr() }.addr();
    if let Some(guard) = GUARD.get()
        && (guard.start..guard.end).contains(&at)
    {
        // SAFETY: guarded() holds on to it. Before the zeros are there: whoever meets them sees it.
        unsafe { (*guard.gone).store(true, Ordering::SeqCst) };
        let page = at & !(PAGE_BYTES as usize - 1);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        // SAFETY: the page is part of a mapping of ours, which stays mapped as long as the guard.
        let map = unsafe {
            libc::mmap(
                ptr::without_provenance_mut(page),
                PAGE_BYTES as usize,
                protection,
                flags,
                -1,
                0,
            )
        };
        if map != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: the instruction is run again, and what it does then is what it did without us.
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    // SAFETY: the default action has no conditions.
    let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
}
