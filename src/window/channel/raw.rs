// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: two system calls without a safe form in nix and rustix. Knows only descriptors.

#![allow(unsafe_code)] // ioctl(SIOCOUTQ) and fcntl(F_DUPFD_CLOEXEC) of a bare number.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{F_DUPFD_CLOEXEC, TIOCOUTQ, c_int, fcntl, ioctl};

/// The amount of sent data on a Unix socket that the peer has not read yet (SIOCOUTQ, unix(7)), in
/// bytes of the kernel's buffers, not of the data. It is 0 if and only if the peer has read all
/// data.
///
/// # Errors
/// The error of ioctl(2).
pub(super) fn unread(socket: impl AsFd) -> io::Result<usize> {
    let mut unread: c_int = 0;
    // SAFETY: the descriptor is borrowed, so it is open. The request (SIOCOUTQ has the number of
    // TIOCOUTQ) writes one int to its argument.
    let done = unsafe { ioctl(socket.as_fd().as_raw_fd(), TIOCOUTQ, &raw mut unread) };
    Errno::result(done)?;
    usize::try_from(unread).map_err(io::Error::other)
}

/// A new descriptor of the open file description that the number `fd` has now. Another thread may
/// have closed or reused the number, so the caller must check what the new descriptor refers to.
///
/// # Errors
/// The error of fcntl(2): EBADF if the number is not open.
pub(super) fn duplicate(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call only changes the descriptor table; a number that is not open is EBADF.
    let copy = Errno::result(unsafe { fcntl(fd, F_DUPFD_CLOEXEC, 3) })?;
    // SAFETY: the kernel has just created this descriptor, and no other code owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
