// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Leases of host processes (`F_SETLEASE`, see fcntl(2)). An open that breaks a lease waits until
//! the holder gives it back, or for `/proc/sys/fs/lease-break-time` (45 s). Many such opens would
//! take all threads. So each request first tries without waiting, which also tells the holder; a
//! request for which a lease is in the way ends with EAGAIN, and is served anew by one of the few
//! threads that may wait (`JobClass::Lease`).

use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{self, Opcode};

use crate::fs::message::{Args, Message};
use crate::fs::server::Server;

/// The access mode of SETUPMAPPING, and of a SETATTR that sets the length.
const WRITES: u32 = libc::O_RDWR.cast_unsigned();

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Lets `operation` serve the request when no lease is in its way any more, and while none can
    /// be taken: the file is held open.
    ///
    /// # Errors
    /// Those of `operation`. No EAGAIN for SETUPMAPPING: a guest that faults would try again for
    /// ever.
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

    /// Waits for the leases on the file of a request, and opens it as the request will. None where
    /// that fails: the request will fail, too. Returns the file's number and its handle.
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
