// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: a grant, the grants and maps of a window, and the errors of a grant. Knows no
//! entries.

use std::collections::BTreeMap;
use std::io;

use nix::errno::Errno;
use thiserror::Error;

use super::entry::{PMD_BYTES, PageIndex};
use super::extent::Access;
use super::space::Space;
use super::sync::Arc;
use crate::window::layout::{Layout, ShowError};
use crate::window::{FileOffset, FileRange, MapError, WindowBytes, WindowOffset, WindowRange};

/// The guest's right to read or write a range of a file through the window. Its place in the window
/// is its key in [`Window::grants`].
#[derive(Clone)]
pub(super) struct Grant {
    pub(super) space: Arc<Space>,
    pub(super) from: FileOffset,
    pub(super) bytes: WindowBytes,
    pub(super) access: Access,
}

impl Grant {
    /// The granted range of the file.
    pub(super) fn of_file(&self) -> FileRange {
        FileRange::new(self.from, self.bytes.0)
    }

    pub(super) fn first(&self) -> PageIndex {
        self.of_file().pages().0
    }

    pub(super) fn last(&self) -> PageIndex {
        self.of_file().pages().1
    }

    /// The granted range of the window, if the grant begins at `at`.
    pub(super) fn range(&self, at: WindowOffset) -> WindowRange {
        WindowRange::new(at, self.bytes)
    }

    /// The part of the grant that lies in the range `part` of the window, if the grant begins at
    /// `at`.
    pub(super) fn part(&self, at: WindowOffset, part: WindowRange) -> Self {
        Self { from: self.from + (part.at - at), bytes: part.bytes, ..self.clone() }
    }

    /// Whether file offset and window offset are equal modulo 2 MiB, if the grant begins at `at`
    /// (behaviour 15).
    pub(super) fn agrees(&self, at: WindowOffset) -> bool {
        at.0 % PMD_BYTES == self.from.0 % PMD_BYTES
    }
}

/// The grants and maps of a window, by window offset.
#[derive(Default)]
pub(super) struct Window {
    pub(super) grants: BTreeMap<WindowOffset, Grant>,
    pub(super) layout: Layout,
}

impl Window {
    /// The grants that overlap `range`, each with its range of the window.
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

    /// Removes `range` from the grants, and returns the removed grants and parts of grants. The
    /// parts outside `range` stay.
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

/// Why a grant was not made or not removed. After an error the grants are as they were before.
#[derive(Debug, Error)]
pub enum GrantError {
    /// A number of the guest's request is invalid; the text names the rule.
    #[error("{0}")]
    Invalid(&'static str),
    /// Behaviour 14: the range lies wholly behind the end of the file.
    #[error("the range lies behind the end of the file")]
    PastEof,
    /// The file ends inside a page, and the front-end maps whole pages only (docs/front-ends.md
    /// Q6).
    #[error("the file's last page is incomplete, so the front-end can't map it")]
    Tail,
    /// A file-system call on the file failed: ENOSPC of fallocate(2), most likely.
    #[error("{0}")]
    Source(#[from] io::Error),
    /// The front-end refused a map or unmap, or the window would have too many maps.
    #[error("{0}")]
    Window(#[from] ShowError),
    /// The argument `may` of `Engine::grant` returned false: the request belongs to an earlier life
    /// of the device.
    #[error("the device was reset or unmounted after the request came")]
    Unwanted,
}

impl GrantError {
    /// The errno of the FUSE reply.
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

/// A checked range of the window: aligned to pages, not empty, and inside the window.
#[derive(Debug, Clone, Copy)]
pub struct Span(pub(super) WindowRange);

/// The grant's last page inside the file, and the number of bytes of the grant to map.
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
