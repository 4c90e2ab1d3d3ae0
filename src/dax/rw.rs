// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: FUSE READ and WRITE on a file that may be granted at the same time (behaviour 13).
//! They read and write the file itself, whose bytes the window shows.

use std::io;

use super::engine::{Engine, GrantError, Space};
use super::entry::PageIndex;
use super::sync::Arc;
use crate::persist::LineFlush;
use crate::window::{FileOffset, FileRange};

impl Engine {
    /// Reads from byte `from` of the file on, to the end of the file at most. Returns the number of
    /// bytes read. Holes read as zeros and stay holes.
    ///
    /// # Errors
    /// The errors of fstat(2) and pread(2) on the file.
    pub fn read(&self, space: &Space, from: FileOffset, to: &mut [u8]) -> io::Result<usize> {
        let _shared = space.invalidate_lock.read();
        let left = space.source.file_bytes()?.saturating_sub(from.0);
        let wanted = to.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..wanted).filter(|rest| !rest.is_empty()) {
            match space.source.read_at(from + done as u64, rest)? {
                0 => break,
                n => done += n,
            }
        }
        Ok(done)
    }

    /// Writes from byte `from` of the file on, and extends the file if `data` ends behind its end.
    /// On return each grant of the written range shows the data. Returns the number of bytes
    /// written.
    ///
    /// # Errors
    /// - [`GrantError::Invalid`]: the range ends behind the largest file offset.
    /// - [`GrantError::Source`]: no byte could be written, or the flush of written pages failed.
    /// - [`GrantError::Window`]: the file has grown, but the front-end refused a map of the growth.
    pub fn write(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        data: &[u8],
    ) -> Result<usize, GrantError> {
        self.write_by(space, FileRange::new(from, data.len() as u64), || {
            let mut done = 0;
            while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
                match space.source.write_at(from + done as u64, rest) {
                    Ok(0) => break,
                    Ok(n) => done += n,
                    Err(e) if done == 0 => return Err(e),
                    Err(_) => break,
                }
            }
            Ok(done)
        })
    }

    /// Like [`write`](Self::write), but calls the closure `write` to write from the start of
    /// `range` on. The closure returns the number of bytes written.
    ///
    /// # Errors
    /// See [`write`](Self::write).
    pub fn write_by(
        &self,
        space: &Arc<Space>,
        range: FileRange,
        write: impl FnOnce() -> io::Result<usize>,
    ) -> Result<usize, GrantError> {
        let (from, end) = (range.from, range.checked_end());
        let Some(end) = end else {
            return Err(GrantError::Invalid("the range ends behind the largest file offset"));
        };
        {
            let _shared = space.invalidate_lock.read();
            if end.0 <= space.source.file_bytes()? {
                return Ok(self.write_inside(space, from, write)?);
            }
        }
        // The file grows, and live grants then show more of it. The write lock keeps other threads
        // from reading the length in between.
        let _alone = space.invalidate_lock.write();
        let old = space.source.file_bytes()?;
        let done = self.write_inside(space, from, write)?;
        if space.source.file_bytes()? > old {
            let first = PageIndex::of(from.min(FileOffset(old)));
            self.sync_to_length(space, old, first.chunk())?;
        }
        Ok(done)
    }

    fn write_inside(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        write: impl FnOnce() -> io::Result<usize>,
    ) -> io::Result<usize> {
        let done = write()?;
        if done == 0 {
            return Ok(0);
        }
        let (first, last) = FileRange::new(from, done as u64).pages();
        if let Some(lines) = space.lines() {
            // Written back at once, so no entry has to be dirty. The range may have no entry.
            self.check_failed(space)?;
            self.note(space, write_back_pages(lines, first, last))?;
        }
        self.fill_holes(space, first, last)?;
        Ok(done)
    }

    /// Replaces the hole entries of `first..=last` by entries with blocks, since a write has given
    /// these pages blocks, and the window must show them.
    fn fill_holes(&self, space: &Arc<Space>, first: PageIndex, last: PageIndex) -> io::Result<()> {
        let mut at = first;
        loop {
            let found = space.entries.index().next(at, last, None);
            let Some((start, entry)) = found else { return Ok(()) };
            if !entry.is_real() {
                // Whole chunks: a PMD hole becomes one PMD with blocks, or 512 PTEs that are holes
                // or have blocks.
                let (start, stop) = (start.chunk(), last.chunk_last());
                let window = self.window.take();
                // The chunk may contain pages by which another program has extended the file. The
                // write grants of those pages have no blocks yet.
                self.allocate(&window, space, start, stop)?;
                return self.refault(&window, space, start, stop);
            }
            at = start + entry.order().pages();
        }
    }
}

/// Flushes and fences pages `first..=last` of a file. They are then durable if the file's metadata
/// is durable.
///
/// # Errors
/// See [`LineFlush::flush`].
pub(super) fn write_back_pages(
    lines: &dyn LineFlush,
    first: PageIndex,
    last: PageIndex,
) -> io::Result<()> {
    lines.flush(FileRange::of_pages(first, last))?;
    lines.fence();
    Ok(())
}
