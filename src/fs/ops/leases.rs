// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases of host processes (`F_SETLEASE`, see fcntl(2)). An open that breaks a lease waits until
//! the holder releases it, or for the time in `/proc/sys/fs/lease-break-time` (45 s). Many such
//! opens would occupy all threads of the pool. So each request is first served without waiting,
//! which also notifies the holder of the lease. If that ends with EAGAIN, the request is served
//! again by one of the few threads that may wait (`JobClass::Lease`).

use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{self, Opcode};

use crate::fs::message::{Args, Message};
use crate::fs::server::Server;

/// Access mode with which SETUPMAPPING, and a SETATTR of the length, open the file.
const WRITES: u32 = libc::O_RDWR.cast_unsigned();

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Waits until no lease is in the way of the request, then calls `operation`. Holds the file
    /// open meanwhile, so that no process can take a new lease.
    ///
    /// # Errors
    /// Those of `operation`; EIO instead of EAGAIN for SETUPMAPPING, since a guest that handles a
    /// page fault would repeat the request without end.
    pub(super) fn behind_leases<T>(
        &self,
        opcode: Opcode,
        message: &Message,
        operation: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let ctx = message.context();
        let held = self.hold_open(opcode, message);
        let done = operation();
        if let Some((nodeid, handle)) = held {
            self.fs.release(ctx, nodeid, 0, handle, false, false, None)?;
        }
        let faults = matches!(opcode, Opcode::SetupMapping);
        done.map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock if faults => Errno::EIO.into(),
            _ => e,
        })
    }

    /// Waits for the leases on the file of a request, by an open with the access mode of the
    /// request. Returns the node id and the handle. None if that open fails: the request will fail,
    /// too.
    fn hold_open(&self, opcode: Opcode, message: &Message) -> Option<(u64, u64)> {
        let (ctx, nodeid) = (message.context(), message.nodeid());
        let args = &mut Args::new(message.args());
        match opcode {
            Opcode::Open => {
                let asked: fuse::OpenIn = args.take().ok()?;
                self.open_waiting(ctx, nodeid, asked.flags)
            }
            Opcode::Create => {
                let asked: fuse::CreateIn = args.take().ok()?;
                let found = self.fs.lookup(ctx, nodeid, args.name().ok()?).ok()?;
                let held = self.open_waiting(ctx, found.inode, asked.flags);
                self.fs.forget(ctx, found.inode, 1);
                held
            }
            _ => self.open_waiting(ctx, nodeid, WRITES),
        }
    }

    fn open_waiting(&self, ctx: Context, nodeid: u64, flags: u32) -> Option<(u64, u64)> {
        let access = self.flags(flags).ok()? & libc::O_ACCMODE.cast_unsigned();
        let (handle, _) = self.fs.open(ctx, nodeid, false, access).ok()?;
        handle.map(|handle| (nodeid, handle))
    }
}
