// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The FUSE operations, one by one: checked arguments in, a reply out. The work is done by
//! virtiofsd's file system, or by the engine where a file may be granted.

mod attributes;
mod mapping;
mod readdir;
mod transfer;

use std::ffi::CStr;
use std::io;
use std::sync::atomic::Ordering;

use log::{info, warn};
use nix::errno::Errno;
use nix::unistd::{getegid, getgid};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, GetxattrReply, ListxattrReply, OpenOptions,
    SetxattrFlags,
};
use virtiofsd::fuse::{self, Attr, AttrOut, EntryOut, FsOptions, Opcode};
use virtiofsd::oslib;
use virtiofsd::soft_idmap::HostGid;
use vm_memory_of_virtiofsd::ByteValued;

use super::dax::times::Occasion;
use super::dax::{Dax, MAP_ALIGNMENT_LOG2};
use super::descriptors::Want;
use super::identity::{FileId, Subject, Which};
use super::lives::Life;
use super::message::{Args, MAX_DATA_BYTES, Message, Reply, invalid};
use super::server::Server;
use crate::window::{FileOffset, FileRange};

/// FUSE_MAP_ALIGNMENT and FUSE_HAS_INODE_DAX.
const MAP_ALIGNMENT: u64 = 1 << 26;
const HAS_INODE_DAX: u64 = 1 << 33;

/// The most that one COPY_FILE_RANGE copies: who copies more asks again, and others get their turn.
const MAX_COPY_BYTES: u64 = 16 << 20;

/// FUSE_FSYNC_FDATASYNC.
const FSYNC_FDATASYNC: u32 = 1 << 0;

/// What we can do by ourselves, whatever the file system wants: what virtiofsd offers, too.
const SUPPORTED: [FsOptions; 12] = [
    FsOptions::ASYNC_READ,
    FsOptions::PARALLEL_DIROPS,
    FsOptions::BIG_WRITES,
    FsOptions::AUTO_INVAL_DATA,
    FsOptions::ASYNC_DIO,
    FsOptions::HAS_IOCTL_DIR,
    FsOptions::ATOMIC_O_TRUNC,
    FsOptions::MAX_PAGES,
    FsOptions::SUBMOUNTS,
    FsOptions::INIT_EXT,
    FsOptions::CREATE_SUPP_GROUP,
    FsOptions::ALLOW_IDMAP,
];

pub(crate) fn open_flag(flags: u32, flag: i32) -> bool {
    flags & flag.cast_unsigned() != 0
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Everything but READ and WRITE. `room` is what the guest has for the reply.
    pub(crate) fn operate(
        &self,
        opcode: Opcode,
        message: &Message,
        args: &mut Args<'_>,
        room: usize,
    ) -> io::Result<Reply> {
        if room < reply_bytes(opcode) {
            return Err(invalid());
        }
        // Before anything is made: a file without a descriptor for it could not be taken back.
        let _leave = descriptors_for(opcode).map(|want| self.descriptors.ask(want)).transpose()?;
        let (fs, ctx, nodeid) = (&self.fs, message.context(), message.nodeid());
        let life = message.life;
        match opcode {
            Opcode::Init => self.init(life, args),
            Opcode::Destroy => self.destroy(life),
            Opcode::Lookup => self.entry(life, ctx, fs.lookup(ctx, nodeid, args.name()?)),
            Opcode::Forget => {
                let asked: fuse::ForgetIn = args.take()?;
                // The root is looked up by nobody, and can't be forgotten.
                if nodeid != fuse::ROOT_ID {
                    fs.forget(ctx, nodeid, asked.nlookup);
                    self.forget_number(nodeid);
                }
                Ok(Reply::None)
            }
            Opcode::BatchForget => self.batch_forget(ctx, args),
            Opcode::Interrupt => Ok(Reply::None),
            Opcode::Getattr => {
                let asked: fuse::GetattrIn = args.take()?;
                let fh = (asked.flags & fuse::GETATTR_FH != 0).then_some(asked.fh);
                let (attr, valid) = fs.getattr(ctx, nodeid, fh)?;
                Ok(self.attr(nodeid, self.settled(ctx, nodeid, attr), valid))
            }
            Opcode::Setattr => self.setattr(ctx, nodeid, args),
            Opcode::Readlink => Ok(Reply::Bytes(fs.readlink(ctx, nodeid)?)),
            Opcode::Symlink | Opcode::Mknod | Opcode::Mkdir | Opcode::Link => {
                self.make(life, opcode, ctx, nodeid, args)
            }
            Opcode::Unlink => fs.unlink(ctx, nodeid, args.name()?).and(Reply::DONE),
            Opcode::Rmdir => fs.rmdir(ctx, nodeid, args.name()?).and(Reply::DONE),
            Opcode::Rename => {
                let asked: fuse::RenameIn = args.take()?;
                self.rename(ctx, nodeid, asked.newdir, 0, args)
            }
            Opcode::Rename2 => {
                let asked: fuse::Rename2In = args.take()?;
                self.rename(ctx, nodeid, asked.newdir, asked.flags, args)
            }
            Opcode::Statfs => Ok(Reply::object(fuse::Kstatfs::from(fs.statfs(ctx, nodeid)?))),
            Opcode::Open => self.open(life, ctx, nodeid, args),
            Opcode::Create => self.create(life, ctx, nodeid, args),
            Opcode::Release => self.release(ctx, nodeid, args),
            Opcode::Flush => {
                let asked: fuse::FlushIn = args.take()?;
                fs.flush(ctx, nodeid, asked.fh, asked.lock_owner)?;
                if self.opened.is_writer(asked.fh) {
                    self.settle(nodeid, asked.fh, Occasion::Close)?;
                }
                self.opened.check(asked.fh).and(Reply::DONE)
            }
            Opcode::Fsync => self.fsync(ctx, nodeid, args),
            Opcode::Syncfs => self.opened.sync_all(|| self.syncfs(ctx, nodeid)).and(Reply::DONE),
            Opcode::Fallocate => self.fallocate(ctx, nodeid, args),
            Opcode::CopyFileRange => self.copy_file_range(ctx, nodeid, args),
            Opcode::Lseek => {
                let asked: fuse::LseekIn = args.take()?;
                let offset = fs.lseek(ctx, nodeid, asked.fh, asked.offset, asked.whence)?;
                Ok(Reply::object(fuse::LseekOut { offset }))
            }
            Opcode::Setxattr | Opcode::Getxattr | Opcode::Listxattr | Opcode::Removexattr => {
                self.xattr(opcode, ctx, nodeid, args)
            }
            Opcode::Access => {
                let asked: fuse::AccessIn = args.take()?;
                fs.access(ctx, nodeid, asked.mask).and(Reply::DONE)
            }
            Opcode::Opendir => {
                let asked: fuse::OpenIn = args.take()?;
                let opened = fs.opendir(ctx, nodeid, self.flags(asked.flags)?)?;
                self.unless_over(life, || {
                    let handle = opened.0.unwrap_or_default();
                    let _ = fs.releasedir(ctx, nodeid, asked.flags, handle);
                })?;
                Ok(open_out(opened))
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                let plus = matches!(opcode, Opcode::Readdirplus);
                let asked: fuse::ReadIn = args.take()?;
                readdir::read(self, ctx, nodeid, &asked, room, plus).map(Reply::Bytes)
            }
            Opcode::Releasedir => {
                let asked: fuse::ReleaseIn = args.take()?;
                fs.releasedir(ctx, nodeid, asked.flags, asked.fh)?;
                self.opened.release(asked.fh); // A file's handle is released by it, too.
                Reply::DONE
            }
            Opcode::Fsyncdir => {
                let asked: fuse::FsyncIn = args.take()?;
                let datasync = asked.fsync_flags & FSYNC_FDATASYNC != 0;
                fs.fsyncdir(ctx, nodeid, datasync, asked.fh).and(Reply::DONE)
            }
            Opcode::SetupMapping => self.setup_mapping(life, ctx, nodeid, args),
            Opcode::RemoveMapping => self.remove_mapping(args),
            // What virtiofsd does not do, either: locks, ioctl, bmap, poll, tmpfile.
            _ => Err(Errno::ENOSYS.into()),
        }
    }

    fn has(&self, option: FsOptions) -> bool {
        self.options.load(Ordering::Relaxed) & option.bits() != 0
    }

    /// The flags of an open, as far as they are the host's business.
    fn flags(&self, asked: u32) -> io::Result<u32> {
        self.open_flags.of(asked, self.has(FsOptions::WRITEBACK_CACHE))
    }

    fn init(&self, life: Life, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::InitInCompat = args.take()?;
        let mut capable = u64::from(asked.flags);
        if capable & FsOptions::INIT_EXT.bits() != 0 {
            capable |= u64::from(args.take::<fuse::InitInExt>()?.flags2) << 32;
        }
        let mut out = fuse::InitOut {
            major: fuse::KERNEL_VERSION,
            minor: fuse::KERNEL_MINOR_VERSION,
            ..fuse::InitOut::default()
        };
        if asked.major > fuse::KERNEL_VERSION {
            return Ok(Reply::object(out)); // It comes back with ours.
        }
        if asked.major < fuse::KERNEL_VERSION || asked.minor < fuse::MIN_KERNEL_MINOR_VERSION {
            warn!("the guest's FUSE {}.{} is too old", asked.major, asked.minor);
            return Err(Errno::EPROTO.into());
        }
        // A guest that was reset, or is hostile, may have left grants and open files.
        let life = self.forget_guest(life).ok_or(Errno::EIO)?;
        let dax_options = self.dax_options();
        // virtiofsd's code writes to stderr by itself where a guest knows no submounts: see
        // `without_submounts`.
        let mut offered = FsOptions::from_bits_truncate(capable) | FsOptions::SUBMOUNTS;
        if capable & dax_options != 0 {
            // A guest that collects writes keeps mtime by itself, and takes none from us: those of
            // its stores through the window it would never see.
            offered.remove(FsOptions::WRITEBACK_CACHE);
        }
        // An INIT of an old driver that is still at it must not meet this one in the file system.
        let wanted = self.lives.while_current(life, || self.fs.init(offered));
        let wanted = wanted.ok_or(Errno::EIO)??;
        let supported = SUPPORTED.iter().fold(wanted.bits(), |all, one| all | one.bits());
        let enabled = capable & (supported | dax_options);
        let dax = enabled & (MAP_ALIGNMENT | HAS_INODE_DAX);
        if let Some(window) = &self.dax {
            window.agree(dax_options != 0, enabled & HAS_INODE_DAX != 0);
        }
        self.options.store(enabled, Ordering::Relaxed);
        self.lives.mount(life);
        info!("mounted; the guest {}", if dax != 0 { "may map files" } else { "maps no files" });
        out.max_readahead = asked.max_readahead;
        (out.flags, out.flags2) = (enabled as u32, (enabled >> 32) as u32);
        (out.max_background, out.congestion_threshold) = (u16::MAX, u16::MAX / 4 * 3);
        out.max_write = MAX_DATA_BYTES;
        out.max_pages = (MAX_DATA_BYTES / 4096) as u16;
        out.time_gran = 1;
        out.map_alignment = if dax == 0 { 0 } else { MAP_ALIGNMENT_LOG2 };
        Ok(Reply::object(out))
    }

    fn dax_options(&self) -> u64 {
        let there = self.dax.as_deref().is_some_and(Dax::is_there);
        if there { MAP_ALIGNMENT | HAS_INODE_DAX } else { 0 }
    }

    /// Takes away what the guest has mounted in `life`. Returns the life that follows; none, and
    /// nothing is done, if `life` is over and another driver has mounted.
    fn forget_guest(&self, life: Life) -> Option<Life> {
        let life = self.lives.unmount(life)?;
        if let Some(dax) = &self.dax {
            // It may take a disk's time, and so more than the driver's.
            dax.release_all(|| self.lives.is_current(life));
        }
        self.lives.while_current(life, || {
            if let Some(dax) = &self.dax {
                dax.clear_nodes();
            }
            self.opened.clear();
            self.fs.destroy();
            self.descriptors.guest_has_none();
        });
        Some(life)
    }

    /// Undoes by `undo` what a request of `life` has just made for the guest, if `life` was over by
    /// then: nobody else would. What ends a life throws away what was made before.
    ///
    /// # Errors
    /// EIO if it was.
    fn unless_over(&self, life: Life, undo: impl FnOnce()) -> io::Result<()> {
        if self.lives.is_mounted(life) {
            return Ok(());
        }
        undo();
        Err(Errno::EIO.into())
    }

    fn destroy(&self, life: Life) -> io::Result<Reply> {
        if self.forget_guest(life).is_some() {
            info!("unmounted");
        }
        Reply::DONE
    }

    /// A guest that knows no submounts is told of none.
    pub(crate) fn without_submounts(&self, attr: &mut Attr) {
        if !self.has(FsOptions::SUBMOUNTS) {
            attr.flags &= !fuse::ATTR_SUBMOUNT;
        }
    }

    fn entry(&self, life: Life, ctx: Context, entry: io::Result<Entry>) -> io::Result<Reply> {
        let entry = entry?;
        self.unless_over(life, || self.fs.forget(ctx, entry.inode, 1))?;
        Ok(Reply::object(self.entry_out(ctx, entry)))
    }

    fn batch_forget(&self, ctx: Context, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::BatchForgetIn = args.take()?;
        let mut all = Vec::new();
        for _ in 0..asked.count {
            // A count that lies ends here, at the end of the message.
            let Ok(one) = args.take::<fuse::ForgetOne>() else { break };
            if one.nodeid != fuse::ROOT_ID {
                all.push((one.nodeid, one.nlookup));
            }
        }
        let numbers: Vec<_> = all.iter().map(|(nodeid, _)| *nodeid).collect();
        self.fs.batch_forget(ctx, all);
        numbers.into_iter().for_each(|nodeid| self.forget_number(nodeid));
        Ok(Reply::None)
    }

    fn forget_number(&self, nodeid: u64) {
        if let Some(dax) = &self.dax {
            dax.forget_number(nodeid);
        }
    }

    /// Lets `change` make the file of an inode empty.
    fn empty<T>(
        &self,
        ctx: Context,
        nodeid: u64,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let Some(dax) = &self.dax else { return change() };
        let ask = |known: &dyn Fn(u64) -> bool| self.identify(ctx, nodeid, known);
        dax.resize(&dax.find(Subject { nodeid, file: Which::Ask(&ask) })?, 0, change)
    }

    fn make(
        &self,
        life: Life,
        opcode: Opcode,
        ctx: Context,
        parent: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let fs = &self.fs;
        let made = match opcode {
            Opcode::Symlink => {
                let (name, target) = (args.name()?, args.string()?);
                let more = self.extensions(args)?;
                with_groups(more, |more| fs.symlink(ctx, target, parent, name, more))
            }
            Opcode::Mknod => {
                let asked: fuse::MknodIn = args.take()?;
                let (name, more) = (args.name()?, self.extensions(args)?);
                let (mode, rdev, umask) = (asked.mode, asked.rdev, asked.umask);
                with_groups(more, |more| fs.mknod(ctx, parent, name, mode, rdev, umask, more))
            }
            Opcode::Mkdir => {
                let asked: fuse::MkdirIn = args.take()?;
                let (name, more) = (args.name()?, self.extensions(args)?);
                let (mode, umask) = (asked.mode, asked.umask);
                with_groups(more, |more| fs.mkdir(ctx, parent, name, mode, umask, more))
            }
            _ => {
                let asked: fuse::LinkIn = args.take()?;
                fs.link(ctx, asked.oldnodeid, parent, args.name()?)
            }
        };
        self.entry(life, ctx, made)
    }

    fn extensions(&self, args: &mut Args<'_>) -> io::Result<Extensions> {
        args.extensions(self.has(FsOptions::SECURITY_CTX), self.has(FsOptions::CREATE_SUPP_GROUP))
    }

    fn rename(
        &self,
        ctx: Context,
        from: u64,
        to: u64,
        flags: u32,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let known = libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE | libc::RENAME_WHITEOUT;
        let (old, new): (&CStr, &CStr) = (args.name()?, args.name()?);
        self.fs.rename(ctx, from, old, to, new, flags & known).and(Reply::DONE)
    }

    fn open(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::OpenIn = args.take()?;
        // The file is there.
        let flags = self.flags(asked.flags)? & !libc::O_EXCL.cast_unsigned();
        self.open_handle(life, ctx, nodeid, flags, asked.open_flags).map(open_out)
    }

    fn open_handle(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        flags: u32,
        open_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let kill_priv = open_flags & fuse::OPEN_KILL_SUIDGID != 0;
        let open = || self.fs.open(ctx, nodeid, kill_priv, flags);
        // ATOMIC_O_TRUNC: the window must let go before the file shrinks.
        let opened =
            if open_flag(flags, libc::O_TRUNC) { self.empty(ctx, nodeid, open)? } else { open()? };
        self.note_open(life, ctx, nodeid, flags, opened.0)?;
        Ok(opened)
    }

    /// A file was opened: notes which. If that can't be found out, it is closed again.
    fn note_open(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        flags: u32,
        handle: Option<u64>,
    ) -> io::Result<()> {
        let Some(handle) = handle else { return Ok(()) };
        let noted = self
            .with_file(ctx, nodeid, handle, FileId::of)
            .and_then(|file| self.count_open(nodeid, flags, handle, file))
            .and_then(|()| {
                self.unless_over(life, || {
                    self.opened.release(handle);
                })
            });
        if noted.is_err() {
            self.fs.release(ctx, nodeid, 0, handle, false, false, None)?;
        }
        noted
    }

    fn create(
        &self,
        life: Life,
        ctx: Context,
        parent: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::CreateIn = args.take()?;
        let (name, more) = (args.name()?, self.extensions(args)?);
        let (flags, excl) = (self.flags(asked.flags)?, libc::O_EXCL.cast_unsigned());
        // A new file: what is there already is opened as OPEN does it, since it may be granted.
        let new = (flags | excl) & !libc::O_TRUNC.cast_unsigned();
        let made = with_groups(more, |more| {
            self.fs.create(ctx, parent, name, asked.mode, false, new, asked.umask, more)
        });
        let (entry, opened) = match made {
            Ok((entry, handle, options)) => {
                let noted = self.note_open(life, ctx, entry.inode, flags, handle);
                noted.inspect_err(|_| self.fs.forget(ctx, entry.inode, 1))?;
                (entry, (handle, options))
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && flags & excl == 0 => {
                self.open_entry(life, ctx, parent, name, flags, asked.open_flags)?
            }
            Err(e) => return Err(e),
        };
        let mut reply = self.entry_out(ctx, entry).as_slice().to_vec();
        if let Reply::Bytes(opened) = open_out(opened) {
            reply.extend(opened);
        }
        Ok(Reply::Bytes(reply))
    }

    /// Looks `name` up and opens it: both, or neither.
    fn open_entry(
        &self,
        life: Life,
        ctx: Context,
        parent: u64,
        name: &CStr,
        flags: u32,
        open_flags: u32,
    ) -> io::Result<(Entry, (Option<u64>, OpenOptions))> {
        let mut entry = self.fs.lookup(ctx, parent, name)?;
        let opened = self.open_handle(life, ctx, entry.inode, flags, open_flags);
        // The guest hears of no look-up that ends in an error, and so forgets none.
        let opened = opened.inspect_err(|_| self.fs.forget(ctx, entry.inode, 1))?;
        if open_flag(flags, libc::O_TRUNC)
            && let Ok((attr, _)) = self.fs.getattr(ctx, entry.inode, opened.0)
        {
            entry.attr = attr;
        }
        Ok((entry, opened))
    }

    fn fsync(&self, ctx: Context, nodeid: u64, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::FsyncIn = args.take()?;
        let datasync = asked.fsync_flags & FSYNC_FDATASYNC != 0;
        let sync = || self.fs.fsync(ctx, nodeid, datasync, asked.fh);
        let through = || {
            let Some(dax) = &self.dax else { return sync() };
            let file = dax.find(self.open_file(nodeid, asked.fh))?;
            // Before the sync: the new times are part of what becomes durable.
            dax.settle(&file, Occasion::Close);
            dax.sync(&file, sync)
        };
        self.opened.sync(asked.fh, through).and(Reply::DONE)
    }

    fn syncfs(&self, ctx: Context, nodeid: u64) -> io::Result<()> {
        if let Some(dax) = &self.dax {
            dax.settle_all(Occasion::Look);
            dax.sync_all()?;
        }
        self.fs.syncfs(ctx, nodeid)
    }

    fn fallocate(&self, ctx: Context, nodeid: u64, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::FallocateIn = args.take()?;
        let (from, bytes, mode) = (asked.offset, asked.length, asked.mode);
        let change = || self.fs.fallocate(ctx, nodeid, asked.fh, mode, from, bytes);
        let Some(dax) = &self.dax else { return change().and(Reply::DONE) };
        let has = |flag| open_flag(mode, flag);
        let file = dax.find(self.open_file(nodeid, asked.fh))?;
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // A handle of this file that can write, and no other mode: else the file system refuses it.
        let may = self.opened.file(nodeid, asked.fh).is_some() && self.opened.is_writer(asked.fh);
        if may
            && mode == hole.cast_unsigned()
            && dax.punch(&file, FileRange::new(FileOffset(from), bytes))?
        {
            return Reply::DONE;
        }
        let shorter_by = if has(libc::FALLOC_FL_COLLAPSE_RANGE) { bytes } else { 0 };
        dax.change(&file, shorter_by, change).and(Reply::DONE)
    }

    fn copy_file_range(&self, ctx: Context, nodeid: u64, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::CopyfilerangeIn = args.take()?;
        let len = asked.len.min(MAX_COPY_BYTES);
        let copy = || {
            self.fs.copyfilerange(
                ctx,
                nodeid,
                asked.fh_in,
                asked.off_in,
                asked.nodeid_out,
                asked.fh_out,
                asked.off_out,
                len,
                asked.flags,
            )
        };
        let done = match &self.dax {
            Some(dax) => {
                let to = dax.find(self.open_file(asked.nodeid_out, asked.fh_out))?;
                dax.write(&to, FileRange::new(FileOffset(asked.off_out), len), |_| copy())?
            }
            None => copy()?,
        };
        Ok(written(done))
    }

    fn xattr(
        &self,
        opcode: Opcode,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let fs = &self.fs;
        if matches!(opcode, Opcode::Removexattr) {
            return fs.removexattr(ctx, nodeid, args.string()?).and(Reply::DONE);
        }
        if matches!(opcode, Opcode::Setxattr) {
            let asked = self.setxattr_in(args)?;
            let (name, value) = (args.string()?, args.rest());
            let value = value.get(..asked.size as usize).ok_or_else(invalid)?;
            let more = SetxattrFlags::from_bits_truncate(asked.setxattr_flags);
            return fs.setxattr(ctx, nodeid, name, value, asked.flags, more).and(Reply::DONE);
        }
        let asked: fuse::GetxattrIn = args.take()?;
        if asked.size > MAX_DATA_BYTES {
            return Err(Errno::ENOMEM.into());
        }
        let count = |size| Reply::object(fuse::GetxattrOut { size, padding: 0 });
        if matches!(opcode, Opcode::Listxattr) {
            return Ok(match fs.listxattr(ctx, nodeid, asked.size)? {
                ListxattrReply::Names(names) => Reply::Bytes(names),
                ListxattrReply::Count(size) => count(size),
            });
        }
        Ok(match fs.getxattr(ctx, nodeid, args.string()?, asked.size)? {
            GetxattrReply::Value(value) => Reply::Bytes(value),
            GetxattrReply::Count(size) => count(size),
        })
    }

    fn setxattr_in(&self, args: &mut Args<'_>) -> io::Result<fuse::SetxattrIn> {
        if self.has(FsOptions::SETXATTR_EXT) {
            return args.take();
        }
        let short: fuse::SetxattrInCompat = args.take()?;
        Ok(fuse::SetxattrIn { size: short.size, flags: short.flags, ..Default::default() })
    }
}

/// What a reply has at least: where there is no room for it, nothing is opened or looked up in
/// vain.
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

/// Lets `make` make something in the groups that the guest names, and leaves none of them to what
/// this thread does next: virtiofsd's code forgets them where it changes no other id.
fn with_groups<T>(
    more: Extensions,
    make: impl FnOnce(Extensions) -> io::Result<T>,
) -> io::Result<T> {
    let groups = !more.sup_gids.is_empty();
    let made = make(more);
    if made.is_err() && getegid() != getgid() {
        // virtiofsd's code leaves it so where it may set the group and not the user.
        oslib::seteffgid(HostGid::from(getgid().as_raw()))?;
    }
    if groups {
        // Who may not drop them could not take them.
        let _ = oslib::dropsupgroups();
    }
    made
}

/// What a request opens, beside what it closes again in any case.
fn descriptors_for(opcode: Opcode) -> Option<Want> {
    use Opcode::*;
    match opcode {
        Lookup => Some(Want::Inode),
        Symlink | Mknod | Mkdir | Link | Open => Some(Want::Keep(1)),
        Create => Some(Want::Keep(2)),
        // Without a directory open, nothing in it is removed.
        Opendir | SetupMapping => Some(Want::Moment),
        _ => None,
    }
}

pub(crate) fn written(bytes: usize) -> Reply {
    Reply::object(fuse::WriteOut { size: bytes as u32, padding: 0 })
}

fn open_out((handle, options): (Option<u64>, OpenOptions)) -> Reply {
    let (fh, open_flags) = (handle.unwrap_or(0), options.bits());
    Reply::object(fuse::OpenOut { fh, open_flags, padding: 0 })
}
