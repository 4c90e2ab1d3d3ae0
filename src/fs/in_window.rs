// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Buffers that lie in the window of this device (O_DIRECT to or from a DAX mapping). Their bytes
//! are read and written by system calls on the granted file. So the memory table need not contain
//! the range, and a page behind the file's end raises no SIGBUS in the daemon.

use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::dax::engine::{Engine, Space};
use crate::device::chain::Segment;
use crate::support::units::PAGE_BYTES;
use crate::window::locate::WindowLocation;
use crate::window::{FileOffset, FileRange, WindowOffset};

/// A part of a buffer that maps a range of one file.
#[derive(Clone)]
pub(super) struct FilePiece {
    space: Arc<Space>,
    from: FileOffset,
    pub(super) bytes: usize,
}

/// Offset of `segment` in the window. None for a segment outside of the window.
///
/// # Errors
/// EFAULT for a segment that lies only partly in the window.
fn offset_in(window: WindowLocation, segment: Segment) -> io::Result<Option<WindowOffset>> {
    let (start, bytes) = (segment.at.0, u64::from(segment.bytes));
    let end = start.checked_add(bytes).ok_or(Errno::EFAULT)?;
    let window_end = window.gpa.saturating_add(window.bytes.0);
    if bytes == 0 || end <= window.gpa || start >= window_end {
        return Ok(None);
    }
    if start < window.gpa || end > window_end {
        return Err(Errno::EFAULT.into());
    }
    Ok(Some(WindowOffset(start - window.gpa)))
}

impl FilePiece {
    /// The file ranges that `segment` maps. None for a segment outside of the window.
    ///
    /// # Errors
    /// EFAULT for a part of the window where no range is granted.
    pub(super) fn all_of(
        segment: Segment,
        (window, engine): (WindowLocation, &Engine),
    ) -> io::Result<Option<Vec<Self>>> {
        let Some(start) = offset_in(window, segment)? else { return Ok(None) };
        let (bytes, mut done, mut pieces) = (segment.bytes as usize, 0, Vec::new());
        while done < bytes {
            let at = WindowOffset(start.0 + done as u64);
            let (space, FileRange { from, bytes: left }) =
                engine.granted_at(at).ok_or(Errno::EFAULT)?;
            let now = (bytes - done).min(usize::try_from(left).unwrap_or(usize::MAX));
            pieces.push(Self { space, from, bytes: now });
            done += now;
        }
        Ok(Some(pieces))
    }

    pub(super) fn skip(&mut self, n: usize) {
        self.from.0 += n as u64;
        self.bytes -= n;
    }

    /// Number of its bytes up to the end of the file's last page: a load through the window behind
    /// that page would fault.
    pub(super) fn readable_bytes(&self) -> io::Result<usize> {
        let end = self.space.source().file_bytes()?.next_multiple_of(PAGE_BYTES);
        let left = usize::try_from(end.saturating_sub(self.from.0)).unwrap_or(usize::MAX);
        Ok(left.min(self.bytes))
    }

    /// Reads the file's bytes into `to`. Bytes behind the end of the file stay as they are: the
    /// caller passes zeros, which a load through the window would read.
    pub(super) fn load(&self, to: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.space.source().read_at(self.from + done as u64, rest)? {
                0 => break,
                read => done += read,
            }
        }
        Ok(())
    }

    /// Writes `bytes` to the file. As with stores through the window, bytes behind the end of the
    /// file are dropped, and the file does not grow.
    ///
    /// # Errors
    /// EFAULT while another thread makes the file shorter. This thread must not wait for that
    /// thread: it may wait for the front-end, the front-end for the stop of a ring, and the stop
    /// for this request, which is pinned.
    pub(super) fn store(&self, bytes: &[u8]) -> io::Result<()> {
        let source = self.space.source();
        let _stays = self.space.keep_length().ok_or(Errno::EFAULT)?;
        let left = source.file_bytes()?.saturating_sub(self.from.0);
        let within = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut done = 0;
        while let Some(rest) = bytes.get(done..within).filter(|rest| !rest.is_empty()) {
            done += source.write_at(self.from + done as u64, rest)?;
        }
        Ok(())
    }
}
