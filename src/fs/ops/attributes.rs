// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! GETATTR, SETATTR, ACCESS, and the attributes in other replies. The guest may store to a mapped
//! file without a request, so the attributes are made to show such stores, and have a timeout of 0
//! for a file that may be mapped.

use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry, FileSystem, SetattrValid};
use virtiofsd::fuse::{self, Attr, AttrOut, EntryOut, FsOptions};

use crate::fs::host_file::{Subject, Which};
use crate::fs::message::{Args, Reply, valid_id};
use crate::fs::server::Server;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Settles the times of an inode, so that they show all stores. Returns `attr`, or the new
    /// attributes.
    fn settled(&self, ctx: Context, nodeid: u64, attr: Attr) -> Attr {
        let regular = attr.mode & libc::S_IFMT == libc::S_IFREG;
        match &self.dax {
            Some(dax) if regular && dax.settle_inode(nodeid, attr.ino) => {
                self.fs.getattr(ctx, nodeid, None).map_or(attr, |(attr, _)| attr)
            }
            _ => attr,
        }
    }

    fn attr(&self, nodeid: u64, mut attr: Attr, mut valid: Duration) -> Reply {
        if self.dax.as_ref().is_some_and(|dax| dax.flag(nodeid, &mut attr)) {
            valid = Duration::ZERO;
        }
        Reply::object(AttrOut {
            attr_valid: valid.as_secs(),
            attr_valid_nsec: valid.subsec_nanos(),
            dummy: 0,
            attr,
        })
    }

    pub(super) fn entry_out(&self, ctx: Context, mut entry: Entry) -> EntryOut {
        self.without_submounts(&mut entry.attr);
        entry.attr = self.settled(ctx, entry.inode, entry.attr);
        if self.dax.as_ref().is_some_and(|dax| dax.flag(entry.inode, &mut entry.attr)) {
            entry.attr_timeout = Duration::ZERO;
        }
        EntryOut::from(entry)
    }

    pub(super) fn getattr(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::GetattrIn = args.take()?;
        let fh = (asked.flags & fuse::GETATTR_FH != 0).then_some(asked.fh);
        let (attr, valid) = self.fs.getattr(ctx, nodeid, fh)?;
        Ok(self.attr(nodeid, self.settled(ctx, nodeid, attr), valid))
    }

    pub(super) fn access(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::AccessIn = args.take()?;
        self.fs.access(ctx, nodeid, asked.mask).and(Reply::DONE)
    }

    /// Removes the mark of a submount for a guest that did not enable FUSE_SUBMOUNTS.
    fn without_submounts(&self, attr: &mut Attr) {
        if !self.has(FsOptions::SUBMOUNTS) {
            attr.flags &= !fuse::ATTR_SUBMOUNT;
        }
    }

    pub(super) fn setattr(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::SetattrIn = args.take()?;
        let fh = (asked.valid & fuse::FATTR_FH != 0).then_some(asked.fh);
        let valid = SetattrValid::from_bits_truncate(asked.valid);
        if valid.contains(SetattrValid::UID) {
            valid_id(asked.uid)?;
        }
        if valid.contains(SetattrValid::GID) {
            valid_id(asked.gid)?;
        }
        let change = || self.fs.setattr(ctx, nodeid, asked, fh, valid);
        let Some(dax) = &self.dax else {
            return change().map(|(attr, valid)| self.attr(nodeid, attr, valid));
        };
        let ask = |known: &dyn Fn(u64) -> bool| self.identify(ctx, nodeid, known);
        let file = dax.find(match fh {
            Some(handle) => self.open_file(nodeid, handle),
            None => Subject { nodeid, file: Which::Ask(&ask) },
        })?;
        let done = dax.change_times(&file, valid.contains(SetattrValid::MTIME), || {
            if valid.contains(SetattrValid::SIZE) {
                dax.resize(&file, asked.size, change)
            } else {
                change()
            }
        });
        done.map(|(attr, valid)| self.attr(nodeid, attr, valid))
    }
}
