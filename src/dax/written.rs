// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the ranges that a guest may have stored to: the write grants of a file, and of a
//! range of the window.

use std::io;

use super::engine::{Engine, Space, Span};
use super::entry::PageIndex;
use super::extent::Access;
use super::sync::{Arc, lock};
use crate::window::{FileRange, WindowOffset, WindowRange};

impl Space {
    /// The ranges of the file that live write grants cover, in ascending order.
    pub fn written(&self) -> Vec<FileRange> {
        let runs = lock(&self.coverage).runs(PageIndex(0), PageIndex::LAST);
        let mut written: Vec<FileRange> = Vec::new();
        for (first, last, _) in runs.into_iter().filter(|(.., count)| count.writes > 0) {
            let run = FileRange::of_pages(first, last);
            match written.last_mut() {
                Some(before) if before.end() == run.from => before.bytes += run.bytes,
                _ => written.push(run),
            }
        }
        written
    }
}

impl Engine {
    /// The write grants in `spans` of the window: each one's space and its range of the file.
    pub fn written_in(&self, spans: &[Span]) -> Vec<(Arc<Space>, FileRange)> {
        let window = self.window.take();
        let mut written = Vec::new();
        for Span(range) in spans {
            for (there, grant) in window.touching(*range) {
                if let Some(part) = there.overlap(*range)
                    && grant.access == Access::Write
                {
                    written.push((grant.space.clone(), grant.part(there.at, part).of_file()));
                }
            }
        }
        written
    }

    /// The whole window.
    pub fn whole(&self) -> Span {
        Span(WindowRange::new(WindowOffset(0), self.bytes))
    }

    /// Notes that pages of the file may be lost, as a failed writeback does: every later writeback
    /// of the space fails.
    pub(crate) fn lost(&self, space: &Space, e: io::Error) {
        // note() returns the error that it was given.
        let _ = self.note(space, Err(e));
    }
}
