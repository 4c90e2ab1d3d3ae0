// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attributes as the guest is told of them, and as it sets them: right, though it may store to a
//! file without a request, and believed no longer than they are right. Whoever opens a file to
//! write is counted for that.

use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry, FileSystem, SetattrValid};
use virtiofsd::fuse::{self, Attr, AttrOut, EntryOut};

use crate::fs::dax::times::Occasion;
use crate::fs::identity::{FileId, Subject, Which};
use crate::fs::message::{Args, Reply, valid_id};
use crate::fs::server::Server;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Settles the times of the file of a handle: see `times`.
    ///
    /// # Errors
    /// Those of asking which file it is.
    pub(crate) fn settle(&self, nodeid: u64, handle: u64, occasion: Occasion) -> io::Result<()> {
        let Some(dax) = &self.dax else { return Ok(()) };
        dax.settle(&dax.find(self.open_file(nodeid, handle))?, occasion);
        Ok(())
    }

    /// The attributes of an inode, whose times tell of what was stored to it: `attr`, or newer
    /// ones.
    pub(crate) fn settled(&self, ctx: Context, nodeid: u64, attr: Attr) -> Attr {
        let regular = attr.mode & libc::S_IFMT == libc::S_IFREG;
        match &self.dax {
            Some(dax) if regular && dax.settle_inode(nodeid, attr.ino) => {
                self.fs.getattr(ctx, nodeid, None).map_or(attr, |(attr, _)| attr)
            }
            _ => attr,
        }
    }

    pub(crate) fn attr(&self, nodeid: u64, mut attr: Attr, mut valid: Duration) -> Reply {
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

    pub(crate) fn entry_out(&self, ctx: Context, mut entry: Entry) -> EntryOut {
        self.without_submounts(&mut entry.attr);
        entry.attr = self.settled(ctx, entry.inode, entry.attr);
        if self.dax.as_ref().is_some_and(|dax| dax.flag(entry.inode, &mut entry.attr)) {
            entry.attr_timeout = Duration::ZERO;
        }
        EntryOut::from(entry)
    }

    pub(crate) fn setattr(
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

    /// Counts a handle, which was opened with `flags`.
    ///
    /// # Errors
    /// Those of asking which file it is.
    pub(crate) fn count_open(
        &self,
        nodeid: u64,
        flags: u32,
        handle: u64,
        file: FileId,
    ) -> io::Result<()> {
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

    pub(crate) fn release(
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
