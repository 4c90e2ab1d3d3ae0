// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The layout of a window: the maps that the front-end has, and the maps and unmaps that change
//! it.
//!
//! The front-end knows only whole maps: it refuses a map that overlaps another one
//! (docs/front-ends.md Q4), and an unmap of a part of a map (Q5). So a change of a range unmaps
//! each map that overlaps the range, and maps the parts outside the range again.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;

use log::error;
use thiserror::Error;

use super::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset, WindowRange};

/// A piece of a file that a map shows.
#[derive(Debug, Clone)]
pub struct Piece {
    /// The file.
    pub file: Arc<File>,
    /// The first byte of the piece in the file.
    pub from: FileOffset,
    /// The length of the piece in bytes.
    pub bytes: WindowBytes,
}

impl Piece {
    /// The range of the window that shows the piece, if its map is at `at`.
    fn range(&self, at: WindowOffset) -> WindowRange {
        WindowRange::new(at, self.bytes)
    }

    /// The part of the piece that the range `part` of the window shows, if its map is at `at`.
    fn part(&self, at: WindowOffset, part: WindowRange) -> Self {
        Self { file: self.file.clone(), from: self.from + (part.at - at), bytes: part.bytes }
    }
}

/// Why a layout was not changed.
#[derive(Debug, Error)]
pub enum ShowError {
    /// The change would add a map, and exceed the largest number of maps (docs/front-ends.md Q2),
    /// which is the value. The layout is unchanged.
    #[error("the window can't have more than {0} maps")]
    TooMany(usize),
    /// A map or unmap failed, and the steps before it were rolled back. The layout is unchanged.
    #[error("{0}")]
    Refused(MapError),
    /// A map or unmap failed, and then a step of the rollback too: a range that was shown before is
    /// not shown any more.
    #[error("{0}, and the rollback failed: a range of the window is not mapped any more")]
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
    maps: BTreeMap<WindowOffset, Piece>,
}

impl Layout {
    /// Number of maps.
    pub fn len(&self) -> usize {
        self.maps.len()
    }

    /// Whether the window has no map.
    pub fn is_empty(&self) -> bool {
        self.maps.is_empty()
    }

    /// The maps by window offset.
    pub fn maps(&self) -> impl Iterator<Item = (WindowOffset, &Piece)> {
        self.maps.iter().map(|(at, piece)| (*at, piece))
    }

    /// Removes all maps without a message: the front-end has dropped them by itself
    /// (docs/front-ends.md Q10).
    pub fn forget(&mut self) {
        self.maps.clear();
    }

    /// The maps that overlap `range`, each with its range of the window.
    fn touching(&self, range: WindowRange) -> impl Iterator<Item = (WindowRange, &Piece)> {
        let before = self.maps.range(..range.at).next_back();
        let maps = before.into_iter().chain(self.maps.range(range.at..range.end()));
        maps.map(|(at, piece)| (piece.range(*at), piece))
            .filter(move |(there, _)| there.overlap(range).is_some())
    }

    /// The end of the part of `range` that is mapped without a gap from the start of `range` on.
    pub(crate) fn shown_until(&self, range: WindowRange) -> WindowOffset {
        let mut until = range.at;
        for (there, _) in self.touching(range) {
            if there.at > until {
                break;
            }
            until = there.end().min(range.end());
        }
        until
    }

    /// Makes `range` of the window show `new`, which may be shorter than `range`, or nothing. Sends
    /// no message if the range shows that already.
    ///
    /// `most` is the largest number of maps. A change that adds no map is made even if the layout
    /// has more maps: the limit may have been lowered, and maps must still be removed, shortened
    /// and replaced. A removal out of the middle of a map adds a map. If that exceeds `most`, the
    /// removal is refused as a whole, so that no other part of the map is lost for the guest.
    ///
    /// # Errors
    /// See [`ShowError`]. Except after [`ShowError::Torn`], the layout is unchanged.
    pub fn show(
        &mut self,
        range: WindowRange,
        new: Option<&Piece>,
        mapper: &dyn Mapper,
        most: usize,
    ) -> Result<(), ShowError> {
        let new = new.filter(|piece| piece.bytes.0 > 0);
        let steps = self.plan(range, new);
        let maps = steps.iter().filter(|step| matches!(step, Step::Map(..))).count();
        let (now, then) = (self.maps.len(), self.maps.len() + 2 * maps - steps.len());
        if then > now.max(most) {
            return Err(ShowError::TooMany(most));
        }
        for (done, step) in steps.iter().enumerate() {
            if let Err(e) = self.take(step, mapper) {
                return Err(self.undo(steps.iter().take(done), e, mapper));
            }
        }
        Ok(())
    }

    /// Unmaps each part of a map that shows `file` from byte `end`, a multiple of the page size,
    /// on. It changes only what is mapped: the front-end refuses to map a file that has already
    /// shrunk behind its end.
    ///
    /// # Errors
    /// See [`show`](Self::show): the first error. The other maps are cut all the same.
    pub fn unmap_beyond(
        &mut self,
        file: &Arc<File>,
        end: FileOffset,
        mapper: &dyn Mapper,
        most: usize,
    ) -> Result<(), ShowError> {
        let of_file = self.maps.iter().filter(|(_, piece)| Arc::ptr_eq(&piece.file, file));
        let over: Vec<_> = of_file
            .filter_map(|(at, piece)| {
                let kept = WindowBytes(FileRange::between(piece.from, end).bytes);
                WindowRange::between(*at + kept, piece.range(*at).end())
            })
            .collect();
        // After an error the loop goes on: the other maps must be cut too.
        let mut result = Ok(());
        for range in over {
            result = result.and(self.show(range, None, mapper, most));
        }
        result
    }

    fn plan(&self, range: WindowRange, new: Option<&Piece>) -> Vec<Step> {
        if self.shows(range, new) {
            return Vec::new();
        }
        let unmap = |(there, piece): (WindowRange, &Piece)| Step::Unmap(there.at, piece.clone());
        let mut steps: Vec<_> = self.touching(range).map(unmap).collect();
        for (there, piece) in self.touching(range) {
            let kept = there.without(range);
            steps.extend(kept.map(|part| Step::Map(part.at, piece.part(there.at, part))));
        }
        // The new map is the last step, so a rollback never has to unmap it. A rollback that fails
        // leaves a gap, but never a map of bytes that are not granted.
        steps.extend(new.map(|piece| Step::Map(range.at, piece.clone())));
        steps
    }

    fn shows(&self, range: WindowRange, new: Option<&Piece>) -> bool {
        let mut there = self.touching(range);
        match (there.next(), there.next(), new) {
            (None, _, None) => true,
            (Some((there, piece)), None, Some(new)) => {
                // One map, which shows the same bytes of the same file, and ends where `new` ends
                // if `new` is shorter than `range`.
                let new_end = new.range(range.at).end();
                Arc::ptr_eq(&piece.file, &new.file)
                    && there.at <= range.at
                    && piece.from + (range.at - there.at) == new.from
                    && if new_end < range.end() {
                        there.end() == new_end
                    } else {
                        there.end() >= new_end
                    }
            }
            _ => false,
        }
    }

    fn take(&mut self, step: &Step, mapper: &dyn Mapper) -> Result<(), MapError> {
        match step {
            Step::Map(at, piece) => {
                mapper.map(*at, &piece.file, piece.from, piece.bytes)?;
                self.maps.insert(*at, piece.clone());
            }
            Step::Unmap(at, piece) => {
                mapper.unmap(*at, piece.bytes)?;
                self.maps.remove(at);
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
            // A map that an earlier step of the rollback could not unmap overlaps this one (Q4).
            let blocked = matches!(&back, Step::Map(at, piece)
                if self.touching(piece.range(*at)).next().is_some());
            if blocked || self.take(&back, mapper).is_err() {
                error!("a map or unmap can't be rolled back, the window has a gap: {back:?}");
                torn = true;
            }
        }
        if torn { ShowError::Torn(why) } else { ShowError::Refused(why) }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    const PAGE: u64 = 4096;

    /// A front-end that panics where QEMU would refuse (Q4, Q5).
    struct Strict {
        /// The maps: length in bytes by window offset.
        maps: Mutex<BTreeMap<u64, u64>>,
        /// Number of messages that it accepts before it refuses the rest.
        takes: Mutex<usize>,
        /// The window offset of a map whose unmap it refuses.
        keeps: Mutex<Option<u64>>,
    }

    impl Strict {
        fn new() -> Self {
            Self { maps: Mutex::default(), takes: Mutex::new(usize::MAX), keeps: Mutex::default() }
        }

        fn takes(&self) -> Result<(), MapError> {
            let mut left = self.takes.lock().unwrap();
            *left = left.checked_sub(1).ok_or(MapError::Refused)?;
            Ok(())
        }
    }

    impl Mapper for Strict {
        fn map(
            &self,
            at: WindowOffset,
            _: &File,
            _: FileOffset,
            bytes: WindowBytes,
        ) -> Result<(), MapError> {
            self.takes()?;
            let mut maps = self.maps.lock().unwrap();
            let overlaps =
                maps.iter().any(|(start, len)| *start < at.0 + bytes.0 && at.0 < start + len);
            assert!(!overlaps, "a map over a live one");
            maps.insert(at.0, bytes.0);
            Ok(())
        }

        fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
            self.takes()?;
            if *self.keeps.lock().unwrap() == Some(at.0) {
                return Err(MapError::Refused);
            }
            assert_eq!(self.maps.lock().unwrap().remove(&at.0), Some(bytes.0), "one whole map");
            Ok(())
        }
    }

    fn file() -> Arc<File> {
        Arc::new(File::open("/dev/null").unwrap())
    }

    fn piece(file: &Arc<File>, from: u64, pages: u64) -> Piece {
        let bytes = WindowBytes(pages * PAGE);
        Piece { file: file.clone(), from: FileOffset(from * PAGE), bytes }
    }

    fn range(at: u64, pages: u64) -> WindowRange {
        WindowRange::new(WindowOffset(at * PAGE), WindowBytes(pages * PAGE))
    }

    /// A change: name, first page and number of pages of the range, and number of pages of another
    /// file to show there. None unmaps the range.
    type Shape = (&'static str, u64, u64, Option<u64>);

    /// Changes of a layout with maps of 4 pages at pages 0, 4, 8, 12 and 20.
    const SHAPES: [Shape; 11] = [
        ("nothing there", 16, 4, None),
        ("a whole map", 4, 4, None),
        ("its front", 4, 2, None),
        ("its tail", 6, 2, None),
        ("out of its middle", 5, 2, None),
        ("two maps and a half", 4, 10, None),
        ("the halves of two", 2, 4, None),
        ("all of the window", 0, 32, None),
        ("another file in its place", 4, 4, Some(4)),
        ("another file over two", 4, 8, Some(8)),
        ("a new map", 24, 4, Some(4)),
    ];

    fn five(mapper: &Strict, shown: &Arc<File>) -> Layout {
        let mut layout = Layout::default();
        for at in [0, 4, 8, 12, 20] {
            let new = piece(shown, at, 4);
            layout.show(new.range(WindowOffset(at * PAGE)), Some(&new), mapper, 5).unwrap();
        }
        layout
    }

    /// The maps: window offset, offset in the file, length, in bytes.
    fn shown(layout: &Layout) -> Vec<(u64, u64, u64)> {
        layout.maps().map(|(at, piece)| (at.0, piece.from.0, piece.bytes.0)).collect()
    }

    /// Shows: a change that adds no map is made at any limit, also one below the number of maps. A
    /// change that adds a map is refused exactly if it would exceed the limit, and then changes
    /// nothing.
    #[test]
    fn only_what_adds_maps_is_refused() {
        let (old, other) = (file(), file());
        for most in 0..=8 {
            for (name, at, pages, new) in SHAPES {
                let mapper = Strict::new();
                let mut layout = five(&mapper, &old);
                let before = shown(&layout);
                let new = new.map(|pages| piece(&other, 100, pages));
                let done = layout.show(range(at, pages), new.as_ref(), &mapper, most);
                let adds = matches!(name, "out of its middle" | "a new map");
                if adds && most < 6 {
                    assert!(matches!(done, Err(ShowError::TooMany(_))), "{name}, {most}: {done:?}");
                    assert_eq!(shown(&layout), before, "{name}, {most}");
                } else {
                    done.unwrap_or_else(|e| panic!("{name}, at most {most}: {e}"));
                    assert!(layout.len() <= most.max(5), "{name}, {most}: {}", layout.len());
                }
                let there: Vec<_> = mapper.maps.lock().unwrap().clone().into_iter().collect();
                let known: Vec<_> = layout.maps().map(|(at, p)| (at.0, p.bytes.0)).collect();
                assert_eq!(there, known, "{name}, {most}");
            }
        }
    }

    /// Shows: at any limit, unmap_beyond() leaves no part of the file behind the given end mapped.
    #[test]
    fn a_clip_needs_no_room() {
        let old = file();
        for most in 0..=6 {
            for end in 0..=24 {
                let mapper = Strict::new();
                let mut layout = five(&mapper, &old);
                layout.unmap_beyond(&old, FileOffset(end * PAGE), &mapper, most).unwrap();
                for (_, from, bytes) in shown(&layout) {
                    assert!(from + bytes <= end * PAGE, "end {end}, at most {most}");
                }
            }
        }
    }

    /// Shows: if the front-end refuses one unmap, unmap_beyond() still cuts the other maps.
    #[test]
    fn a_clip_goes_on_behind_a_refusal() {
        let old = file();
        let mapper = Strict::new();
        let mut layout = five(&mapper, &old);
        *mapper.keeps.lock().unwrap() = Some(4 * PAGE);
        assert!(layout.unmap_beyond(&old, FileOffset(2 * PAGE), &mapper, 5).is_err());
        assert_eq!(shown(&layout), [(0, 0, 2 * PAGE), (4 * PAGE, 4 * PAGE, 4 * PAGE)]);
    }

    /// Shows: a change of a layout above the limit is rolled back if the front-end refuses any one
    /// of its messages.
    #[test]
    fn a_refusal_over_the_limit_changes_nothing() {
        let (old, other) = (file(), file());
        for (name, at, pages, new) in SHAPES {
            for takes in 0..8 {
                let mapper = Strict::new();
                let mut layout = five(&mapper, &old);
                let before = shown(&layout);
                *mapper.takes.lock().unwrap() = takes;
                let new = new.map(|pages| piece(&other, 100, pages));
                match layout.show(range(at, pages), new.as_ref(), &mapper, 2) {
                    Ok(()) | Err(ShowError::Torn(_)) => {}
                    Err(_) => assert_eq!(shown(&layout), before, "{name}, {takes} messages"),
                }
            }
        }
    }
}
