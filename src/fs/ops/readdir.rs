// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! OPENDIR, READDIR, READDIRPLUS and RELEASEDIR. A look-up is counted only if the reply reports it.

use std::io;

use virtiofsd::filesystem::{Context, DirEntry, DirectoryIterator, FileSystem};
use virtiofsd::fuse::{self, Attr, Dirent, EntryOut};
use vm_memory_of_virtiofsd::ByteValued;

use crate::fs::descriptors::Want;
use crate::fs::lives::Life;
use crate::fs::message::{Args, MAX_DATA_BYTES, Reply, invalid};
use crate::fs::ops::open::open_out;
use crate::fs::server::Server;

/// Alignment of directory entries in a reply, in bytes: FUSE_DIRENT_ALIGN.
const ALIGN: usize = 8;

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn opendir(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::OpenIn = args.take()?;
        let opened = self.fs.opendir(ctx, nodeid, self.flags(asked.flags)?)?;
        self.unless_over(life, || {
            let handle = opened.0.unwrap_or_default();
            let _ = self.fs.releasedir(ctx, nodeid, asked.flags, handle);
        })?;
        Ok(open_out(opened))
    }

    pub(super) fn releasedir(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let asked: fuse::ReleaseIn = args.take()?;
        self.fs.releasedir(ctx, nodeid, asked.flags, asked.fh)?;
        self.opened.release(asked.fh); // RELEASEDIR of a file's handle releases that handle.
        Reply::DONE
    }

    /// Returns the entries of a directory from an offset on, up to `room` bytes.
    pub(super) fn readdir(
        &self,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
        room: usize,
        plus: bool,
    ) -> io::Result<Reply> {
        let asked: fuse::ReadIn = args.take()?;
        // The reply to READDIR may be shorter than requested.
        let size = asked.size.min(MAX_DATA_BYTES);
        if room < size as usize {
            return Err(invalid());
        }
        let mut entries = self.fs.readdir(ctx, nodeid, asked.fh, size, asked.offset)?;
        let mut packed = Vec::new();
        while let Some(entry) = entries.next() {
            if packed.len() + packed_bytes(&entry, plus) > size as usize {
                break;
            }
            if plus {
                match self.entry_plus(ctx, nodeid, &entry) {
                    Ok(found) => packed.extend_from_slice(found.as_slice()),
                    // The file was removed after the directory was read.
                    Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                    // The packed entries have been looked up, so the reply must report them.
                    Err(_) if !packed.is_empty() => break,
                    Err(e) => return Err(e),
                }
            }
            pack(&mut packed, &entry);
        }
        Ok(Reply::Bytes(packed))
    }

    /// The attributes of an entry. Only its name and inode number if no descriptor is left, or the
    /// guest knows the largest number of inodes: the guest needs the names to remove files.
    fn entry_plus(&self, ctx: Context, parent: u64, entry: &DirEntry<'_>) -> io::Result<EntryOut> {
        let permit = self.descriptors.ask(Want::Inode);
        if permit.is_err() || matches!(entry.name.to_bytes(), b"." | b"..") {
            return Ok(name_only(entry));
        }
        let found = self.fs.lookup(ctx, parent, entry.name)?;
        match self.count_lookup(ctx, found.inode, None) {
            Ok(()) => Ok(self.entry_out(ctx, found)),
            Err(_) => Ok(name_only(entry)),
        }
    }
}

/// An entry without a look-up: node id 0, which the guest does not forget.
fn name_only(entry: &DirEntry<'_>) -> EntryOut {
    let attr = Attr { ino: entry.ino, mode: entry.type_ << 12, ..Attr::default() };
    EntryOut { attr, ..EntryOut::default() }
}

fn packed_bytes(entry: &DirEntry<'_>, plus: bool) -> usize {
    let dirent = (size_of::<Dirent>() + entry.name.to_bytes().len()).next_multiple_of(ALIGN);
    dirent + if plus { size_of::<EntryOut>() } else { 0 }
}

fn pack(packed: &mut Vec<u8>, entry: &DirEntry<'_>) {
    let name = entry.name.to_bytes();
    let dirent = Dirent {
        ino: entry.ino,
        off: entry.offset,
        namelen: name.len() as u32,
        type_: entry.type_,
    };
    packed.extend_from_slice(dirent.as_slice());
    packed.extend_from_slice(name);
    packed.resize(packed.len().next_multiple_of(ALIGN), 0);
}
