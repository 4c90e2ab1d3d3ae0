// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: two system calls that no crate of ours has a safe form of. Knows only descriptors.

#![allow(unsafe_code)] // See above; nothing else of this step is unsafe.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{F_DUPFD_CLOEXEC, TIOCOUTQ, c_int, fcntl, ioctl};

/// How much of what was sent on a Unix socket the peer has not read yet, in the kernel's own unit
/// (it counts buffers, not bytes): 0 if and only if all of it was read. SIOCOUTQ, unix(7).
pub(super) fn unread(socket: impl AsFd) -> io::Result<usize> {
    let mut unread: c_int = 0;
    // SAFETY: the descriptor is borrowed, so it is open; the request (SIOCOUTQ has the number of
    // TIOCOUTQ) writes one int to where its argument points, and nothing else.
    let done = unsafe { ioctl(socket.as_fd().as_raw_fd(), TIOCOUTQ, &raw mut unread) };
    Errno::result(done)?;
    usize::try_from(unread).map_err(io::Error::other)
}

/// A descriptor of our own for what stands behind the number `fd`, whatever that is by now: the
/// caller must look at what he got.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call reads the descriptor table and touches no memory; a number that is not
    // open is EBADF.
    let copy = Errno::result(unsafe { fcntl(fd, F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just made this descriptor for us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
