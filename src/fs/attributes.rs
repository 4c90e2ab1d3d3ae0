// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attributes as the guest is told of them, and as it sets them: right, though it may store to a file without
//! a request, and believed no longer than they are right. Whoever opens a file to write is counted for that.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry, FileSystem, SetattrValid};
use virtiofsd::fuse::{self, Attr, AttrOut, EntryOut};

use super::message::{Args, Reply};
use super::server::Server;
use super::times::Occasion;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Sees to it that the times of the inode tell of what was stored to it.
    pub(super) fn settle(&self, nodeid: u64, occasion: Occasion) {
        if let Some(dax) = &self.dax {
            dax.settle(nodeid, occasion);
        }
    }

    pub(super) fn forgotten(&self, nodeid: u64) {
        if let Some(dax) = &self.dax {
            dax.forgotten(nodeid);
        }
    }

    pub(super) fn attr(&self, nodeid: u64, mut attr: Attr, mut valid: Duration) -> Reply {
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

    pub(super) fn entry_out(&self, mut entry: Entry) -> EntryOut {
        if let Some(dax) = &self.dax {
            if let Some(found) = dax.settle(entry.inode, Occasion::Look) {
                let attr = &mut entry.attr;
                attr.blocks = found.blocks();
                attr.mtime = found.mtime().cast_unsigned();
                attr.mtimensec = found.mtime_nsec() as u32;
                attr.ctime = found.ctime().cast_unsigned();
                attr.ctimensec = found.ctime_nsec() as u32;
            }
            if dax.flag(entry.inode, &mut entry.attr) {
                entry.attr_timeout = Duration::ZERO;
            }
        }
        EntryOut::from(entry)
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
        let change = || self.fs.setattr(ctx, nodeid, asked, fh, valid);
        let done = match &self.dax {
            Some(dax) => dax.change_times(nodeid, valid.contains(SetattrValid::MTIME), || {
                if valid.contains(SetattrValid::SIZE) {
                    dax.resize(nodeid, asked.size, change)
                } else {
                    change()
                }
            }),
            None => change(),
        };
        done.map(|(attr, valid)| self.attr(nodeid, attr, valid))
    }

    pub(super) fn count_open(&self, nodeid: u64, flags: u32, handle: Option<u64>) {
        let Some(fh) = handle.filter(|_| flags.cast_signed() & libc::O_ACCMODE != libc::O_RDONLY)
        else {
            return self.opened.open(nodeid);
        };
        let count = || self.opened.open_to_write(nodeid, fh);
        match &self.dax {
            Some(dax) => dax.opened(nodeid, count),
            None => drop(count()),
        }
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
        let count = || self.opened.release(nodeid, asked.fh);
        match &self.dax {
            Some(dax) if self.opened.is_writer(nodeid, asked.fh) => dax.closed(nodeid, count),
            _ => drop(count()),
        }
        Reply::DONE
    }
}
