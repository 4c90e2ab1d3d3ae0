// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two ioctls of /dev/fuse that make and close a backing id. Knows no protocol.

#![allow(unsafe_code)] // An ioctl has no safe form.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `struct fuse_backing_map` of linux/fuse.h.
#[repr(C)]
pub struct FuseBackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

// FUSE_DEV_IOC_MAGIC is 229; BACKING_OPEN is _IOW(229, 1, struct fuse_backing_map), and
// BACKING_CLOSE _IOW(229, 2, uint32_t).
nix::ioctl_write_ptr!(fuse_dev_ioc_backing_open, 229, 1, FuseBackingMap);
nix::ioctl_write_ptr!(fuse_dev_ioc_backing_close, 229, 2, u32);

/// The kernel's name for an open file that inodes of this connection may pass through to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingId(u32);

impl BackingId {
    /// Registers `file`. The kernel takes a reference of its own.
    ///
    /// # Errors
    /// EPERM, ELOOP, EOPNOTSUPP; EINVAL for a connection that has no passthrough.
    pub fn open(device: &File, file: BorrowedFd<'_>) -> io::Result<Self> {
        let map = FuseBackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
        // SAFETY: both descriptors are open for as long as they are borrowed, which is this call,
        // and the kernel only reads `map`, which has the layout that the request's number stands
        // for.
        let id = unsafe { fuse_dev_ioc_backing_open(device.as_raw_fd(), &map) }?;
        Ok(Self(id.cast_unsigned()))
    }

    /// Gives the kernel's reference back. Files that are open already keep theirs.
    ///
    /// # Errors
    /// EPERM from a thread without CAP_SYS_ADMIN.
    pub fn close(self, device: &File) -> io::Result<()> {
        // SAFETY: as above; the kernel only reads the number.
        unsafe { fuse_dev_ioc_backing_close(device.as_raw_fd(), &self.0) }?;
        Ok(())
    }

    /// The one of a number that [`number`](Self::number) has returned, in this process or in
    /// another one.
    pub fn numbered(number: u32) -> Self {
        Self(number)
    }

    /// As an open's answer has it.
    pub fn number(self) -> u32 {
        self.0
    }
}
