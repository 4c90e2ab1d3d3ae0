// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The buffers of one READ or WRITE. Each is passed to readv or writev where it lies in guest
//! memory, without a copy.
//!
//! A buffer may lie in the window of this device (`in_window`). The request is then copied through
//! a page-aligned buffer of the daemon, which also meets the alignment rules of O_DIRECT.
//!
//! A buffer may lie in the window of another device. Only system calls access such bytes: they
//! return EFAULT for a page that is not mapped.

#![allow(unsafe_code)] // readv and writev take raw pointers.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{self, ReadvFlags, WritevFlags};
use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::dax::engine::Engine;
use crate::device::chain::Segment;
use crate::persist::Direct;
use crate::support::units::PAGE_BYTES;
use crate::window::FileOffset;
use crate::window::locate::WindowLocation;

use super::in_window::FilePiece;
use super::message::MAX_DATA_BYTES;
use super::serve::Blocking;

/// Largest number of iovecs in one system call: IOV_MAX of Linux.
const MAX_IOVECS: usize = 1024;

/// Largest number of bytes in one copy for a buffer in the window: the most that one request moves.
const BOUNCE_BYTES: usize = MAX_DATA_BYTES as usize;

/// Alignment of address, offset and length, in bytes, that satisfies O_DIRECT on each file system.
const ALIGN: usize = PAGE_BYTES as usize;

#[derive(Clone)]
enum Piece {
    Memory { at: GuestAddress, bytes: usize },
    File(FilePiece),
}

impl Piece {
    fn bytes(&self) -> usize {
        match self {
            Self::Memory { bytes, .. } => *bytes,
            Self::File(piece) => piece.bytes,
        }
    }

    fn skip(&mut self, n: usize) {
        match self {
            Self::Memory { at, bytes } => {
                at.0 += n as u64;
                *bytes -= n;
            }
            Self::File(piece) => piece.skip(n),
        }
    }

    /// Number of bytes up to the first one at which a load by the guest would fault.
    fn readable_bytes(&self) -> io::Result<usize> {
        match self {
            Self::Memory { bytes, .. } => Ok(*bytes),
            Self::File(piece) => piece.readable_bytes(),
        }
    }
}

/// The buffers of one request in one direction, without the bytes that were moved already.
pub(crate) struct Buffers(VecDeque<Piece>);

impl Buffers {
    /// Locates `segments`, without their first `skip` bytes. For segments in the window this takes
    /// the window's checkout, so the caller must not have pinned the request.
    ///
    /// # Errors
    /// EFAULT for a part of the window where no range is granted.
    pub(crate) fn find(
        segments: &[Segment],
        skip: usize,
        window: Option<(WindowLocation, &Engine)>,
    ) -> io::Result<Self> {
        let mut pieces = VecDeque::with_capacity(segments.len());
        for segment in segments {
            let in_window = window.map(|window| FilePiece::all_of(*segment, window)).transpose()?;
            match in_window.flatten() {
                Some(shown) => pieces.extend(shown.into_iter().map(Piece::File)),
                None => pieces
                    .push_back(Piece::Memory { at: segment.at, bytes: segment.bytes as usize }),
            }
        }
        let mut buffers = Self(pieces);
        buffers.consume(skip);
        Ok(buffers)
    }

    /// Number of bytes left.
    pub(crate) fn bytes(&self) -> usize {
        self.0.iter().map(Piece::bytes).sum()
    }

    fn consume(&mut self, mut n: usize) {
        while let Some(piece) = self.0.front_mut() {
            if piece.bytes() > n {
                piece.skip(n);
                return;
            }
            n -= piece.bytes();
            self.0.pop_front();
        }
    }

    /// The slices of guest memory up to the first piece in the window: at most `most` bytes.
    fn memory<'m>(
        &self,
        mem: &'m GuestMemoryMmap,
        most: usize,
    ) -> io::Result<Vec<VolatileSlice<'m>>> {
        let mut slices = Vec::new();
        let mut left = most;
        for piece in &self.0 {
            let Piece::Memory { at, bytes } = piece else { break };
            for slice in GuestMemoryBackend::get_slices(mem, *at, (*bytes).min(left)) {
                slices.push(slice.map_err(|_| Errno::EFAULT)?);
            }
            left -= (*bytes).min(left);
            if left == 0 || slices.len() >= MAX_IOVECS {
                break;
            }
        }
        slices.truncate(MAX_IOVECS);
        Ok(slices)
    }

    /// Passes the front of the buffers to `call` as iovecs: at most `most` bytes, up to the first
    /// piece in the window. `call` makes one system call with them and no other access: the guest
    /// may change these bytes at any time, so only the kernel may read or write them.
    fn with_iovecs(
        &self,
        mem: &GuestMemoryMmap,
        most: usize,
        call: impl FnOnce(&[libc::iovec]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let slices = self.memory(mem, most)?;
        // The guards keep the memory mapped until the call returns.
        let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
        let iovec = |guard: &PtrGuardMut| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        };
        let iovecs: Vec<_> = guards.iter().map(iovec).collect();
        call(&iovecs)
    }

    /// Whether a piece lies in the window.
    fn in_window(&self) -> bool {
        self.0.iter().any(|piece| matches!(piece, Piece::File(_)))
    }

    /// Number of the first `most` bytes that a load by the guest could read: up to the last page of
    /// a file that the window shows.
    ///
    /// # Errors
    /// EFAULT if that is 0.
    fn reach(&self, most: usize) -> io::Result<usize> {
        let mut reach = 0;
        for piece in &self.0 {
            let readable = piece.readable_bytes()?;
            reach += readable;
            if readable < piece.bytes() || reach >= most {
                break;
            }
        }
        match reach.min(most).min(BOUNCE_BYTES) {
            0 => Err(Errno::EFAULT.into()),
            reach => Ok(reach),
        }
    }

    /// Copies the first bytes of the buffers to `to`.
    fn gather(&self, ram: &GuestMemoryMmap, mut to: &mut [u8]) -> io::Result<()> {
        for piece in &self.0 {
            let (now, later) = to.split_at_mut(piece.bytes().min(to.len()));
            match piece {
                Piece::Memory { at, .. } => {
                    ram.read_slice(now, *at).map_err(|_| Errno::EFAULT)?;
                }
                Piece::File(piece) => piece.load(now)?,
            }
            to = later;
        }
        Ok(())
    }

    /// Copies `from` to the first bytes of the buffers.
    fn scatter(&self, ram: &GuestMemoryMmap, mut from: &[u8]) -> io::Result<()> {
        for piece in &self.0 {
            let (now, later) = from.split_at(piece.bytes().min(from.len()));
            match piece {
                Piece::Memory { at, .. } => {
                    ram.write_slice(now, *at).map_err(|_| Errno::EFAULT)?;
                }
                Piece::File(piece) => piece.store(now)?,
            }
            from = later;
        }
        Ok(())
    }
}

/// A page-aligned buffer of the daemon.
struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    fn new(bytes: usize) -> Self {
        let bytes = vec![0; bytes + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        Self { bytes, start }
    }

    /// Its first `bytes` bytes.
    fn first(&mut self, bytes: usize) -> &mut [u8] {
        self.bytes.get_mut(self.start..self.start + bytes).unwrap_or_default()
    }
}

fn iovec(bytes: &mut [u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

/// An offset for preadv2(2) and pwritev2(2), which read -1 as "at the file's own position".
fn file_offset(off: u64, done: usize) -> io::Result<i64> {
    let off = off.checked_add(done as u64).and_then(|off| i64::try_from(off).ok());
    off.ok_or_else(|| Errno::EINVAL.into())
}

/// Calls `step` with the number of bytes left and their offset in the file, until no byte is left
/// or a step moves none. Returns the number of bytes moved; an error only if no step before it
/// moved any.
fn step_by_step(
    count: usize,
    off: u64,
    mut step: impl FnMut(usize, i64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut done = 0;
    while done < count {
        match step(count - done, file_offset(off, done)?) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if done == 0 => return Err(e),
            Err(_) => break,
        }
    }
    Ok(done)
}

/// The buffers that a READ fills.
pub(crate) struct GuestWriter<'m> {
    /// All of guest memory, other devices' windows included: for system calls only.
    pub(crate) mem: &'m GuestMemoryMmap,
    /// Guest RAM, which the daemon may load from and store to.
    pub(crate) ram: &'m GuestMemoryMmap,
    pub(crate) buffers: Buffers,
    pub(crate) blocking: Blocking,
    /// Set if the READ would have to wait for a disk and `blocking` forbids that.
    pub(crate) would_wait: &'m Cell<bool>,
}

impl GuestWriter<'_> {
    /// One step of a READ: fills the front of the buffers from `file` at `off`.
    fn step(
        &mut self,
        file: &File,
        count: usize,
        off: i64,
        flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        let done = if self.buffers.in_window() {
            self.through_bounce(file, count, off, flags)?
        } else {
            self.buffers.with_iovecs(self.mem, count, |iovecs| {
                // SAFETY: the iovecs are slices of guest memory, which with_iovecs() keeps.
                self.read(flags, |flags| unsafe {
                    oslib::readv_at(file.as_fd(), iovecs, off, flags)
                })
            })?
        };
        self.buffers.consume(done);
        Ok(done)
    }

    fn through_bounce(
        &self,
        file: &File,
        count: usize,
        off: i64,
        flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        let reach = self.buffers.reach(count)?;
        // The read ends at a page's end, as O_DIRECT needs it. The bytes behind `reach` are
        // dropped.
        let whole = reach.next_multiple_of(ALIGN);
        let mut bounce = Bounce::new(whole);
        let iovecs = [iovec(bounce.first(whole))];
        // SAFETY: this thread owns `bounce`, which outlives the call and is not accessed during it.
        let read = self
            .read(flags, |flags| unsafe { oslib::readv_at(file.as_fd(), &iovecs, off, flags) })?;
        let read = read.min(reach);
        self.buffers.scatter(self.ram, bounce.first(read))?;
        Ok(read)
    }

    fn read(
        &self,
        flags: Option<ReadvFlags>,
        read: impl Fn(Option<ReadvFlags>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match self.blocking {
            Blocking::Allowed | Blocking::Lease => read(flags),
            Blocking::IfUnknown => self.read_now(flags, read),
        }
    }

    /// Reads only bytes that are cached. Reads without that limit if the file system has no
    /// RWF_NOWAIT.
    fn read_now(
        &self,
        flags: Option<ReadvFlags>,
        read: impl Fn(Option<ReadvFlags>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match read(Some(flags.unwrap_or(ReadvFlags::empty()) | ReadvFlags::RWF_NOWAIT)) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return read(flags);
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            other => return other,
        }
        self.would_wait.set(true);
        Err(Errno::EAGAIN.into())
    }
}

impl ZeroCopyWriter for GuestWriter<'_> {
    fn read_from_file_at(
        &mut self,
        f: &File,
        count: usize,
        off: u64,
        flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        let count = count.min(self.buffers.bytes());
        step_by_step(count, off, |left, off| self.step(f, left, off, flags))
    }
}

/// The buffers that a WRITE takes its bytes from.
pub(crate) struct GuestReader<'m> {
    /// All of guest memory, other devices' windows included: for system calls only.
    pub(crate) mem: &'m GuestMemoryMmap,
    /// Guest RAM, which the daemon may load from and store to.
    pub(crate) ram: &'m GuestMemoryMmap,
    pub(crate) buffers: Buffers,
    /// The file's memory, if the bytes are stored there past the processor's cache (behaviour 13).
    pub(crate) past_cache: Option<&'m Direct>,
}

impl GuestReader<'_> {
    fn step(
        &mut self,
        file: &File,
        count: usize,
        off: i64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let done = if self.buffers.in_window() {
            let reach = self.buffers.reach(count)?;
            let mut bounce = Bounce::new(reach);
            self.buffers.gather(self.ram, bounce.first(reach))?;
            let iovecs = [iovec(bounce.first(reach))];
            // SAFETY: this thread owns `bounce`, which outlives the call.
            unsafe { oslib::writev_at(file.as_fd(), &iovecs, off, flags)? }
        } else {
            if let Some(direct) = self.past_cache
                && let Ok(slices) = self.buffers.memory(self.ram, count)
            {
                return self.store(direct, &slices, file, off);
            }
            self.buffers.with_iovecs(self.mem, count, |iovecs| {
                // SAFETY: as in GuestWriter::step(); the kernel only reads from the slices.
                unsafe { oslib::writev_at(file.as_fd(), iovecs, off, flags) }
            })?
        };
        self.buffers.consume(done);
        Ok(done)
    }

    /// Stores the front of the buffers to the file's memory, past the processor's cache. Sets the
    /// file's mtime and ctime, as a write would.
    fn store(
        &mut self,
        direct: &Direct,
        slices: &[VolatileSlice<'_>],
        file: &File,
        off: i64,
    ) -> io::Result<usize> {
        let mut done = 0;
        for slice in slices {
            direct.store_from(FileOffset(off.cast_unsigned()) + done as u64, slice)?;
            done += slice.len();
        }
        futimens(file, &TimeSpec::UTIME_OMIT, &TimeSpec::UTIME_NOW)?;
        self.buffers.consume(done);
        Ok(done)
    }
}

impl ZeroCopyReader for GuestReader<'_> {
    fn write_to_file_at(
        &mut self,
        f: &File,
        count: usize,
        off: u64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let count = count.min(self.buffers.bytes());
        step_by_step(count, off, |left, off| self.step(f, left, off, flags))
    }
}
