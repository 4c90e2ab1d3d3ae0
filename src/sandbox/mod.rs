// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside the path: what a process that serves a guest is left with, should it be taken over. Knows
//! no virtio, no vhost-user, no FUSE.
//!
//! # Processes
//!
//! | process | what it does | what it has |
//! |---|---|---|
//! | parent | waits for the worker, hands signals on, removes the socket's file | no capability, no descriptor but the standard ones and the socket's name |
//! | worker | serves the guest | namespaces of its own, a root with the share and its own descriptors, few capabilities, a filter of system calls |
//! | broker (`passthrough::broker`), with a window only | two ioctls | CAP_SYS_ADMIN, an empty root, the smallest filter |
//!
//! # Order
//!
//! All processes have one thread until [`enter`] has returned, which it does in the worker only:
//! options are checked, the socket is bound, the file is opened, the broker is forked ([`fork`]),
//! then [`enter`] forks the worker, which leaves the host's namespaces, changes its root, drops its
//! capabilities and applies its filter. Nothing that a guest can cause happens before.
//!
//! SECURITY.md has the table of what each mode is left with, which tests/sandbox.rs compares with
//! the kernel's own.

pub mod capabilities;
#[cfg(debug_assertions)]
mod hook;
mod landlock;
pub mod options;
mod plan;
pub mod root;
pub mod seccomp;
mod supervisor;
pub mod tables;
pub mod user_namespace;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use log::debug;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{ForkResult, Pid};
use rustix::process::{Signal, getpid, set_parent_process_death_signal};
use rustix::thread::{CapabilitySet, UnshareFlags, set_name, set_thread_groups, unshare_unsafe};

pub use options::{ModCaps, SandboxMode, SandboxOptions, SeccompMode};
pub use plan::{Plan, SandboxError, check_proc};

use root::Share;
use seccomp::LastCall;
use supervisor::Helper;
use tables::Table;
use user_namespace::ActsAs;

use crate::support::{fd_table, stderr};

/// What a worker is left with.
pub struct Cell {
    /// The directory that it serves. Closed once the worker is shut in: it is the host's directory,
    /// from which `..` leads to the host's file tree.
    pub share: Option<Share>,
    /// The share is not to be changed.
    pub readonly: bool,
    /// Its user.
    pub acts_as: ActsAs,
    /// Its capabilities.
    pub capabilities: CapabilitySet,
    /// Its system calls.
    pub table: Table,
}

/// A process that was forked to help the worker ([`fork`]).
#[derive(Debug, Clone, Copy)]
pub struct Forked(Helper);

/// Closes what this process has inherited, but for stdout, stderr and `keep`. To be called before
/// anything is opened: an inherited directory would be a way out. The daemon reads nothing from
/// stdin, which becomes /dev/null, as does each standard descriptor that is a directory.
#[allow(unsafe_code)] // The descriptors belong to nobody.
pub fn close_inherited(keep: Option<RawFd>) {
    for fd in (0..=2).filter(|fd| keep != Some(*fd)) {
        // SAFETY: all zeros is a value of this structure of numbers, which outlives the call.
        let is_directory = unsafe {
            let mut found: libc::stat = std::mem::zeroed();
            libc::fstat(fd, &mut found) == 0 && found.st_mode & libc::S_IFMT == libc::S_IFDIR
        };
        if (fd == 0 || is_directory)
            && let Ok(null) = File::options().read(true).write(true).open("/dev/null")
        {
            // SAFETY: nothing of this process owns a standard descriptor.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
    let keep = keep.filter(|fd| *fd > 2).map(RawFd::cast_unsigned);
    let ranges = match keep {
        None => [Some((3, u32::MAX)), None],
        Some(fd) => [(fd > 3).then(|| (3, fd - 1)), fd.checked_add(1).map(|from| (from, u32::MAX))],
    };
    for (first, last) in ranges.into_iter().flatten() {
        // SAFETY: this process has opened nothing yet, so nothing of its own is closed.
        let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        if done != 0 {
            // Before Linux 5.9.
            debug!("inherited descriptors stay: {}", io::Error::last_os_error());
        }
    }
}

/// Has the end of a child process reported: where SIGCHLD is ignored, which a program that is
/// started inherits, the kernel keeps no exit code for waitpid(2).
#[allow(unsafe_code)] // No handler is replaced.
pub fn report_children() {
    // SAFETY: the default action runs no code of this process.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Closes all but the standard descriptors and `keep`. The process never returns to code that owns
/// others.
#[allow(unsafe_code)]
fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().map(|fd| fd.cast_unsigned()).collect();
    keep.sort_unstable();
    let mut from = 3;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > from {
            let last = if fd == u32::MAX { fd } else { fd - 1 };
            // SAFETY: the caller ends the process without a look at what is closed here.
            unsafe { libc::syscall(libc::SYS_close_range, from, last, 0) };
        }
        from = fd.saturating_add(1).max(from);
    }
}

/// Forks a process, before there is any thread, that runs `run` and ends with the exit code that
/// `run` returns. It ends with this process, too. Of this process's descriptors it has `keep`, and
/// the standard ones no more.
///
/// # Errors
/// The system's.
#[allow(unsafe_code)]
pub fn fork(
    name: &std::ffi::CStr,
    keep: OwnedFd,
    run: impl FnOnce(OwnedFd, LastCall) -> i32,
) -> io::Result<Forked> {
    let last_call = LastCall::new()?;
    // Else it would come between this process and its own end.
    let signals = supervisor::block()?;
    let parent = getpid();
    // SAFETY: there is one thread, so the child may do what this process may.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => {
            drop((keep, signals));
            Ok(Forked(Helper { pid: child, last_call }))
        }
        ForkResult::Child => {
            let _ = set_name(name);
            close_all_but(&[keep.as_raw_fd()]);
            let died = set_parent_process_death_signal(Some(Signal::KILL)).is_err()
                || rustix::process::getppid() != Some(parent);
            let code = if died { 1 } else { run(keep, last_call) };
            // SAFETY: the process ends, and runs none of the handlers that the parent has
            // registered.
            unsafe { libc::_exit(code) }
        }
    }
}

/// Closes the standard descriptors: a process that has no reason to say anything.
#[allow(unsafe_code)]
pub fn close_standard() {
    // SAFETY: the caller writes to none of them, and opens nothing by name.
    unsafe { libc::syscall(libc::SYS_close_range, 0, 2, 0) };
}

/// What the parent process does when the worker has ended.
pub struct CleanUp<'a> {
    /// Does it.
    pub run: &'a dyn Fn(),
    /// The descriptors that this needs: all others are closed in the parent process.
    pub keep: Vec<RawFd>,
    /// The directory that it changes.
    pub dir: Option<PathBuf>,
}

/// Forks the worker, and shuts it into `cell`. Returns in the worker. The parent waits for it,
/// cleans up, and ends as the worker has.
///
/// # Errors
/// In the worker: what could not be had. In this process: no process.
#[allow(unsafe_code)]
pub fn enter(
    plan: &Plan,
    cell: Cell,
    helper: Option<Forked>,
    clean_up: &CleanUp<'_>,
) -> io::Result<()> {
    let last_call = LastCall::new()?;
    let signals = supervisor::block()?;
    if plan.mode == SandboxMode::Namespace {
        // SAFETY: it is for the children only.
        unsafe { unshare_unsafe(UnshareFlags::NEWPID) }?;
    }
    // Only this process holds the writer, so the reader tells the child when this process ends.
    let (reader, writer) = io::pipe()?;
    // SAFETY: there is one thread, so the child may do what this process may.
    let ForkResult::Parent { child } = unsafe { nix::unistd::fork() }? else {
        drop(writer);
        cell.acts_as.change()?;
        die_with(&reader)?;
        drop(reader);
        shut_in(plan, &cell, last_call)?;
        drop(cell);
        #[cfg(debug_assertions)]
        hook::run();
        return Ok(());
    };
    in_parent(child, &writer, &signals, last_call, helper, clean_up)
}

fn in_parent(
    worker: Pid,
    writer: &io::PipeWriter,
    signals: &nix::sys::signal::SigSet,
    last_call: LastCall,
    helper: Option<Forked>,
    clean_up: &CleanUp<'_>,
) -> ! {
    stderr::forget_waiting();
    let kept: Vec<RawFd> = clean_up.keep.iter().copied().chain([writer.as_raw_fd()]).collect();
    close_all_but(&kept);
    if let Err(e) = plan::drop_for_parent(clean_up.dir.as_deref()) {
        debug!("the parent process keeps its capabilities: {e}");
    }
    supervisor::supervise(
        signals,
        worker,
        last_call,
        helper.map(|Forked(helper)| helper),
        clean_up.run,
    )
}

/// Ends this process when its parent process ends, which holds the other end of `parent`.
fn die_with(parent: &io::PipeReader) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have ended before. Its number tells nothing in another PID namespace.
    let mut ended = [PollFd::new(parent.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ended, PollTimeout::ZERO)? > 0 {
        return Err(io::Error::other("the parent process has ended"));
    }
    Ok(())
}

fn shut_in(plan: &Plan, cell: &Cell, last_call: LastCall) -> io::Result<()> {
    // Groups of the daemon's user are no business of the guest's. A user namespace may not permit
    // it.
    if plan.is_root
        && capabilities::has(CapabilitySet::SETGID)
        && let Err(e) = set_thread_groups(&[])
    {
        debug!("supplementary groups stay: {e}");
    }
    match plan.mode {
        SandboxMode::Namespace => {
            root::leave_namespaces(UnshareFlags::NEWNET)?;
            root::enter(cell.share.as_ref(), cell.readonly)?;
        }
        SandboxMode::Chroot => {
            fd_table::keep(true)?;
            root::change(cell.share.as_ref())?;
        }
        SandboxMode::None => {}
    }
    if plan.uses_landlock(cell) {
        fd_table::keep(false)?;
        let fds = fd_table::open()?;
        let below: Vec<&File> = cell.share.iter().map(Share::root).chain([&fds]).collect();
        match landlock::restrict(&below) {
            Ok(true) => {}
            Ok(false) => debug!("this kernel has no Landlock"),
            Err(e) => debug!("Landlock can't be used: {e}"),
        }
    }
    if plan.drops_capabilities || cell.table == Table::Pmem {
        capabilities::keep(cell.capabilities)?;
    }
    rustix::thread::set_no_new_privs(true)?;
    seccomp::apply(plan.seccomp, cell.table, last_call)
}
