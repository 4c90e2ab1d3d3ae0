// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The FUSE operations: each takes checked arguments and returns a reply. Operations on files are
//! done by virtiofsd's file system, and through the engine if the file may be granted.

mod attributes;
mod flush;
mod leases;
mod mount;
mod names;
mod open;
mod ranges;
mod readdir;
mod transfer;
mod xattr;

use std::io;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{self, AttrOut, EntryOut, FsOptions, Opcode};

use super::descriptors::Want;
use super::message::{Args, Message, Reply, invalid};
use super::serve::Blocking;
use super::server::Server;

pub(crate) fn open_flag(flags: u32, flag: i32) -> bool {
    flags & flag.cast_unsigned() != 0
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Serves each operation except READ and WRITE. `room`: number of bytes that the guest has for
    /// the reply behind its header.
    ///
    /// # Errors
    /// EAGAIN if the request would wait for a lease and `blocking` forbids that; else those of the
    /// operation.
    pub(crate) fn operate(
        &self,
        opcode: Opcode,
        message: &Message,
        room: usize,
        blocking: Blocking,
    ) -> io::Result<Reply> {
        if room < reply_bytes(opcode) {
            return Err(invalid());
        }
        let operation = || {
            // Before a file is created: without a descriptor for it the creation could not be
            // undone.
            let permit = descriptors_for(opcode).map(|want| self.descriptors.ask(want));
            let _permit = permit.transpose()?;
            self.operation(opcode, message, room)
        };
        match blocking {
            Blocking::Lease => self.behind_leases(opcode, message, operation),
            Blocking::Allowed | Blocking::IfUnknown => operation(),
        }
    }

    fn operation(&self, opcode: Opcode, message: &Message, room: usize) -> io::Result<Reply> {
        use Opcode::*;
        let (fs, ctx, nodeid) = (&self.fs, message.context(), message.nodeid());
        let (life, args) = (message.life, &mut Args::new(message.args()));
        match opcode {
            Init => self.init(life, args),
            Destroy => self.destroy(life),
            Lookup => self.lookup(life, ctx, nodeid, args),
            Forget => self.forget(ctx, nodeid, args),
            BatchForget => self.batch_forget(ctx, args),
            Interrupt => Ok(Reply::None),
            Getattr => self.getattr(ctx, nodeid, args),
            Setattr => self.setattr(ctx, nodeid, args),
            Access => self.access(ctx, nodeid, args),
            Readlink => Ok(Reply::Bytes(fs.readlink(ctx, nodeid)?)),
            Symlink | Mknod | Mkdir | Link => self.make(life, opcode, ctx, nodeid, args),
            Unlink => fs.unlink(ctx, nodeid, args.name()?).and(Reply::DONE),
            Rmdir => fs.rmdir(ctx, nodeid, args.name()?).and(Reply::DONE),
            Rename | Rename2 => self.rename(opcode, ctx, nodeid, args),
            Statfs => Ok(Reply::object(fuse::Kstatfs::from(fs.statfs(ctx, nodeid)?))),
            Open => self.open(life, ctx, nodeid, args),
            Create => self.create(life, ctx, nodeid, args),
            Release => self.release(ctx, nodeid, args),
            Flush => self.flush(ctx, nodeid, args),
            Fsync => self.fsync(ctx, nodeid, args),
            Fsyncdir => self.fsyncdir(ctx, nodeid, args),
            Syncfs => self.opened.sync_all(|| self.syncfs(ctx, nodeid)).and(Reply::DONE),
            Fallocate => self.fallocate(ctx, nodeid, args),
            CopyFileRange => self.copy_file_range(ctx, nodeid, args),
            Lseek => self.lseek(ctx, nodeid, args),
            Setxattr | Getxattr | Listxattr | Removexattr => self.xattr(opcode, ctx, nodeid, args),
            Opendir => self.opendir(life, ctx, nodeid, args),
            Readdir => self.readdir(ctx, nodeid, args, room, false),
            Readdirplus => self.readdir(ctx, nodeid, args, room, true),
            Releasedir => self.releasedir(ctx, nodeid, args),
            SetupMapping => self.setup_mapping(life, ctx, nodeid, args),
            RemoveMapping => self.remove_mapping(args),
            // Not supported by virtiofsd: locks, ioctl, bmap, poll, tmpfile.
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn has(&self, option: FsOptions) -> bool {
        self.options.load(Ordering::Relaxed) & option.bits() != 0
    }
}

/// Smallest length of a reply, in bytes. A request with less room is refused before it opens or
/// looks up anything.
fn reply_bytes(opcode: Opcode) -> usize {
    use Opcode::*;
    match opcode {
        Lookup | Symlink | Mknod | Mkdir | Link => size_of::<EntryOut>(),
        Create => size_of::<EntryOut>() + size_of::<fuse::OpenOut>(),
        Open | Opendir => size_of::<fuse::OpenOut>(),
        Getattr | Setattr => size_of::<AttrOut>(),
        Init => size_of::<fuse::InitOut>(),
        _ => 0,
    }
}

/// Number and kind of the descriptors that a request opens and does not close itself.
fn descriptors_for(opcode: Opcode) -> Option<Want> {
    use Opcode::*;
    match opcode {
        Lookup => Some(Want::Inode),
        Symlink | Mknod | Mkdir | Link | Open => Some(Want::Keep(1)),
        Create => Some(Want::Keep(2)),
        // Also given when few descriptors are left: a directory must be opened before its files can
        // be removed.
        Opendir | SetupMapping => Some(Want::Moment),
        _ => None,
    }
}

pub(crate) fn written(bytes: usize) -> Reply {
    Reply::object(fuse::WriteOut { size: bytes as u32, padding: 0 })
}
