// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Extended attributes.

use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem, GetxattrReply, ListxattrReply, SetxattrFlags};
use virtiofsd::fuse::{self, FsOptions, Opcode};

use crate::fs::message::{Args, MAX_DATA_BYTES, Reply, invalid};
use crate::fs::server::Server;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn xattr(
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
