// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: what a guest may have stored to: the write grants of a file, and of a piece of the
//! window.

use std::io;

use super::engine::{Engine, Space, Span};
use super::entry::PageIndex;
use super::extent::Access;
use super::sync::{Arc, lock};
use crate::window::{FileOffset, WindowBytes};

/// A piece of a file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes {
    /// Its first byte.
    pub from: FileOffset,
    /// Its length.
    pub bytes: u64,
}

impl Space {
    /// The pieces that live write grants cover, in order.
    pub fn written(&self) -> Vec<Bytes> {
        let runs = lock(&self.coverage).runs(PageIndex(0), PageIndex::LAST);
        let mut written: Vec<Bytes> = Vec::new();
        for (first, last, _) in runs.into_iter().filter(|(.., count)| count.writes > 0) {
            let (from, end) = (first.byte(), last.next().byte());
            match written.last_mut() {
                Some(before) if before.from.0 + before.bytes == from => {
                    before.bytes = end - before.from.0;
                }
                _ => written.push(Bytes { from: FileOffset(from), bytes: end - from }),
            }
        }
        written
    }
}

impl Engine {
    /// What is granted for writing in `spans` of the window.
    pub fn written_in(&self, spans: &[Span]) -> Vec<(Arc<Space>, Bytes)> {
        let window = self.window.take();
        let mut written = Vec::new();
        for span in spans {
            let before = window.grants.range(..=span.at).next_back().map_or(span.at, |(at, _)| *at);
            for (at, grant) in window.grants.range(before..span.at + span.bytes) {
                let (from, to) = ((*at).max(span.at), (at + grant.bytes).min(span.at + span.bytes));
                if from < to && grant.access == Access::Write {
                    let from_byte = FileOffset(grant.from.0 + (from - at));
                    let bytes = Bytes { from: from_byte, bytes: to - from };
                    written.push((grant.space.clone(), bytes));
                }
            }
        }
        written
    }

    /// The whole window.
    pub fn whole(&self) -> Span {
        let WindowBytes(bytes) = self.bytes;
        Span { at: 0, bytes }
    }

    /// Remembers that pages of the file may be lost, as a sync of our own that failed would.
    pub(crate) fn lost(&self, space: &Space, e: io::Error) {
        // What it returns is the error itself.
        let _ = self.note(space, Err(e));
    }
}
