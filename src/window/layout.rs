// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which maps the front-end has, and the few steps from one layout to the next.
//!
//! The front-end knows only whole maps: it refuses to map over one (Q4) and to unmap a part of one
//! (Q5). So a change takes away every map that is in its way, and gives back what stuck out of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use log::error;
use thiserror::Error;

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};

/// A piece of a file, to be shown.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The file.
    pub file: Arc<File>,
    /// Where in the file it begins.
    pub from: FileOffset,
    /// How much of it.
    pub bytes: WindowBytes,
}

impl Piece {
    fn cut(&self, skip: u64, bytes: u64) -> Self {
        let from = FileOffset(self.from.0 + skip);
        Self { file: self.file.clone(), from, bytes: WindowBytes(bytes) }
    }
}

/// Why a layout could not be changed.
#[derive(Debug, Error)]
pub enum ShowError {
    /// The VM's maps would be too many (Q2).
    #[error("more than {0} maps")]
    TooMany(usize),
    /// The front-end refused a step; all is as it was.
    #[error("{0}")]
    Refused(MapError),
    /// The front-end refused a step, and then also the way back: something is not shown any more.
    #[error("{0}, and the way back failed: the window has a gap")]
    Torn(MapError),
}

#[derive(Debug, Clone)]
enum Step {
    Map(WindowOffset, Piece),
    Unmap(WindowOffset, Piece),
}

impl Step {
    fn inverse(&self) -> Self {
        match self {
            Self::Map(at, piece) => Self::Unmap(*at, piece.clone()),
            Self::Unmap(at, piece) => Self::Map(*at, piece.clone()),
        }
    }
}

/// The maps that the front-end has.
#[derive(Debug, Default)]
pub struct Layout {
    maps: BTreeMap<u64, Piece>,
}

impl Layout {
    /// How many maps there are.
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// The maps by window offset.
    pub fn maps(&self) -> impl Iterator<Item = (WindowOffset, &Piece)> {
        self.maps.iter().map(|(at, piece)| (WindowOffset(*at), piece))
    }

    /// The front-end has dropped all maps by itself (Q10).
    pub fn forget(&mut self) {
        self.maps.clear();
    }

    fn touching(&self, at: u64, end: u64) -> impl Iterator<Item = (u64, &Piece)> {
        let before = self.maps.range(..at).next_back();
        let before = before.filter(move |(start, piece)| *start + piece.bytes.0 > at);
        before.into_iter().chain(self.maps.range(at..end)).map(|(start, piece)| (*start, piece))
    }

    /// How far the window is shown from `at` on without a gap, looked at up to `end`.
    pub(crate) fn shown_until(&self, at: u64, end: u64) -> u64 {
        let mut until = at;
        for (start, piece) in self.touching(at, end) {
            if start > until {
                break;
            }
            until = (start + piece.bytes.0).min(end);
        }
        until
    }

    /// Makes `bytes` of the window at `at` show `new` (which may be shorter), or nothing. No message
    /// is sent if they do already.
    ///
    /// # Errors
    /// See [`ShowError`]; but for [`ShowError::Torn`], all is as it was.
    pub fn show(
        &mut self,
        at: WindowOffset,
        bytes: WindowBytes,
        new: Option<&Piece>,
        mapper: &dyn Mapper,
        most: usize,
    ) -> Result<(), ShowError> {
        let new = new.filter(|piece| piece.bytes.0 > 0);
        let steps = self.plan(at.0, at.0 + bytes.0, new);
        let maps = steps.iter().filter(|step| matches!(step, Step::Map(..))).count();
        if self.maps.len() + 2 * maps > most + steps.len() {
            return Err(ShowError::TooMany(most));
        }
        for (done, step) in steps.iter().enumerate() {
            if let Err(e) = self.take(step, mapper) {
                return Err(self.undo(steps.iter().take(done), e, mapper));
            }
        }
        Ok(())
    }

    /// Nothing of `file` from byte `end` (a whole page) on is shown any more. It goes by maps, not by
    /// grants: a file that has already shrunk can't be mapped behind its end, not even for a moment.
    ///
    /// # Errors
    /// See [`show`](Self::show).
    pub fn clip(
        &mut self,
        file: &Arc<File>,
        end: FileOffset,
        mapper: &dyn Mapper,
        most: usize,
    ) -> Result<(), ShowError> {
        let over: Vec<_> = self
            .maps
            .iter()
            .filter(|(_, piece)| Arc::ptr_eq(&piece.file, file))
            .map(|(at, piece)| (at, end.0.saturating_sub(piece.from.0), piece.bytes.0))
            .filter(|(_, keep, bytes)| keep < bytes)
            .map(|(at, keep, bytes)| (WindowOffset(at + keep), WindowBytes(bytes - keep)))
            .collect();
        for (at, bytes) in over {
            self.show(at, bytes, None, mapper, most)?;
        }
        Ok(())
    }

    fn plan(&self, at: u64, end: u64, new: Option<&Piece>) -> Vec<Step> {
        if self.shows(at, end, new) {
            return Vec::new();
        }
        let mut steps: Vec<_> = self
            .touching(at, end)
            .map(|(start, piece)| Step::Unmap(WindowOffset(start), piece.clone()))
            .collect();
        for (start, piece) in self.touching(at, end) {
            let piece_end = start + piece.bytes.0;
            if start < at {
                steps.push(Step::Map(WindowOffset(start), piece.cut(0, at - start)));
            }
            if piece_end > end {
                steps.push(Step::Map(WindowOffset(end), piece.cut(end - start, piece_end - end)));
            }
        }
        // Last: nothing comes behind it that could be refused, so it never has to be taken back, and
        // a way back that is refused, too, leaves a gap but never shows what was not granted.
        steps.extend(new.map(|piece| Step::Map(WindowOffset(at), piece.clone())));
        steps
    }

    fn shows(&self, at: u64, end: u64, new: Option<&Piece>) -> bool {
        let mut there = self.touching(at, end);
        match (there.next(), there.next(), new) {
            (None, _, None) => true,
            (Some((start, piece)), None, Some(new)) => {
                // One map, of the same bytes of the same file, as far as asked and no further.
                let new_end = at + new.bytes.0;
                Arc::ptr_eq(&piece.file, &new.file)
                    && start <= at
                    && piece.from.0 + (at - start) == new.from.0
                    && if new_end < end {
                        start + piece.bytes.0 == new_end
                    } else {
                        start + piece.bytes.0 >= new_end
                    }
            }
            _ => false,
        }
    }

    fn take(&mut self, step: &Step, mapper: &dyn Mapper) -> Result<(), MapError> {
        match step {
            Step::Map(at, piece) => {
                mapper.map(*at, &piece.file, piece.from, piece.bytes)?;
                self.maps.insert(at.0, piece.clone());
            }
            Step::Unmap(at, piece) => {
                mapper.unmap(*at, piece.bytes)?;
                self.maps.remove(&at.0);
            }
        }
        Ok(())
    }

    fn undo<'a>(
        &mut self,
        done: impl DoubleEndedIterator<Item = &'a Step>,
        why: MapError,
        mapper: &dyn Mapper,
    ) -> ShowError {
        let mut torn = false;
        for step in done.rev() {
            let back = step.inverse();
            // What an earlier step back could not take away is in the way (Q4).
            let blocked = matches!(&back, Step::Map(at, piece)
                if self.touching(at.0, at.0 + piece.bytes.0).next().is_some());
            if blocked || self.take(&back, mapper).is_err() {
                error!("the window can't be put back as it was: {back:?}");
                torn = true;
            }
        }
        if torn { ShowError::Torn(why) } else { ShowError::Refused(why) }
    }
}
