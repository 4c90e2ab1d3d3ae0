// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The buffers of one request as ends of file I/O: between guest memory and a file nothing is copied.
//!
//! A buffer may lie in our own window (O_DIRECT into or from a DAX mapping). Then its bytes are a
//! file's, and are reached through that file: the memory table need not list the range, and a page
//! behind the end of the file can't hurt this process.

#![allow(unsafe_code)] // readv and writev take raw pointers; see the two places below.

use std::cell::Cell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;
use virtiofsd::filesystem::{ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::{self, ReadvFlags, WritevFlags};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use crate::dax::engine::{Engine, Space};
use crate::persist::Direct;
use crate::request::Segment;
use crate::window::{FileOffset, WindowBytes, WindowOffset};

use super::server::Patience;

/// IOV_MAX.
const MAX_IOVECS: usize = 1024;

/// The most that is copied at once where a buffer lies in the window.
const BOUNCE_BYTES: usize = 1 << 20;

/// Where the window is in the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WindowPlace {
    /// Its first byte's guest physical address.
    pub(super) base: u64,
    /// Its length.
    pub(super) bytes: WindowBytes,
}

impl WindowPlace {
    /// Where in the window `segment` begins. None if it is not in it; an error if it is in part.
    fn of(self, segment: Segment) -> io::Result<Option<WindowOffset>> {
        let (start, bytes) = (segment.at.0, u64::from(segment.bytes));
        let end = start.checked_add(bytes).ok_or(Errno::EFAULT)?;
        let window_end = self.base.saturating_add(self.bytes.0);
        if bytes == 0 || end <= self.base || start >= window_end {
            return Ok(None);
        }
        if start < self.base || end > window_end {
            return Err(Errno::EFAULT.into());
        }
        Ok(Some(WindowOffset(start - self.base)))
    }

    /// Whether any byte of `segment` is in it.
    pub(super) fn touches(self, segment: Segment) -> bool {
        !matches!(self.of(segment), Ok(None))
    }
}

#[derive(Clone)]
enum Piece {
    Memory { at: GuestAddress, bytes: usize },
    File { space: Arc<Space>, from: FileOffset, bytes: usize },
}

impl Piece {
    fn bytes(&self) -> usize {
        match self {
            Self::Memory { bytes, .. } | Self::File { bytes, .. } => *bytes,
        }
    }

    fn skip(&mut self, n: usize) {
        match self {
            Self::Memory { at, bytes } => {
                at.0 += n as u64;
                *bytes -= n;
            }
            Self::File { from, bytes, .. } => {
                from.0 += n as u64;
                *bytes -= n;
            }
        }
    }
}

/// The buffers of one direction of a request.
pub(super) struct Buffers(VecDeque<Piece>);

impl Buffers {
    /// Finds out what `segments` are, but for their first `skip` bytes. Where they lie in the window this
    /// waits for the window's turn: never call it with a hand in guest memory.
    ///
    /// # Errors
    /// EFAULT for a part of the window where nothing is granted.
    pub(super) fn find(
        segments: &[Segment],
        skip: usize,
        window: Option<(WindowPlace, &Engine)>,
    ) -> io::Result<Self> {
        let mut pieces = VecDeque::with_capacity(segments.len());
        for segment in segments {
            let place =
                window.map(|(place, engine)| Ok::<_, io::Error>((place.of(*segment)?, engine)));
            match place.transpose()? {
                Some((Some(at), engine)) => {
                    granted_pieces(engine, at, segment.bytes as usize, &mut pieces)?;
                }
                _ => pieces
                    .push_back(Piece::Memory { at: segment.at, bytes: segment.bytes as usize }),
            }
        }
        let mut buffers = Self(pieces);
        buffers.consume(skip);
        Ok(buffers)
    }

    /// How many bytes there are.
    pub(super) fn bytes(&self) -> usize {
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

    /// The memory pieces from the front on, at most `most` bytes of them, up to the first piece of a file.
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

    fn front_file(&self) -> Option<(Arc<Space>, FileOffset, usize)> {
        match self.0.front()? {
            Piece::File { space, from, bytes } => Some((space.clone(), *from, *bytes)),
            Piece::Memory { .. } => None,
        }
    }
}

fn granted_pieces(
    engine: &Engine,
    at: WindowOffset,
    bytes: usize,
    pieces: &mut VecDeque<Piece>,
) -> io::Result<()> {
    let mut done = 0;
    while done < bytes {
        let at = WindowOffset(at.0 + done as u64);
        let (space, from, left) = engine.granted_at(at).ok_or(Errno::EFAULT)?;
        let now = (bytes - done).min(usize::try_from(left).unwrap_or(usize::MAX));
        pieces.push_back(Piece::File { space, from, bytes: now });
        done += now;
    }
    Ok(())
}

/// No further than the file goes: behind that a load or store through the window would be SIGBUS.
fn within_file(space: &Space, from: FileOffset, bytes: usize) -> io::Result<usize> {
    let left = space.source().file_bytes()?.saturating_sub(from.0);
    match bytes.min(usize::try_from(left).unwrap_or(usize::MAX)) {
        0 => Err(Errno::EFAULT.into()),
        within => Ok(within.min(BOUNCE_BYTES)),
    }
}

/// An offset that the kernel takes for one (-1 would mean "where the file's own position is").
fn file_offset(off: u64, done: usize) -> io::Result<i64> {
    let off = off.checked_add(done as u64).and_then(|off| i64::try_from(off).ok());
    off.ok_or_else(|| Errno::EINVAL.into())
}

/// Takes steps, each told how many bytes are left and where in the file they belong, until all is done or
/// one does nothing. An error counts only where nothing was done before it.
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

/// Buffers that a READ fills.
pub(super) struct GuestWriter<'m> {
    pub(super) mem: &'m GuestMemoryMmap,
    pub(super) buffers: Buffers,
    pub(super) patience: Patience,
    /// Set where it would have to wait for a disk, and has not the patience.
    pub(super) would_wait: &'m Cell<bool>,
}

impl GuestWriter<'_> {
    /// One step: some bytes of `file` from `off` on into the front of the buffers.
    fn step(
        &mut self,
        file: &File,
        count: usize,
        off: i64,
        flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        let done = match self.buffers.front_file() {
            None => {
                let slices = self.buffers.memory(self.mem, count)?;
                let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard_mut).collect();
                let iovecs: Vec<_> = guards
                    .iter()
                    .map(|guard| libc::iovec {
                        iov_base: guard.as_ptr().cast(),
                        iov_len: guard.len(),
                    })
                    .collect();
                // SAFETY: each iovec is a slice of guest memory, checked by get_slices(); the guards and
                // `mem` outlive the call. The guest may change these bytes at any time, and only
                // the kernel writes to them: no reference to them is ever made.
                let read = |flags| unsafe { oslib::readv_at(file.as_fd(), &iovecs, off, flags) };
                match self.patience {
                    Patience::Any => read(flags)?,
                    _ => self.read_now(flags, read)?,
                }
            }
            Some((space, from, bytes)) => {
                let bytes = within_file(&space, from, bytes.min(count))?;
                let mut bounce = vec![0; bytes];
                let read = file.read_at(&mut bounce, off.cast_unsigned())?;
                let mut stored = 0;
                while let Some(rest) = bounce.get(stored..read).filter(|rest| !rest.is_empty()) {
                    stored += space.source().write_at(from.0 + stored as u64, rest)?;
                }
                read
            }
        };
        self.buffers.consume(done);
        Ok(done)
    }

    /// Reads what needs no waiting for; where the file system can't tell what does, all or nothing.
    fn read_now(
        &self,
        flags: Option<ReadvFlags>,
        read: impl Fn(Option<ReadvFlags>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        match read(Some(flags.unwrap_or(ReadvFlags::empty()) | ReadvFlags::RWF_NOWAIT)) {
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                if self.patience == Patience::None {
                    return read(flags);
                }
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

/// Buffers that a WRITE takes from.
pub(super) struct GuestReader<'m> {
    pub(super) mem: &'m GuestMemoryMmap,
    pub(super) buffers: Buffers,
    /// The file's memory, if all of it is to be stored there (behaviour 13).
    pub(super) past_cache: Option<&'m Direct>,
}

impl GuestReader<'_> {
    fn step(
        &mut self,
        file: &File,
        count: usize,
        off: i64,
        flags: Option<WritevFlags>,
    ) -> io::Result<usize> {
        let front = self.buffers.front_file();
        if let (None, Some(direct)) = (&front, self.past_cache) {
            return self.store(direct, file, count, off);
        }
        let done = match front {
            None => {
                let slices = self.buffers.memory(self.mem, count)?;
                let guards: Vec<_> = slices.iter().map(VolatileSlice::ptr_guard).collect();
                let iovecs: Vec<_> = guards
                    .iter()
                    .map(|guard| libc::iovec {
                        iov_base: guard.as_ptr().cast_mut().cast(),
                        iov_len: guard.len(),
                    })
                    .collect();
                // SAFETY: as in GuestWriter; the kernel only reads from them.
                unsafe { oslib::writev_at(file.as_fd(), &iovecs, off, flags)? }
            }
            Some((space, from, bytes)) => {
                let mut bounce = vec![0; within_file(&space, from, bytes.min(count))?];
                let read = space.source().read_at(from.0, &mut bounce)?;
                bounce.truncate(read);
                let iovec =
                    libc::iovec { iov_base: bounce.as_mut_ptr().cast(), iov_len: bounce.len() };
                // SAFETY: `bounce` is ours, and outlives the call.
                unsafe { oslib::writev_at(file.as_fd(), &[iovec], off, flags)? }
            }
        };
        self.buffers.consume(done);
        Ok(done)
    }

    /// Stores the front of the buffers past the cache, as a write of `file` would, which notes the time.
    fn store(&mut self, direct: &Direct, file: &File, count: usize, off: i64) -> io::Result<usize> {
        let mut done = 0;
        for slice in self.buffers.memory(self.mem, count)? {
            direct.store_from(off.cast_unsigned() + done as u64, &slice)?;
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

/// Copies the first `most` bytes of `segments` out of guest memory.
///
/// # Errors
/// EFAULT for what is no guest memory, or in the window: no driver puts the head of a request there.
pub(super) fn copy_in(
    mem: &GuestMemoryMmap,
    segments: &[Segment],
    most: usize,
    window: Option<WindowPlace>,
) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(most.min(BOUNCE_BYTES));
    for segment in segments {
        let now = (most - bytes.len()).min(segment.bytes as usize);
        if now == 0 {
            continue;
        }
        if window.is_some_and(|window| window.touches(*segment)) {
            return Err(Errno::EFAULT.into());
        }
        let start = bytes.len();
        for slice in GuestMemoryBackend::get_slices(mem, segment.at, now) {
            let slice = slice.map_err(|_| Errno::EFAULT)?;
            let end = bytes.len();
            bytes.resize(end + slice.len(), 0);
            if let Some(to) = bytes.get_mut(end..) {
                slice.copy_to(to);
            }
        }
        debug_assert_eq!(bytes.len() - start, now);
    }
    Ok(bytes)
}
