// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! OPEN, CREATE and RELEASE. Counts the handles that can write.

use std::ffi::CStr;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, Entry, FileSystem, OpenOptions};
use virtiofsd::fuse::{self, FsOptions};
use vm_memory_of_virtiofsd::ByteValued;

use crate::fs::host_file::{Subject, Which};
use crate::fs::lives::Life;
use crate::fs::message::{Args, Reply};
use crate::fs::ops::names::with_groups;
use crate::fs::ops::open_flag;
use crate::fs::server::Server;
use crate::support::file_id::FileId;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// The flags of an open for the host.
    pub(super) fn flags(&self, asked: u32) -> io::Result<u32> {
        self.open_flags.of(asked, self.has(FsOptions::WRITEBACK_CACHE))
    }

    pub(super) fn open(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::OpenIn = args.take()?;
        // O_EXCL has no meaning for a file that exists.
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
        let open = || self.open_now(ctx, nodeid, kill_priv, flags, FileId::of);
        // ATOMIC_O_TRUNC: the engine must revoke grants behind the new end before the file is
        // truncated.
        let opened = match open_flag(flags, libc::O_TRUNC) {
            true => self.empty(ctx, nodeid, open)?,
            false => open()?,
        };
        self.note_open(life, ctx, nodeid, flags, (opened.handle, Ok(opened.seen)))?;
        Ok((Some(opened.handle), opened.options))
    }

    /// Notes the file of a new handle. Closes the handle if its file is not known, or if `life` has
    /// ended.
    fn note_open(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        flags: u32,
        (handle, file): (u64, io::Result<FileId>),
    ) -> io::Result<()> {
        let noted = file.and_then(|file| self.count_open(nodeid, flags, handle, file));
        let noted = noted.and_then(|()| {
            self.unless_over(life, || {
                self.opened.release(handle);
            })
        });
        if noted.is_err() {
            self.fs.release(ctx, nodeid, 0, handle, false, false, None)?;
        }
        noted
    }

    pub(super) fn create(
        &self,
        life: Life,
        ctx: Context,
        parent: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::CreateIn = args.take()?;
        let (name, more) = (args.name()?, self.extensions(args)?);
        let (flags, excl) = (self.flags(asked.flags)?, libc::O_EXCL.cast_unsigned());
        // Only creates. A file that exists is opened as by OPEN, since it may be granted.
        let new = (flags | excl) & !libc::O_TRUNC.cast_unsigned();
        let room = self.inodes.reserve();
        let made = match &room {
            Ok(_) => with_groups(more, |more| {
                self.fs.create(ctx, parent, name, asked.mode, false, new, asked.umask, more)
            }),
            // The file may exist, and its inode may be known.
            Err(_) => Err(Errno::EEXIST.into()),
        };
        let (entry, opened) = match (made, room) {
            (Ok((entry, handle, options)), room) => {
                let counted = self.inodes.count(entry.inode, room.ok());
                let handle = handle.ok_or(Errno::EBADF)?;
                let file = self.with_file(ctx, entry.inode, handle, FileId::of);
                let file = counted.and(file);
                let noted = self.note_open(life, ctx, entry.inode, flags, (handle, file));
                noted.inspect_err(|_| self.undo_lookup(ctx, entry.inode))?;
                (entry, (Some(handle), options))
            }
            (Err(e), room) if e.kind() == io::ErrorKind::AlreadyExists && flags & excl == 0 => {
                let there = self.open_entry(life, ctx, parent, name, flags, asked.open_flags);
                there.map_err(|e| room.err().filter(|_| is_missing(&e)).unwrap_or(e))?
            }
            (Err(e), room) => return Err(room.err().unwrap_or(e)),
        };
        let mut reply = self.entry_out(ctx, entry).as_slice().to_vec();
        if let Reply::Bytes(opened) = open_out(opened) {
            reply.extend(opened);
        }
        Ok(Reply::Bytes(reply))
    }

    /// Looks `name` up and opens it. After an error neither remains.
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
        self.count_lookup(ctx, entry.inode, None)?;
        let opened = self.open_handle(life, ctx, entry.inode, flags, open_flags);
        // The reply to a failed request reports no look-up, so the guest will not forget it.
        let opened = opened.inspect_err(|_| self.undo_lookup(ctx, entry.inode))?;
        if open_flag(flags, libc::O_TRUNC)
            && let Ok((attr, _)) = self.fs.getattr(ctx, entry.inode, opened.0)
        {
            entry.attr = attr;
        }
        Ok((entry, opened))
    }

    /// Calls `change`, which truncates the file of an inode to 0 bytes.
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

    /// Counts a handle that was opened with `flags`.
    ///
    /// # Errors
    /// Those of [`Dax::find`](crate::fs::dax::Dax::find).
    fn count_open(&self, nodeid: u64, flags: u32, handle: u64, file: FileId) -> io::Result<()> {
        if flags.cast_signed() & libc::O_ACCMODE == libc::O_RDONLY {
            self.opened.open(nodeid, handle, file);
            return Ok(());
        }
        let count = || self.opened.open_to_write(nodeid, handle, file);
        match &self.dax {
            Some(dax) => {
                let subject = Subject { nodeid, file: Which::Open(Some(file)) };
                dax.opened(&dax.find(subject)?, count);
            }
            None => drop(count()),
        }
        Ok(())
    }

    pub(super) fn release(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::ReleaseIn = args.take()?;
        let flush = asked.release_flags & fuse::RELEASE_FLUSH != 0;
        let unlock = asked.release_flags & fuse::RELEASE_FLOCK_UNLOCK != 0;
        let owner = (flush || unlock).then_some(asked.lock_owner);
        self.fs.release(ctx, nodeid, asked.flags, asked.fh, flush, unlock, owner)?;
        let Some(dax) = &self.dax else {
            self.opened.release(asked.fh);
            return Reply::DONE;
        };
        let is_writer = self.opened.is_writer(asked.fh);
        let file = dax.find(self.open_file(nodeid, asked.fh))?;
        let mut forgiven = false;
        let mut count = || {
            let released = self.opened.release(asked.fh);
            forgiven = released.forgiven;
            released.writer_left
        };
        if is_writer {
            dax.closed(&file, count);
        } else {
            count();
        }
        if forgiven {
            dax.forgive(&file);
        }
        Reply::DONE
    }
}

fn is_missing(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::NotFound
}

pub(super) fn open_out((handle, options): (Option<u64>, OpenOptions)) -> Reply {
    let (fh, open_flags) = (handle.unwrap_or(0), options.bits());
    Reply::object(fuse::OpenOut { fh, open_flags, padding: 0 })
}
