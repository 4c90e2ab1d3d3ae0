// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! FLUSH, FSYNC, FSYNCDIR and SYNCFS: make the guest's stores durable, and settle times.

use std::io;

use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse;

use crate::fs::dax::times::Occasion;
use crate::fs::message::{Args, Reply};
use crate::fs::server::Server;

/// Flag of fsync_flags: FUSE_FSYNC_FDATASYNC.
const FSYNC_FDATASYNC: u32 = 1 << 0;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn flush(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::FlushIn = args.take()?;
        self.fs.flush(ctx, nodeid, asked.fh, asked.lock_owner)?;
        if let Some(dax) = self.dax.as_ref().filter(|_| self.opened.is_writer(asked.fh)) {
            dax.settle(&dax.find(self.open_file(nodeid, asked.fh))?, Occasion::Close);
        }
        self.opened.check(asked.fh).and(Reply::DONE)
    }

    pub(super) fn fsync(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::FsyncIn = args.take()?;
        let datasync = asked.fsync_flags & FSYNC_FDATASYNC != 0;
        let sync = || self.fs.fsync(ctx, nodeid, datasync, asked.fh);
        let through = || {
            let Some(dax) = &self.dax else { return sync() };
            let file = dax.find(self.open_file(nodeid, asked.fh))?;
            // Before the sync, which makes the new times durable, too.
            dax.settle(&file, Occasion::Close);
            dax.sync(&file, sync)
        };
        self.opened.sync(asked.fh, through).and(Reply::DONE)
    }

    pub(super) fn fsyncdir(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::FsyncIn = args.take()?;
        let datasync = asked.fsync_flags & FSYNC_FDATASYNC != 0;
        self.fs.fsyncdir(ctx, nodeid, datasync, asked.fh).and(Reply::DONE)
    }

    pub(super) fn syncfs(&self, ctx: Context, nodeid: u64) -> io::Result<()> {
        if let Some(dax) = &self.dax {
            dax.settle_all(Occasion::Look);
            dax.sync_all()?;
        }
        self.fs.syncfs(ctx, nodeid)
    }
}
