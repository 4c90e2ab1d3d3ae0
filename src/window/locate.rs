// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which regions of the front-end's memory table are maps of ours, and so where the window is.
//!
//! No message says where the guest sees the window. It is read off the memory table, in which QEMU
//! lists each map of a window (docs/front-ends.md Q3). But other devices' maps stand there, too:
//! another share of the same directory, or QEMU's own memory, may show the same piece of the same
//! file. A map of ours is a region that was not there before the map was requested, and is there
//! when it was made: in the last table before the ack or, as with QEMU, in the first one after it.
//! Only an unambiguous candidate is believed.
//!
//! virtio-pmem is the case of one map, at offset 0 of the window, which is looked for at any time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{FileOffset as Backing, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::telling::{Freshness, Telling};
use super::{FileOffset, WindowBytes, WindowOffset};
use crate::support::file_id::FileId;

/// Where the guest sees the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowLocation {
    /// The guest physical address of its first byte.
    pub(crate) gpa: u64,
    /// Its length.
    pub(crate) bytes: WindowBytes,
}

/// One map: where it is in the window, and what it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowMap {
    pub(crate) at: WindowOffset,
    pub(crate) id: FileId,
    pub(crate) from: FileOffset,
    pub(crate) bytes: WindowBytes,
}

impl WindowMap {
    fn piece(&self) -> Piece {
        (self.from, self.bytes)
    }
}

/// Which part of a file a map shows.
type Piece = (FileOffset, WindowBytes);

/// What became of a request for a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The front-end has made it.
    Made,
    /// It was not made.
    Failed,
}

/// A region that has the piece of a map that is looked for.
struct Candidate {
    start: u64,
    id: FileId,
    piece: Piece,
}

impl Candidate {
    fn may_be(&self, map: &WindowMap) -> bool {
        (self.id, self.piece) == (map.id, map.piece())
    }

    /// Where the window begins, if this is `map`.
    fn base(&self, map: &WindowMap) -> Option<u64> {
        self.start.checked_sub(map.at.0).filter(|_| self.may_be(map))
    }
}

/// What is looked for in a table.
pub(crate) struct Look(Vec<Piece>);

/// What was found in a table.
pub(crate) struct Found(Vec<Candidate>);

impl Look {
    /// Looks through a table: a system call for each region that may be a map of ours, so call it
    /// without a lock.
    pub(crate) fn through(&self, mem: &GuestMemoryMmap) -> Found {
        let pieces = &self.0;
        let candidate = |start: u64, backing: &Backing, bytes: u64| {
            let piece = (FileOffset(backing.start()), WindowBytes(bytes));
            let id = pieces.contains(&piece).then(|| FileId::of(backing.file()).ok()).flatten()?;
            Some(Candidate { start, id, piece })
        };
        let of_region = |region: &vm_memory::GuestRegionMmap| {
            candidate(region.start_addr().0, region.file_offset()?, region.len())
        };
        Found(mem.iter().filter_map(of_region).collect())
    }
}

/// A map that was requested while the base was not known.
struct Requested {
    map: WindowMap,
    made: bool,
    /// Where the window would begin, by each new region that might be this map.
    bases: Vec<u64>,
}

impl Requested {
    /// Where the window would begin, unless several regions might be this map.
    fn base(&self) -> Option<u64> {
        match self.bases[..] {
            [base] => Some(base),
            _ => None,
        }
    }
}

/// What memory tables and answers have said of the maps of one window.
pub(crate) struct MapLocator {
    window: WindowBytes,
    /// The window's only map, if it has but one. It is looked for even when the base is known.
    only: Option<WindowMap>,
    /// A map was made since the last reset.
    made: bool,
    /// A map was made before a reset, and was not removed since.
    made_before_reset: bool,
    /// A table has come since the last map was made.
    told: bool,
    telling: Telling,
    /// The last table does not hold any more, and no other one has come.
    outdated: bool,
    /// The guest physical address of the window, once it is known.
    base: Option<u64>,
    /// No table can change the base any more.
    settled: bool,
    /// Where the regions of the last table begin, in order.
    starts: Vec<u64>,
    /// Those of them that have the piece of a map.
    candidates: Vec<Candidate>,
    requested: BTreeMap<u64, Requested>,
}

impl MapLocator {
    /// Of a window of `window` bytes; `only` is its map, if it has but one.
    pub(crate) fn new(window: WindowBytes, only: Option<WindowMap>) -> Self {
        Self {
            window,
            only,
            made: false,
            made_before_reset: false,
            told: false,
            telling: Telling::default(),
            outdated: false,
            base: None,
            settled: false,
            starts: Vec::new(),
            candidates: Vec::new(),
            requested: BTreeMap::new(),
        }
    }

    /// The guest physical address of the window, once it is known.
    pub(crate) fn base(&self) -> Option<u64> {
        self.base
    }

    /// A map is about to be requested: a table may show it before the ack comes or after it.
    pub(crate) fn requested(&mut self, map: WindowMap) {
        if self.only == Some(map) {
            self.settled = false;
        }
        if !self.settled {
            self.requested.insert(map.at.0, Requested { map, made: false, bases: Vec::new() });
        }
    }

    /// The front-end has answered.
    pub(crate) fn answered(&mut self, at: WindowOffset, outcome: Outcome) {
        if outcome == Outcome::Made {
            if let Some(requested) = self.requested.get_mut(&at.0) {
                requested.made = true;
            }
            self.base = self.only_candidate().or(self.base);
            (self.made, self.told) = (true, false);
            return;
        }
        self.requested.remove(&at.0);
    }

    /// A map was removed.
    pub(crate) fn removed(&mut self, at: WindowOffset) {
        self.requested.remove(&at.0);
    }

    /// What a map that was made says. Where there are several candidates for it (another device has
    /// mapped the same piece meanwhile) none is believed: the next map will tell.
    fn only_candidate(&self) -> Option<u64> {
        self.requested.values().filter(|requested| requested.made).find_map(Requested::base)
    }

    /// What a table that comes is to be looked through for.
    pub(crate) fn look(&self) -> Look {
        let requested = self.requested.values().map(|requested| requested.map.piece());
        Look(requested.chain(self.only.map(|map| map.piece())).collect())
    }

    /// A new memory table. Returns the number of its regions that are not maps of ours, as far as
    /// that is known.
    pub(crate) fn table(&mut self, mem: &GuestMemoryMmap, Found(candidates): Found) -> usize {
        self.telling.came(mem);
        (self.outdated, self.told) = (false, true);
        let is_new = |it: &&Candidate| self.starts.binary_search(&it.start).is_err();
        for candidate in candidates.iter().filter(is_new) {
            for Requested { map, bases, .. } in self.requested.values_mut() {
                bases.extend(candidate.base(map));
            }
        }
        if !self.requested.is_empty() {
            self.find_base();
        }
        self.follow(&candidates);
        self.candidates = candidates;
        self.starts = mem.iter().map(|region| region.start_addr().0).collect();
        let is_ours = |start: &&u64| {
            let at = self.base.and_then(|base| start.checked_sub(base));
            at.is_some_and(|at| at < self.window.0)
        };
        self.starts.len() - self.starts.iter().filter(is_ours).count()
    }

    fn find_base(&mut self) {
        let is_ambiguous = |base: &u64| {
            self.requested.values().any(|it| it.bases.len() > 1 && it.bases.contains(base))
        };
        let found = self.only_candidate();
        self.base = found.or(self.base.filter(|base| !is_ambiguous(base)));
        self.settled = found.is_some();
        let settled = self.settled;
        self.requested.retain(|_, it| !settled && it.bases.len() < 2);
    }

    /// The guest may move the window while the only map is in it: the map has gone from where it
    /// was, and has come up elsewhere.
    fn follow(&mut self, candidates: &[Candidate]) {
        let Some(only) = self.only.filter(|_| self.made && self.requested.is_empty()) else {
            return;
        };
        let bases: Vec<_> = candidates.iter().filter_map(|it| it.base(&only)).collect();
        if self.base.is_some_and(|base| bases.contains(&base)) {
            return;
        }
        let was_there = |base: &u64| self.starts.binary_search(&(base + only.at.0)).is_ok();
        let new: Vec<_> = bases.into_iter().filter(|base| !was_there(base)).collect();
        if let [base] = new[..] {
            self.base = Some(base);
        }
    }

    /// Whether the only map, which was made since the last reset, is there behind a stop that no
    /// reset followed (Q10). Only a table that came since it was made, and still holds, says
    /// otherwise.
    pub(crate) fn outlives_stop(&self) -> bool {
        self.made && (self.outdated || !self.told || self.is_shown())
    }

    /// Whether a table that came since the last stop shows the only map.
    pub(crate) fn is_proved(&self) -> bool {
        self.telling.freshness == Freshness::WholeTables && self.is_shown()
    }

    /// Whether a map was made before a reset, which the front-end may have kept. The caller removes
    /// it: the next call says no.
    pub(crate) fn take_made_before_reset(&mut self) -> bool {
        std::mem::take(&mut self.made_before_reset)
    }

    /// Whether a table that still holds shows the only map where it was made.
    pub(crate) fn is_shown(&self) -> bool {
        let Some(only) = self.only.filter(|_| !self.outdated) else { return false };
        // Not answered yet, but in the table: it will be.
        let candidate = self.requested.get(&only.at.0).and_then(Requested::base);
        let base = candidate.or(self.base);
        base.is_some() && self.candidates.iter().any(|it| it.base(&only) == base)
    }

    /// The device was stopped. A whole table does not hold over a stop: a reset may follow, and
    /// would drop the maps without a word (Q10). Of differences, the next start brings those that a
    /// reset has made, or none (Q17).
    pub(crate) fn stopped(&mut self) {
        self.outdated |= self.telling.freshness == Freshness::WholeTables;
    }

    /// The driver has reset the device: the front-end has dropped all maps, and the guest may move
    /// the window (Q10).
    pub(crate) fn reset(&mut self) {
        self.base = None;
        self.made_before_reset |= std::mem::take(&mut self.made);
        self.settled = false;
        self.requested.clear();
    }
}

/// The base, for all requests that ask for it.
pub(crate) struct SharedBase(AtomicU64);

impl SharedBase {
    const UNKNOWN: u64 = u64::MAX;

    pub(crate) fn publish(&self, base: Option<u64>) {
        self.0.store(base.unwrap_or(Self::UNKNOWN), Ordering::Release);
    }

    pub(crate) fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|base| *base != Self::UNKNOWN)
    }
}

impl Default for SharedBase {
    fn default() -> Self {
        Self(AtomicU64::new(Self::UNKNOWN))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const BYTES: u64 = 2 << 20;
    const OURS: u64 = 1 << 32;
    /// Another device's window.
    const THEIRS: [u64; 2] = [OURS / 2, OURS * 2];

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * BYTES).unwrap();
        file
    }

    /// A table with regions of 2 MiB of `file`: where each lies, and which it shows.
    fn table(file: &File, regions: &[(u64, u64)]) -> GuestMemoryMmap {
        let mut regions = regions.to_vec();
        regions.sort_unstable();
        let region = |&(at, range): &(u64, u64)| {
            let backing = Backing::new(file.try_clone().unwrap(), range * BYTES);
            let region = MmapRegion::from_file(backing, BYTES as usize).unwrap();
            GuestRegionMmap::new(region, GuestAddress(at)).unwrap()
        };
        GuestMemoryMmap::from_regions(regions.iter().map(region).collect()).unwrap()
    }

    fn locator() -> MapLocator {
        MapLocator::new(WindowBytes(8 * BYTES), None)
    }

    /// Maps a range of `file` at its own place in the window, while these tables come.
    fn map(locator: &mut MapLocator, range: u64, file: &File, tables: &[&GuestMemoryMmap]) {
        let at = WindowOffset(range * BYTES);
        locator.requested(shown(range, file, at));
        for table in tables {
            tell(locator, table);
        }
        locator.answered(at, Outcome::Made);
    }

    fn shown(range: u64, file: &File, at: WindowOffset) -> WindowMap {
        let id = FileId::of(file).unwrap();
        WindowMap { at, id, from: FileOffset(range * BYTES), bytes: WindowBytes(BYTES) }
    }

    /// A table comes: the number of regions that are not ours.
    fn tell(locator: &mut MapLocator, table: &GuestMemoryMmap) -> usize {
        let found = locator.look().through(table);
        locator.table(table, found)
    }

    /// Where range 1 and range 2 come up.
    const FIRST: (u64, u64) = (OURS + BYTES, 1);
    const SECOND: (u64, u64) = (OURS + 2 * BYTES, 2);

    /// Shows: the base is where the map came up, less its place in the window, whether the table
    /// comes before the ack or after it; the regions of the window are told from others; a reset
    /// ends that.
    #[test]
    fn the_base_is_read_off_the_first_map() {
        let file = file();
        let (without, with) = (table(&file, &[(0, 0)]), table(&file, &[(0, 0), FIRST]));
        let mut early = locator();
        assert_eq!(tell(&mut early, &without), 1);
        map(&mut early, 1, &file, &[&with]);
        assert_eq!(early.base(), Some(OURS));
        let mut late = locator();
        tell(&mut late, &without);
        map(&mut late, 1, &file, &[]);
        assert_eq!(late.base(), None);
        for locator in [&mut early, &mut late] {
            assert_eq!((tell(locator, &with), locator.base()), (1, Some(OURS)));
            locator.reset();
            assert_eq!((tell(locator, &with), locator.base()), (2, None));
        }
    }

    /// Shows: another device that has mapped the same piece of the file, before us, at the same
    /// moment or later, does not make the base its own: buffers would be taken for those of another
    /// file.
    #[test]
    fn another_window_with_the_same_file_is_not_ours() {
        let file = file();
        for at in THEIRS {
            let theirs = (at, 1);
            let (ours, alone) = (table(&file, &[FIRST]), table(&file, &[theirs]));
            let both = table(&file, &[theirs, FIRST]);
            let all = table(&file, &[theirs, FIRST, SECOND]);

            let (mut early, mut late) = (locator(), locator());
            tell(&mut early, &alone);
            map(&mut early, 1, &file, &[&both]);
            tell(&mut late, &alone);
            map(&mut late, 1, &file, &[]);
            tell(&mut late, &both);
            assert_eq!((early.base(), late.base()), (Some(OURS), Some(OURS)), "before us");

            let (mut early, mut late) = (locator(), locator());
            map(&mut early, 1, &file, &[&alone, &both]);
            map(&mut late, 1, &file, &[&alone]);
            tell(&mut late, &both);
            assert_eq!((early.base(), late.base()), (None, None), "one of two, nobody knows which");
            map(&mut early, 2, &file, &[&all]);
            map(&mut late, 2, &file, &[]);
            tell(&mut late, &all);
            assert_eq!((early.base(), late.base()), (Some(OURS), Some(OURS)), "the next map tells");

            let mut later = locator();
            map(&mut later, 1, &file, &[]);
            tell(&mut later, &ours);
            tell(&mut later, &both);
            assert_eq!(later.base(), Some(OURS), "later");
        }
    }

    /// Shows: a map that was refused or removed, and regions that are another piece or another
    /// file, say nothing.
    #[test]
    fn what_is_no_map_of_ours_says_nothing() {
        let (file, mut locator) = (file(), locator());
        map(&mut locator, 1, &self::file(), &[]);
        tell(&mut locator, &table(&file, &[FIRST]));
        map(&mut locator, 2, &file, &[]);
        tell(&mut locator, &table(&file, &[FIRST, (OURS + 2 * BYTES, 3)]));
        locator.requested(shown(0, &file, WindowOffset(0)));
        locator.answered(WindowOffset(0), Outcome::Failed);
        map(&mut locator, 4, &file, &[]);
        locator.removed(WindowOffset(4 * BYTES));
        tell(&mut locator, &table(&file, &[(OURS * 2, 0), (OURS * 3, 4)]));
        assert_eq!(locator.base(), None);
    }
}
