// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! FALLOCATE, COPY_FILE_RANGE and LSEEK: operations on ranges of a file that copy no byte to or
//! from guest memory.

use std::io;

use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse;

use crate::fs::message::{Args, Reply};
use crate::fs::ops::{open_flag, written};
use crate::fs::server::Server;
use crate::window::{FileOffset, FileRange};

/// Largest number of bytes that one COPY_FILE_RANGE copies. A guest that wants more repeats the
/// request, and other requests are served in between.
const MAX_COPY_BYTES: u64 = 16 << 20;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn fallocate(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::FallocateIn = args.take()?;
        let (from, bytes, mode) = (asked.offset, asked.length, asked.mode);
        let change = || self.fs.fallocate(ctx, nodeid, asked.fh, mode, from, bytes);
        let Some(dax) = &self.dax else { return change().and(Reply::DONE) };
        let has = |flag| open_flag(mode, flag);
        let file = dax.find(self.open_file(nodeid, asked.fh))?;
        let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // The engine punches holes without the guest's handle, so the handle is checked here. All
        // other cases are checked by the file system.
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

    pub(super) fn copy_file_range(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
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

    pub(super) fn lseek(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::LseekIn = args.take()?;
        let offset = self.fs.lseek(ctx, nodeid, asked.fh, asked.offset, asked.whence)?;
        Ok(Reply::object(fuse::LseekOut { offset }))
    }
}
