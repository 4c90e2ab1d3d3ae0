// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: one grant, all grants and maps of a window, and why a grant is refused. Knows no
//! entries.

use std::collections::BTreeMap;
use std::io;

use nix::errno::Errno;
use thiserror::Error;

use super::engine::Space;
use super::entry::{PMD_BYTES, PageIndex};
use super::extent::Access;
use super::sync::Arc;
use crate::window::layout::{Layout, ShowError};
use crate::window::{FileOffset, FileRange, MapError, WindowBytes, WindowOffset, WindowRange};

/// What a guest may touch without asking again.
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) space: Arc<Space>,
    pub(super) from: FileOffset,
    pub(super) bytes: WindowBytes,
    pub(super) access: Access,
}

impl Grant {
    /// What it grants of the file.
    pub(super) fn of_file(&self) -> FileRange {
        FileRange::new(self.from, self.bytes.0)
    }

    pub(super) fn first(&self) -> PageIndex {
        self.of_file().pages().0
    }

    pub(super) fn last(&self) -> PageIndex {
        self.of_file().pages().1
    }

    /// The range of the window that it grants where it begins at `at`.
    pub(super) fn range(&self, at: WindowOffset) -> WindowRange {
        WindowRange::new(at, self.bytes)
    }

    /// What the range `part` of the window has of it where it begins at `at`.
    pub(super) fn part(&self, at: WindowOffset, part: WindowRange) -> Self {
        Self { from: self.from + (part.at - at), bytes: part.bytes, ..self.clone() }
    }

    /// Whether file and window agree modulo 2 MiB where it begins at `at` (behaviour 15).
    pub(super) fn agrees(&self, at: WindowOffset) -> bool {
        at.0 % PMD_BYTES == self.from.0 % PMD_BYTES
    }
}

/// Grants and maps, by window offset.
#[derive(Default)]
pub(super) struct Window {
    pub(super) grants: BTreeMap<WindowOffset, Grant>,
    pub(super) layout: Layout,
}

impl Window {
    /// The grants that have a byte of `range`: where each is, and what it grants.
    pub(super) fn touching(
        &self,
        range: WindowRange,
    ) -> impl Iterator<Item = (WindowRange, &Grant)> {
        let before = self.grants.range(..range.at).next_back();
        let grants = before.into_iter().chain(self.grants.range(range.at..range.end()));
        grants
            .map(|(at, grant)| (grant.range(*at), grant))
            .filter(move |(there, _)| there.overlap(range).is_some())
    }

    /// Takes `range` out of the grants, cutting those that stick out, and returns what was in it.
    pub(super) fn cut_out(&mut self, range: WindowRange) -> Vec<Grant> {
        let touched: Vec<_> =
            self.touching(range).map(|(there, grant)| (there, grant.clone())).collect();
        for (there, grant) in &touched {
            self.grants.remove(&there.at);
            for part in there.without(range) {
                self.grants.insert(part.at, grant.part(there.at, part));
            }
        }
        let cut = |(there, grant): (WindowRange, Grant)| {
            there.overlap(range).map(|part| grant.part(there.at, part))
        };
        touched.into_iter().filter_map(cut).collect()
    }
}

/// Why a grant, or its removal, did not happen. Nothing has changed then.
#[derive(Debug, Error)]
pub enum GrantError {
    /// A number that can't be.
    #[error("{0}")]
    Invalid(&'static str),
    /// Behaviour 14: it lies wholly behind the end of the file.
    #[error("behind the end of the file")]
    PastEof,
    /// The file's last page is not whole, and the front-end maps whole pages only (Q6).
    #[error("the file's last page can't be mapped")]
    Tail,
    /// The file system's error: out of space, most likely.
    #[error("{0}")]
    Source(#[from] io::Error),
    /// The front-end's.
    #[error("{0}")]
    Window(#[from] ShowError),
    /// Whoever asked for it does not want it any more.
    #[error("nobody wants it any more")]
    Unwanted,
}

impl GrantError {
    /// What the guest is told.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Invalid(_) => Errno::EINVAL,
            Self::PastEof => Errno::ENXIO,
            Self::Tail => Errno::EOPNOTSUPP,
            Self::Source(e) => e.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
            Self::Window(ShowError::TooMany(_)) => Errno::ENOMEM,
            Self::Window(_) | Self::Unwanted => Errno::EIO,
        }
    }
}

/// A range of the window that was checked: aligned to pages, not empty, and inside.
#[derive(Debug, Clone, Copy)]
pub struct Span(pub(super) WindowRange);

/// The last page of the grant inside the file, and how many bytes of it are to be mapped.
pub(super) fn extent_of(grant: &Grant) -> Result<(PageIndex, WindowBytes), GrantError> {
    let source = &grant.space.source;
    let file_bytes = grant.space.look()?;
    let inside = FileRange::between(grant.from, PageIndex::behind(file_bytes).byte());
    if inside.is_empty() {
        return Err(GrantError::PastEof);
    }
    let wanted = inside.bytes.min(grant.bytes.0);
    let mapped = FileRange::between(grant.from, FileOffset(source.mappable_bytes(file_bytes)));
    let mapped = mapped.bytes.min(grant.bytes.0);
    if mapped < wanted {
        return Err(GrantError::Tail);
    }
    Ok((FileRange::new(grant.from, wanted).pages().1, WindowBytes(mapped)))
}

impl From<MapError> for GrantError {
    fn from(e: MapError) -> Self {
        Self::Window(ShowError::Refused(e))
    }
}
