// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! SETUPMAPPING and REMOVEMAPPING (virtio 1.4 section 5.11.6.4): what the window shows of a file.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse;

use crate::fs::dax::MAX_REMOVALS;
use crate::fs::lives::Life;
use crate::fs::message::{Args, Reply, invalid};
use crate::fs::server::Server;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(crate) fn setup_mapping(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let dax = self.dax.as_deref().filter(|dax| dax.is_there()).ok_or(Errno::ENOSYS)?;
        let asked: fuse::SetupmappingIn = args.take()?;
        // `fh` is always -1: the inode is what counts.
        let is_current = || self.lives.is_mounted(life);
        dax.setup(nodeid, &asked, is_current, || self.file_of(ctx, nodeid)).and(Reply::DONE)
    }

    /// The file of an inode, readable and writable: QEMU wants it so, also for a guest that only
    /// reads (Q7, Q8). The file system gives it to whoever reads from it.
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
