// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two ioctls of /dev/fuse that open and close a backing id. Knows no protocol.

#![allow(unsafe_code)] // nix generates ioctls as unsafe functions.

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

/// The kernel's number of a backing file, to which inodes of this connection can pass through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackingId(u32);

impl BackingId {
    /// Registers `file` as a backing file. The kernel takes its own reference to it.
    ///
    /// # Errors
    /// EPERM: the thread has no CAP_SYS_ADMIN. ELOOP: the file system is stacked too deeply.
    /// EOPNOTSUPP: passthrough can't use the file. EINVAL: the connection has no passthrough.
    pub fn open(device: &File, file: BorrowedFd<'_>) -> io::Result<Self> {
        let map = FuseBackingMap { fd: file.as_raw_fd(), flags: 0, padding: 0 };
        // SAFETY: both descriptors are borrowed for this call, so they are open. The kernel only
        // reads `map`, whose layout is that of linux/fuse.h.
        let id = unsafe { fuse_dev_ioc_backing_open(device.as_raw_fd(), &map) }?;
        Ok(Self(id.cast_unsigned()))
    }

    /// Drops the kernel's reference. Passthrough files that are open keep their own.
    ///
    /// # Errors
    /// EPERM: the thread has no CAP_SYS_ADMIN.
    pub fn close(self, device: &File) -> io::Result<()> {
        // SAFETY: the descriptor is borrowed for this call, so it is open. The kernel only reads
        // the number.
        unsafe { fuse_dev_ioc_backing_close(device.as_raw_fd(), &self.0) }?;
        Ok(())
    }

    /// The backing id with a number that [`number`](Self::number) has returned, in this process or in
    /// another one.
    pub fn numbered(number: u32) -> Self {
        Self(number)
    }

    /// The number, for the reply to OPEN.
    pub fn number(self) -> u32 {
        self.0
    }
}
