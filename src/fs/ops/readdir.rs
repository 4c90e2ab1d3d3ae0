// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! READDIR and READDIRPLUS: packs entries into what room there is, and counts no look-up that the
//! guest does not hear of.

use std::io;

use virtiofsd::filesystem::{Context, DirEntry, DirectoryIterator, FileSystem};
use virtiofsd::fuse::{Attr, Dirent, EntryOut, ReadIn};
use vm_memory_of_virtiofsd::ByteValued;

use crate::fs::descriptors::Want;
use crate::fs::message::{MAX_DATA_BYTES, invalid};
use crate::fs::server::Server;

/// FUSE_DIRENT_ALIGN.
const ALIGN: usize = 8;

/// The entries of a directory from `asked.offset` on, as many as fit.
pub(crate) fn read<F>(
    server: &Server<F>,
    ctx: Context,
    nodeid: u64,
    asked: &ReadIn,
    room: usize,
    plus: bool,
) -> io::Result<Vec<u8>>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    // READDIR may bring less than was asked for.
    let size = asked.size.min(MAX_DATA_BYTES);
    if room < size as usize {
        return Err(invalid());
    }
    let mut entries = server.fs.readdir(ctx, nodeid, asked.fh, size, asked.offset)?;
    let mut packed = Vec::new();
    while let Some(entry) = entries.next() {
        if packed.len() + packed_bytes(&entry, plus) > size as usize {
            break;
        }
        if plus {
            match look_up(server, ctx, nodeid, &entry) {
                Ok(found) => packed.extend_from_slice(found.as_slice()),
                // It went away since the directory was read.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                // What is packed has been looked up, and the guest must hear of it.
                Err(_) if !packed.is_empty() => break,
                Err(e) => return Err(e),
            }
        }
        pack(&mut packed, &entry);
    }
    Ok(packed)
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

fn look_up<F>(
    server: &Server<F>,
    ctx: Context,
    parent: u64,
    entry: &DirEntry<'_>,
) -> io::Result<EntryOut>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    // Where no descriptor is left the name is all there is: else nothing could be removed.
    let leave = server.descriptors.ask(Want::Inode);
    if leave.is_err() || matches!(entry.name.to_bytes(), b"." | b"..") {
        // Number 0: not looked up, and not to be forgotten.
        let attr = Attr { ino: entry.ino, mode: entry.type_ << 12, ..Attr::default() };
        return Ok(EntryOut { attr, ..EntryOut::default() });
    }
    server.fs.lookup(ctx, parent, entry.name).map(|found| server.entry_out(ctx, found))
}
