// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! LOOKUP, FORGET, and the operations that create, rename and link names.

use std::ffi::CStr;
use std::io;

use nix::unistd::{getegid, getgid};
use virtiofsd::filesystem::{Context, Entry, Extensions, FileSystem};
use virtiofsd::fuse::{self, FsOptions, Opcode};
use virtiofsd::oslib;
use virtiofsd::soft_idmap::HostGid;

use crate::fs::inodes::Room;
use crate::fs::lives::Life;
use crate::fs::message::{Args, Reply};
use crate::fs::server::Server;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn lookup(
        &self,
        life: Life,
        ctx: Context,
        parent: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let found = self.fs.lookup(ctx, parent, args.name()?);
        self.entry(life, ctx, found, None)
    }

    /// The reply with an entry. `room`: room for its inode, if the request created it.
    fn entry(
        &self,
        life: Life,
        ctx: Context,
        entry: io::Result<Entry>,
        room: Option<Room<'_>>,
    ) -> io::Result<Reply> {
        let entry = entry?;
        self.unless_over(life, || self.fs.forget(ctx, entry.inode, 1))?;
        self.count_lookup(ctx, entry.inode, room)?;
        Ok(Reply::object(self.entry_out(ctx, entry)))
    }

    /// Counts a look-up that the reply will report. At the limit of inodes, undoes the look-up.
    ///
    /// # Errors
    /// ENFILE at the limit.
    pub(super) fn count_lookup(
        &self,
        ctx: Context,
        nodeid: u64,
        room: Option<Room<'_>>,
    ) -> io::Result<()> {
        let counted = self.inodes.count(nodeid, room);
        counted.inspect_err(|_| self.fs.forget(ctx, nodeid, 1))
    }

    /// Undoes a look-up that was counted and that no reply will report.
    pub(super) fn undo_lookup(&self, ctx: Context, nodeid: u64) {
        self.fs.forget(ctx, nodeid, 1);
        self.inodes.forget(nodeid, 1);
    }

    pub(super) fn make(
        &self,
        life: Life,
        opcode: Opcode,
        ctx: Context,
        parent: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let fs = &self.fs;
        // Before the inode is created. A LINK creates none.
        let is_new = !matches!(opcode, Opcode::Link);
        let room = is_new.then(|| self.inodes.reserve()).transpose()?;
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
        self.entry(life, ctx, made, room)
    }

    pub(super) fn extensions(&self, args: &mut Args<'_>) -> io::Result<Extensions> {
        args.extensions(self.has(FsOptions::SECURITY_CTX), self.has(FsOptions::CREATE_SUPP_GROUP))
    }

    pub(super) fn rename(
        &self,
        opcode: Opcode,
        ctx: Context,
        from: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let (to, flags) = if matches!(opcode, Opcode::Rename2) {
            let asked: fuse::Rename2In = args.take()?;
            (asked.newdir, asked.flags)
        } else {
            (args.take::<fuse::RenameIn>()?.newdir, 0)
        };
        let known = libc::RENAME_EXCHANGE | libc::RENAME_NOREPLACE | libc::RENAME_WHITEOUT;
        let (old, new): (&CStr, &CStr) = (args.name()?, args.name()?);
        self.fs.rename(ctx, from, old, to, new, flags & known).and(Reply::DONE)
    }

    pub(super) fn forget(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::ForgetIn = args.take()?;
        // The guest has not looked the root up, and can't forget it.
        if nodeid != fuse::ROOT_ID {
            self.fs.forget(ctx, nodeid, asked.nlookup);
            self.forgotten(nodeid, asked.nlookup);
        }
        Ok(Reply::None)
    }

    pub(super) fn batch_forget(&self, ctx: Context, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::BatchForgetIn = args.take()?;
        let mut all = Vec::new();
        for _ in 0..asked.count {
            // A count larger than the message ends the loop here.
            let Ok(one) = args.take::<fuse::ForgetOne>() else { break };
            if one.nodeid != fuse::ROOT_ID {
                all.push((one.nodeid, one.nlookup));
            }
        }
        self.fs.batch_forget(ctx, all.clone());
        all.into_iter().for_each(|(nodeid, count)| self.forgotten(nodeid, count));
        Ok(Reply::None)
    }

    fn forgotten(&self, nodeid: u64, count: u64) {
        self.inodes.forget(nodeid, count);
        if let Some(dax) = &self.dax {
            dax.forget_number(nodeid);
        }
    }
}

/// Calls `make` with the supplementary groups of the guest's request, and drops the groups of this
/// thread afterwards: virtiofsd's code leaves them set if it changes no other id.
pub(super) fn with_groups<T>(
    more: Extensions,
    make: impl FnOnce(Extensions) -> io::Result<T>,
) -> io::Result<T> {
    let groups = !more.sup_gids.is_empty();
    let made = make(more);
    if made.is_err() && getegid() != getgid() {
        // virtiofsd's code leaves the group set after an error of setting the user.
        oslib::seteffgid(HostGid::from(getgid().as_raw()))?;
    }
    if groups {
        // An error is ignored: a thread that may not drop groups could not set them.
        let _ = oslib::dropsupgroups();
    }
    made
}
