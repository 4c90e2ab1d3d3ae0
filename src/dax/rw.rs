// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: FUSE READ and WRITE on a file that may be granted at the same time (behaviour 13).
//! They go straight to the file's bytes: the same that the window shows.

use std::io;

use super::engine::{Engine, GrantError, Space};
use super::entry::PageIndex;
use super::sync::Arc;
use crate::persist::LineFlush;
use crate::window::{FileOffset, FileRange};

impl Engine {
    /// Reads from byte `from` on. Stops at the end of the file: what is returned is how much was
    /// read. Holes read as zeros, and stay holes.
    ///
    /// # Errors
    /// The file system's.
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

    /// Writes from byte `from` on, and makes the file longer where it must. When it returns, the
    /// window shows what was written wherever it is granted. Returns how much was written.
    ///
    /// # Errors
    /// The file system's, if nothing was written; or the front-end's, after the file has grown.
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

    /// The same, where it is `write` that writes from the start of `range` on, and says how
    /// many bytes.
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
        let Some(end) = end else { return Err(GrantError::Invalid("longer than any file")) };
        {
            let _shared = space.invalidate_lock.read();
            if end.0 <= space.source.file_bytes()? {
                return Ok(self.write_inside(space, from, write)?);
            }
        }
        // It grows. Live grants then show more, and nobody else may measure the file meanwhile.
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
            // Written back at once: no entry need know of it, and there may be none.
            self.check_failed(space)?;
            self.note(space, write_back_pages(lines, first, last))?;
        }
        self.fill_holes(space, first, last)?;
        Ok(done)
    }

    /// What was a hole under a live grant has blocks now: the window must show them.
    fn fill_holes(&self, space: &Arc<Space>, first: PageIndex, last: PageIndex) -> io::Result<()> {
        let mut at = first;
        loop {
            let found = space.entries.index().next(at, last, None);
            let Some((start, entry)) = found else { return Ok(()) };
            if !entry.is_real() {
                // Whole chunks: a hole of 2 MiB becomes one entry with blocks, or 512 of either
                // kind.
                let (start, stop) = (start.chunk(), last.chunk_last());
                let window = self.window.take();
                // The chunk may reach into a growth that nobody told of, where write grants have no
                // blocks yet.
                self.allocate(&window, space, start, stop)?;
                return self.refault(&window, space, start, stop);
            }
            at = start + entry.order().pages();
        }
    }
}

/// Pages `first..=last` of a file are durable then, if their metadata is.
pub(super) fn write_back_pages(
    lines: &dyn LineFlush,
    first: PageIndex,
    last: PageIndex,
) -> io::Result<()> {
    lines.flush(FileRange::of_pages(first, last))?;
    lines.fence();
    Ok(())
}
