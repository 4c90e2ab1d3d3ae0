// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The filter of system calls (seccomp(2)). The tables are in `tables`.
//!
//! With `--seccomp kill` a forbidden call raises SIGSYS instead of ending the process unseen. The
//! handler stores the call's number in memory that the parent process shares, and makes a second
//! forbidden call, by which the kernel ends the process: SIGSYS is blocked in its handler, so the
//! kernel takes the default action. No forbidden call is ever done. The filter lets nobody change
//! the handler of SIGSYS, map memory as code, or fork.

#![allow(unsafe_code)] // A handler of a signal, and memory that is shared with a process.

use std::collections::BTreeMap;
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use libc::c_long;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

use super::options::SeccompMode;
use super::tables::{Allowed, Arg, Table};

/// Where a process that is about to be ended says by which system call. Shared by the processes
/// that are forked after [`new`](Self::new). Never unmapped.
#[derive(Debug, Clone, Copy)]
pub struct LastCall(NonNull<AtomicU32>);

/// Where the handler of this process stores the number.
static LAST_CALL: AtomicPtr<AtomicU32> = AtomicPtr::new(ptr::null_mut());

/// A call that is in no table: it ends the process that has a filter, and needs a capability
/// elsewhere.
const FORBIDDEN: c_long = libc::SYS_vhangup;

impl LastCall {
    /// # Errors
    /// The system's.
    pub fn new() -> io::Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: new memory at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(ptr::null_mut(), size_of::<AtomicU32>(), protection, flags, -1, 0)
        };
        let page = (page != libc::MAP_FAILED).then_some(page.cast()).and_then(NonNull::new);
        page.map(Self).ok_or_else(io::Error::last_os_error)
    }

    /// The number of the forbidden call, if there was one. The process that stored it may have been
    /// a liar: good for a line, and for nothing else.
    pub fn number(self) -> Option<u32> {
        // SAFETY: the page is never unmapped, is as aligned as a page, and was zeroed by the
        // kernel.
        let stored = unsafe { self.0.as_ref() }.load(Ordering::Relaxed);
        stored.checked_sub(1)
    }

    /// Has this process store its own last call here.
    ///
    /// # Errors
    /// The system's.
    fn install(self) -> io::Result<()> {
        LAST_CALL.store(self.0.as_ptr(), Ordering::Relaxed);
        // SAFETY: all zeros is a value of this structure of numbers and pointers.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_forbidden_call as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler makes only system calls and atomic stores, so it is safe in any
        // place; the structure outlives the call.
        let done = unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// `si_syscall` of `siginfo_t` on 64-bit Linux, which the libc crate does not name: behind three
/// numbers, padding, and the address of the call.
const SI_SYSCALL_BYTES: usize = 24;

extern "C" fn on_forbidden_call(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a whole siginfo_t, of 128 bytes; the page
    // of LAST_CALL is never unmapped, and all that was stored there is a page's address.
    unsafe {
        let number = info.cast::<u8>().add(SI_SYSCALL_BYTES).cast::<u32>().read_unaligned();
        if let Some(last) = LAST_CALL.load(Ordering::Relaxed).as_ref() {
            last.store(number.wrapping_add(1), Ordering::Relaxed);
        }
        libc::syscall(FORBIDDEN);
        // Not reached under a filter; nor does this one return.
        libc::_exit(1);
    }
}

/// Applies the filter of `table` to this process, which has one thread. Threads that it starts have
/// it, too.
///
/// # Errors
/// The system's.
pub fn apply(mode: SeccompMode, table: Table, last_call: LastCall) -> io::Result<()> {
    let otherwise = match mode {
        SeccompMode::None => return Ok(()),
        SeccompMode::Kill => {
            last_call.install()?;
            SeccompAction::Trap
        }
        SeccompMode::Trap => SeccompAction::Trap,
        SeccompMode::Log => SeccompAction::Log,
    };
    let failed = |e: seccompiler::Error| {
        io::Error::other(format!("{e}; --seccomp none goes without a filter of system calls"))
    };
    // Both are compiled before the first one is applied.
    let allowed = program(table.allowed(), otherwise, SeccompAction::Allow)?;
    let absent = program(
        vec![Allowed::Any(libc::SYS_clone3)],
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    if table.starts_threads() {
        // The flags of clone3 lie in memory, where no filter sees them. The C library falls back to
        // clone, whose flags are looked at: threads only.
        apply_filter(&absent).map_err(failed)?;
    }
    apply_filter(&allowed).map_err(failed)
}

fn program(
    calls: Vec<Allowed>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> io::Result<BpfProgram> {
    let failed = |e: seccompiler::BackendError| io::Error::other(e.to_string());
    let mut rules = BTreeMap::<c_long, Vec<SeccompRule>>::new();
    for call in calls {
        match call {
            Allowed::Any(number) => {
                rules.insert(number, Vec::new());
            }
            Allowed::If(number, index, arg) => {
                let (length, operation, value) = match arg {
                    Arg::Is(value) => (Dword, SeccompCmpOp::Eq, value),
                    Arg::IsNot(value) => (Dword, SeccompCmpOp::Ne, value),
                    Arg::Lacks(bits) => (Qword, SeccompCmpOp::MaskedEq(bits), 0),
                    Arg::HasAndLacks(has, lacks) => {
                        (Qword, SeccompCmpOp::MaskedEq(has | lacks), has)
                    }
                };
                let condition = SeccompCondition::new(index, length, operation, value);
                let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
                rules.entry(number).or_default().push(rule.map_err(failed)?);
            }
        }
    }
    let arch = std::env::consts::ARCH.try_into().map_err(failed)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).map_err(failed)?;
    filter.try_into().map_err(failed)
}
