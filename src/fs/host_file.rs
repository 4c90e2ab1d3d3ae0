// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file of the host that a request is about: which it is, and how to get at it. The guest's
//! numbers do not say which: the file system gives one file a number for each mount that leads to it
//! (a bind mount in the share), and a new one after a FORGET. What counts is the inode
//! ([`FileId`]).

use std::cell::Cell;
use std::fs::File;
use std::io;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem, OpenOptions, ZeroCopyWriter};
use virtiofsd::oslib::ReadvFlags;

use crate::support::file_id::FileId;

use super::descriptors::Want;
use super::server::Server;

/// Finds out which file it is, if its inode number is one of those that the argument holds for.
/// None: it is none of them.
pub(crate) type Ask<'a> = dyn Fn(&dyn Fn(u64) -> bool) -> io::Result<Option<FileId>> + 'a;

/// A file as a request names it: the guest's number, and what else tells.
#[derive(Clone, Copy)]
pub(crate) struct Subject<'a> {
    pub(crate) nodeid: u64,
    pub(crate) file: Which<'a>,
}

/// How a file is known.
#[derive(Clone, Copy)]
pub(crate) enum Which<'a> {
    /// It is open; None: the handle is none of an open file, and whatever the request wants fails.
    Open(Option<FileId>),
    /// The file system must be asked.
    Ask(&'a Ask<'a>),
}

impl Subject<'_> {
    /// The file, if its inode number is `known`.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn find(&self, known: &dyn Fn(u64) -> bool) -> io::Result<Option<FileId>> {
        match self.file {
            Which::Open(file) => Ok(file),
            Which::Ask(ask) => ask(known),
        }
    }
}

/// Stands where a READ's buffers do, and does something with the file that the READ would read.
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

/// A file that was opened, and what was seen of it.
pub(crate) struct Opened<T> {
    pub(crate) handle: u64,
    pub(crate) options: OpenOptions,
    pub(crate) seen: T,
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    /// Does something with the file behind a handle: the file system shows it to whoever reads from
    /// it.
    ///
    /// # Errors
    /// EBADF where there is none, and those of `work`.
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

    /// Opens the file of an inode, lets `look` look at it, and closes it again if that fails. A
    /// lease of a host process is not waited for: see `ops::leases`.
    ///
    /// # Errors
    /// EAGAIN where a lease is in the way.
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

    /// The file of an inode, readable and writable: QEMU wants it so, also for a guest that only
    /// reads (Q7, Q8). The file system gives it to whoever reads from it.
    pub(crate) fn writable_file(&self, ctx: Context, nodeid: u64) -> io::Result<File> {
        let flags = libc::O_RDWR.cast_unsigned();
        let opened = self.open_now(ctx, nodeid, false, flags, File::try_clone)?;
        self.fs.release(ctx, nodeid, flags, opened.handle, false, false, None)?;
        Ok(opened.seen)
    }

    /// The file of an inode that the guest knows and need not have open: mostly one look at its
    /// number is enough, since it is not `known`.
    ///
    /// # Errors
    /// The file system's.
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
        let _leave = self.descriptors.ask(Want::Moment)?;
        // Two devices may have it: open it, but for nothing that could do anything to it.
        let flags = libc::O_PATH.cast_unsigned();
        let (handle, _) = self.fs.open(ctx, nodeid, false, flags)?;
        let handle = handle.ok_or(Errno::EBADF)?;
        let found = self.with_file(ctx, nodeid, handle, FileId::of);
        self.fs.release(ctx, nodeid, flags, handle, false, false, None)?;
        found.map(Some)
    }

    /// A file that is named by an open handle.
    pub(crate) fn open_file(&self, nodeid: u64, handle: u64) -> Subject<'static> {
        Subject { nodeid, file: Which::Open(self.opened.file(nodeid, handle)) }
    }
}
