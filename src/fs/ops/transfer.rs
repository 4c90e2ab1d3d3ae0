// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! READ and WRITE, which move bytes between a file and the guest's memory, and SETUPMAPPING and
//! REMOVEMAPPING, which save them the way.

use std::cell::Cell;
use std::fs::File;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse;

use crate::dax::engine::Engine;
use crate::device::request::Request;
use crate::persist::Direct;

use crate::fs::buffers::{Buffers, GuestReader, GuestWriter, WindowPlace};
use crate::fs::dax::{Dax, MAX_REMOVALS};
use crate::fs::message::{Args, IN_HEADER_BYTES, MAX_DATA_BYTES, OUT_HEADER_BYTES, Reply, invalid};
use crate::fs::ops::{open_flag, written};
use crate::fs::server::{Message, Patience, Server};

/// Takes guest memory in hand.
fn touch(request: &mut Request, patience: Patience) -> io::Result<()> {
    match patience {
        Patience::Any if request.pin() => Ok(()),
        Patience::Any => Err(Errno::EIO.into()),
        Patience::None | Patience::Least if request.pin_now() => Ok(()),
        Patience::None | Patience::Least => Err(Errno::EAGAIN.into()),
    }
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// READ: from the file into the guest's buffers.
    pub(crate) fn read(
        &self,
        request: &mut Request,
        message: &Message,
        args: &mut Args<'_>,
        patience: Patience,
    ) -> io::Result<Reply> {
        let asked: fuse::ReadIn = args.take()?;
        // No driver asks for more than INIT has told it; and a stop waits for what copies.
        if asked.size > MAX_DATA_BYTES {
            return Err(invalid());
        }
        let owner = (asked.read_flags & fuse::READ_LOCKOWNER != 0).then_some(asked.lock_owner);
        let chain = request.chain().map_err(|_| invalid())?;
        let buffers = Buffers::find(chain.writable(), OUT_HEADER_BYTES, self.window())?;
        if buffers.bytes() < asked.size as usize {
            return Err(invalid());
        }
        touch(request, patience)?;
        let (mem, ram) = (request.memory(), request.ram());
        let would_wait = Cell::new(false);
        let to = GuestWriter { mem: &mem, ram: &ram, buffers, patience, would_wait: &would_wait };
        let (ctx, nodeid) = (message.context(), message.nodeid());
        let (fh, size, from) = (asked.fh, asked.size, asked.offset);
        let done = self.fs.read(ctx, nodeid, fh, to, size, from, owner, asked.flags)?;
        if would_wait.get() {
            // What was read before is read once more.
            return Err(Errno::EAGAIN.into());
        }
        Ok(Reply::Data(done as u32))
    }

    /// WRITE: from the guest's buffers into the file.
    pub(crate) fn write(
        &self,
        request: &mut Request,
        message: &Message,
        args: &mut Args<'_>,
        patience: Patience,
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
        // Where something is granted, there are locks to wait for.
        let (fh, size, from, flags) = (asked.fh, asked.size, asked.offset, asked.flags);
        let file = |dax: &Dax| dax.find(self.open_file(nodeid, fh));
        let file = self.dax.as_deref().map(file).transpose()?;
        let granted = file.as_ref().is_some_and(|file| file.node.is_some());
        if granted && patience != Patience::Any {
            return Err(Errno::EAGAIN.into());
        }
        // What the kernel does beside writing is missed past the cache.
        let plain = !kill_priv && !open_flag(flags, libc::O_DSYNC);
        let write = |past_cache: Option<&Direct>| {
            touch(request, patience)?;
            let (mem, ram) = (request.memory(), request.ram());
            let past_cache = past_cache.filter(|_| plain);
            let data = GuestReader { mem: &mem, ram: &ram, buffers, past_cache };
            let done =
                self.fs.write(ctx, nodeid, fh, data, size, from, owner, delayed, kill_priv, flags);
            // What follows may wait for the front-end.
            request.unpin();
            done
        };
        let done = match self.dax.as_deref().zip(file) {
            // Where it will go is not known before.
            Some((dax, file)) if open_flag(flags, libc::O_APPEND) && !delayed => {
                dax.change(&file, 0, || write(None))?
            }
            Some((dax, file)) => dax.write(&file, from, u64::from(size), write)?,
            None => write(None)?,
        };
        Ok(written(done))
    }

    fn window(&self) -> Option<(WindowPlace, &Engine)> {
        let dax = self.dax.as_deref()?;
        Some((dax.place()?, dax.engine()))
    }

    pub(crate) fn setup_mapping(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let dax = self.dax.as_deref().filter(|dax| dax.is_there()).ok_or(Errno::ENOSYS)?;
        let asked: fuse::SetupmappingIn = args.take()?;
        // `fh` is always -1: the inode is what counts.
        dax.setup(nodeid, &asked, || self.file_of(ctx, nodeid)).and(Reply::DONE)
    }

    /// The file of an inode, readable and writable: QEMU wants it so, also for a guest that only reads
    /// (Q7, Q8). The file system gives it to whoever reads from it.
    fn file_of(&self, ctx: Context, nodeid: u64) -> io::Result<File> {
        let flags = libc::O_RDWR.cast_unsigned();
        let (handle, _) = self.fs.open(ctx, nodeid, false, flags)?;
        let handle = handle.ok_or(Errno::EBADF)?;
        let file = self.with_file(ctx, nodeid, handle, File::try_clone);
        self.fs.release(ctx, nodeid, flags, handle, false, false, None)?;
        file
    }

    pub(crate) fn remove_mapping(&self, args: &mut Args<'_>) -> io::Result<Reply> {
        let dax = self.dax.as_deref().filter(|dax| dax.is_there()).ok_or(Errno::ENOSYS)?;
        let fuse::RemovemappingIn { count } = args.take()?;
        if count > MAX_REMOVALS {
            return Err(invalid());
        }
        let removals: io::Result<Vec<_>> =
            (0..count).map(|_| args.take::<fuse::RemovemappingOne>()).collect();
        dax.remove(&removals?).and(Reply::DONE)
    }
}
