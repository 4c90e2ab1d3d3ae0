// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Identifies the host file that a request is about. The guest's node id does not: virtiofsd's file
//! system gives a file one node id for each mount that leads to it (a bind mount in the share), and
//! a new one after a FORGET. The inode on the host does ([`FileId`]).

use std::cell::Cell;
use std::fs::File;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem, OpenOptions, ZeroCopyWriter};
use virtiofsd::oslib::ReadvFlags;

use crate::support::file_id::FileId;

use super::descriptors::Want;
use super::server::Server;

/// Returns the id of the file, if its inode number satisfies the argument; else None. May open the
/// file.
pub(crate) type Ask<'a> = dyn Fn(&dyn Fn(u64) -> bool) -> io::Result<Option<FileId>> + 'a;

/// The file of a request: the guest's node id, and how to find out the file's id.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) nodeid: u64,
    pub(crate) file: Which<'a>,
}

/// How the id of a file is found.
#[derive(Clone, Copy)]
pub(crate) enum Which<'a> {
    /// The file is open. None for a handle of no open file: the request will fail.
    Open(Option<FileId>),
    /// By system calls of the given function.
    Ask(&'a Ask<'a>),
}

impl Subject<'_> {
    /// The id of the file. None for a file that is not open and whose inode number is not `known`.
    ///
    /// # Errors
    /// Errors of `Which::Ask`: of statx(2) and open(2).
    pub(crate) fn find(&self, known: &dyn Fn(u64) -> bool) -> io::Result<Option<FileId>> {
        match self.file {
            Which::Open(file) => Ok(file),
            Which::Ask(ask) => ask(known),
        }
    }
}

/// Takes the place of a READ's buffers. virtiofsd's file system passes it the file that the READ
/// would read, and it passes the file on to a closure.
struct InPlaceOfARead<'a, W>(&'a Cell<Option<W>>);

impl<W: FnOnce(&File)> ZeroCopyWriter for InPlaceOfARead<'_, W> {
    fn read_from_file_at(
        &mut self,
        f: &File,
        _count: usize,
        _off: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        if let Some(work) = self.0.take() {
            work(f);
        }
        Ok(0)
    }
}

/// A file that was opened, and the result of `look` in [`Server::open_now`].
pub(crate) struct Opened<T> {
    pub(crate) handle: u64,
    pub(crate) options: OpenOptions,
    pub(crate) seen: T,
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Calls `work` with the file of a handle. virtiofsd's file system gives access to the file
    /// only by a READ, so this makes a READ without data ([`InPlaceOfARead`]).
    ///
    /// # Errors
    /// EBADF for a handle of no open file, and those of `work`.
    pub(crate) fn with_file<T>(
        &self,
        ctx: Context,
        nodeid: u64,
        handle: u64,
        work: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut done = Err(Errno::EBADF.into());
        let work = Cell::new(Some(|file: &File| done = work(file)));
        self.fs.read(ctx, nodeid, handle, InPlaceOfARead(&work), 1, 0, None, 0)?;
        drop(work);
        done
    }

    /// Opens the file of an inode and calls `look` with it. Closes the file again if `look` fails.
    /// Does not wait for a lease of a host process: see `ops::leases`.
    ///
    /// # Errors
    /// EAGAIN if a lease is in the way; those of the open and of `look`.
    pub(crate) fn open_now<T>(
        &self,
        ctx: Context,
        nodeid: u64,
        kill_priv: bool,
        flags: u32,
        look: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<Opened<T>> {
        let at_once = libc::O_NONBLOCK.cast_unsigned();
        let (handle, options) = self.fs.open(ctx, nodeid, kill_priv, flags | at_once)?;
        let handle = handle.ok_or(Errno::EBADF)?;
        let seen = self.with_file(ctx, nodeid, handle, |file| {
            if flags & at_once == 0 {
                rustix::io::ioctl_fionbio(file, false)?;
            }
            look(file)
        });
        match seen {
            Ok(seen) => Ok(Opened { handle, options, seen }),
            Err(e) => {
                self.fs.release(ctx, nodeid, flags, handle, false, false, None)?;
                Err(e)
            }
        }
    }

    /// Opens the file of an inode for reading and writing: QEMU needs such a descriptor for each
    /// map, also if the guest only reads (Q7, Q8).
    pub(crate) fn writable_file(&self, ctx: Context, nodeid: u64) -> io::Result<File> {
        let flags = libc::O_RDWR.cast_unsigned();
        let opened = self.open_now(ctx, nodeid, false, flags, File::try_clone)?;
        self.fs.release(ctx, nodeid, flags, opened.handle, false, false, None)?;
        Ok(opened.seen)
    }

    /// The id of the file of an inode, which need not be open. None for a file whose inode number
    /// is not `known`: then its attributes are enough, as in most cases.
    ///
    /// # Errors
    /// ENFILE, and those of statx(2) and open(2).
    pub(crate) fn identify(
        &self,
        ctx: Context,
        nodeid: u64,
        known: &dyn Fn(u64) -> bool,
    ) -> io::Result<Option<FileId>> {
        let (attr, _) = self.fs.getattr(ctx, nodeid, None)?;
        if attr.mode & libc::S_IFMT != libc::S_IFREG || !known(attr.ino) {
            return Ok(None);
        }
        let _permit = self.descriptors.ask(Want::Moment)?;
        // Files of two devices may have this inode number. O_PATH: such a descriptor can't read,
        // write or block.
        let flags = libc::O_PATH.cast_unsigned();
        let (handle, _) = self.fs.open(ctx, nodeid, false, flags)?;
        let handle = handle.ok_or(Errno::EBADF)?;
        let found = self.with_file(ctx, nodeid, handle, FileId::of);
        self.fs.release(ctx, nodeid, flags, handle, false, false, None)?;
        found.map(Some)
    }

    /// The subject of a request with an open handle.
    pub(crate) fn open_file(&self, nodeid: u64, handle: u64) -> Subject<'static> {
        Subject { nodeid, file: Which::Open(self.opened.file(nodeid, handle)) }
    }
}
