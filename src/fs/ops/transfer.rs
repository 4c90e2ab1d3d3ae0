// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! READ and WRITE: copy bytes between a file and guest memory.

use std::cell::Cell;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse;

use crate::dax::engine::Engine;
use crate::device::request::Request;
use crate::persist::Direct;
use crate::window::locate::WindowLocation;
use crate::window::{FileOffset, FileRange};

use crate::fs::buffers::{Buffers, GuestReader, GuestWriter};
use crate::fs::dax::Dax;
use crate::fs::message::{
    Args, IN_HEADER_BYTES, MAX_DATA_BYTES, Message, OUT_HEADER_BYTES, Reply, invalid,
};
use crate::fs::ops::{open_flag, written};
use crate::fs::serve::Blocking;
use crate::fs::server::Server;

/// Keeps guest memory mapped, and so a ring from being stopped, while the request copies.
fn pin(request: &mut Request, blocking: Blocking) -> io::Result<()> {
    match blocking {
        Blocking::Allowed | Blocking::Lease if request.pin() => Ok(()),
        Blocking::Allowed | Blocking::Lease => Err(Errno::EIO.into()),
        Blocking::IfUnknown if request.pin_now() => Ok(()),
        Blocking::IfUnknown => Err(Errno::EAGAIN.into()),
    }
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// READ: copies from the file to the guest's buffers.
    pub(crate) fn read(
        &self,
        request: &mut Request,
        message: &Message,
        args: &mut Args<'_>,
        blocking: Blocking,
    ) -> io::Result<Reply> {
        let asked: fuse::ReadIn = args.take()?;
        // INIT has set this limit. A stop waits for the copy, so its length must be limited.
        if asked.size > MAX_DATA_BYTES {
            return Err(invalid());
        }
        let owner = (asked.read_flags & fuse::READ_LOCKOWNER != 0).then_some(asked.lock_owner);
        let chain = request.chain().map_err(|_| invalid())?;
        let buffers = Buffers::find(chain.writable(), OUT_HEADER_BYTES, self.window())?;
        if buffers.bytes() < asked.size as usize {
            return Err(invalid());
        }
        pin(request, blocking)?;
        let (mem, ram) = (request.memory(), request.ram());
        let would_wait = Cell::new(false);
        let to = GuestWriter { mem: &mem, ram: &ram, buffers, blocking, would_wait: &would_wait };
        let (ctx, nodeid) = (message.context(), message.nodeid());
        let (fh, size, from) = (asked.fh, asked.size, asked.offset);
        let done = self.fs.read(ctx, nodeid, fh, to, size, from, owner, asked.flags)?;
        if would_wait.get() {
            // The bytes read so far are read again when the request is served by the pool.
            return Err(Errno::EAGAIN.into());
        }
        Ok(Reply::Data(done as u32))
    }

    /// WRITE: copies from the guest's buffers to the file.
    pub(crate) fn write(
        &self,
        request: &mut Request,
        message: &Message,
        args: &mut Args<'_>,
        blocking: Blocking,
    ) -> io::Result<Reply> {
        let asked: fuse::WriteIn = args.take()?;
        let owner = (asked.write_flags & fuse::WRITE_LOCKOWNER != 0).then_some(asked.lock_owner);
        let delayed = asked.write_flags & fuse::WRITE_CACHE != 0;
        let kill_priv = asked.write_flags & fuse::WRITE_KILL_PRIV != 0;
        let head = IN_HEADER_BYTES + size_of::<fuse::WriteIn>();
        let chain = request.chain().map_err(|_| invalid())?;
        let buffers = Buffers::find(chain.readable(), head, self.window())?;
        if message.bytes.saturating_sub(head) < asked.size as usize {
            return Err(invalid());
        }
        let (ctx, nodeid) = (message.context(), message.nodeid());
        // A write to a granted file takes locks, which may block.
        let (fh, size, from, flags) = (asked.fh, asked.size, asked.offset, asked.flags);
        let file = |dax: &Dax| dax.find(self.open_file(nodeid, fh));
        let file = self.dax.as_deref().map(file).transpose()?;
        let granted = file.as_ref().is_some_and(|file| file.node.is_some());
        if granted && blocking == Blocking::IfUnknown {
            return Err(Errno::EAGAIN.into());
        }
        // A store past the processor's cache does not do what these flags require of the kernel.
        let plain = !kill_priv && !open_flag(flags, libc::O_DSYNC);
        let write = |past_cache: Option<&Direct>| {
            pin(request, blocking)?;
            let (mem, ram) = (request.memory(), request.ram());
            let past_cache = past_cache.filter(|_| plain);
            let data = GuestReader { mem: &mem, ram: &ram, buffers, past_cache };
            let done =
                self.fs.write(ctx, nodeid, fh, data, size, from, owner, delayed, kill_priv, flags);
            // The engine may wait for the front-end next, which may wait for a stop of the ring.
            request.unpin();
            done
        };
        let done = match self.dax.as_deref().zip(file) {
            // The offset is not known before the write.
            Some((dax, file)) if open_flag(flags, libc::O_APPEND) && !delayed => {
                dax.change(&file, 0, || write(None))?
            }
            Some((dax, file)) => {
                let range = FileRange::new(FileOffset(from), u64::from(size));
                dax.write(&file, range, write)?
            }
            None => write(None)?,
        };
        Ok(written(done))
    }

    fn window(&self) -> Option<(WindowLocation, &Engine)> {
        let dax = self.dax.as_deref()?;
        Some((dax.location()?, dax.engine()))
    }
}
