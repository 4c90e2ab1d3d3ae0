// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finds this device's maps in the front-end's memory table, and from them the guest physical
//! address of the window, the *base*.
//!
//! No vhost-user message contains the base. It is derived from the memory table, in which QEMU
//! lists each map of a window as a region (docs/front-ends.md Q3). The table also lists maps of
//! other devices and QEMU's own memory, which may show the same piece of the same file. A map of
//! this device is a region that was not in the table before the map was requested, and is in it
//! once the map was made: in the last table before the ack or, as with QEMU, in the first table
//! after it. If several regions qualify, none is taken for the map.
//!
//! virtio-pmem has only one map, at offset 0 of the window. It is looked for in each table.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{FileOffset as Backing, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::freshness::{Freshness, TableHistory};
use super::{FileOffset, WindowBytes, WindowOffset};
use crate::support::file_id::FileId;

/// The place of the window in the guest's physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowLocation {
    /// The guest physical address of its first byte.
    pub(crate) gpa: u64,
    /// Its length in bytes.
    pub(crate) bytes: WindowBytes,
}

/// One map of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowMap {
    /// Its first byte in the window.
    pub(crate) at: WindowOffset,
    /// The file that it shows.
    pub(crate) id: FileId,
    /// The first byte of the file that it shows.
    pub(crate) from: FileOffset,
    /// Its length in bytes.
    pub(crate) bytes: WindowBytes,
}

impl WindowMap {
    fn piece(&self) -> Piece {
        (self.from, self.bytes)
    }
}

/// The part of a file that a map shows: offset in the file and length.
type Piece = (FileOffset, WindowBytes);

/// The result of a request for a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The front-end has made the map.
    Made,
    /// The map was not made.
    Failed,
}

/// A region of a memory table that shows the piece of a map that is looked for.
struct Candidate {
    /// The guest physical address of its first byte.
    start: u64,
    id: FileId,
    piece: Piece,
}

impl Candidate {
    fn may_be(&self, map: &WindowMap) -> bool {
        (self.id, self.piece) == (map.id, map.piece())
    }

    /// The base of the window if this region is `map`. None if it can't be `map`.
    fn base(&self, map: &WindowMap) -> Option<u64> {
        self.start.checked_sub(map.at.0).filter(|_| self.may_be(map))
    }
}

/// The pieces to look for in a memory table.
pub(crate) struct Look(Vec<Piece>);

/// The regions of a memory table that show one of the pieces.
pub(crate) struct Found(Vec<Candidate>);

impl Look {
    /// Searches a table. Makes an fstat(2) for each region with one of the pieces, so call it
    /// without a lock held.
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
    /// The front-end has made the map.
    made: bool,
    /// For each new region that may be this map, the base of the window that follows.
    bases: Vec<u64>,
}

impl Requested {
    /// The base of the window, if exactly one region may be this map.
    fn base(&self) -> Option<u64> {
        match self.bases[..] {
            [base] => Some(base),
            _ => None,
        }
    }
}

/// Tracks the maps of one window by requests, acks and memory tables.
pub(crate) struct MapLocator {
    window: WindowBytes,
    /// The only map of virtio-pmem's window. It is looked for even when the base is known. None for
    /// a window with many maps.
    only: Option<WindowMap>,
    /// A map was made since the last reset.
    made: bool,
    /// A map was made before a reset, and was not removed since.
    made_before_reset: bool,
    /// A table has come since the last map was made.
    table_since_map: bool,
    history: TableHistory,
    /// A stop has made the last table invalid, and no table has come since.
    outdated: bool,
    /// The guest physical address of the window, once it is known.
    base: Option<u64>,
    /// The base was found from a made map. Later requests are not used to find it again.
    settled: bool,
    /// The guest physical addresses of the regions of the last table, in ascending order.
    starts: Vec<u64>,
    /// The regions of the last table that show the piece of a map.
    candidates: Vec<Candidate>,
    /// The requested maps by window offset, until the base is found.
    requested: BTreeMap<u64, Requested>,
}

impl MapLocator {
    /// A locator for a window of `window` bytes. `only` is the window's map if it has one map only.
    pub(crate) fn new(window: WindowBytes, only: Option<WindowMap>) -> Self {
        Self {
            window,
            only,
            made: false,
            made_before_reset: false,
            table_since_map: false,
            history: TableHistory::default(),
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

    /// Notes that a map is about to be sent. Call it before the map is sent: a table may show the
    /// map before its ack.
    pub(crate) fn requested(&mut self, map: WindowMap) {
        if self.only == Some(map) {
            self.settled = false;
        }
        if !self.settled {
            self.requested.insert(map.at.0, Requested { map, made: false, bases: Vec::new() });
        }
    }

    /// Notes the result of the map at `at`.
    pub(crate) fn answered(&mut self, at: WindowOffset, outcome: Outcome) {
        if outcome == Outcome::Made {
            if let Some(requested) = self.requested.get_mut(&at.0) {
                requested.made = true;
            }
            self.base = self.only_candidate().or(self.base);
            (self.made, self.table_since_map) = (true, false);
            return;
        }
        self.requested.remove(&at.0);
    }

    /// Notes that the map at `at` was removed.
    pub(crate) fn removed(&mut self, at: WindowOffset) {
        self.requested.remove(&at.0);
    }

    /// The base by a made map that has exactly one candidate. A map with several candidates
    /// (another device has mapped the same piece meanwhile) proves nothing: a later map will.
    fn only_candidate(&self) -> Option<u64> {
        self.requested.values().filter(|requested| requested.made).find_map(Requested::base)
    }

    /// The pieces to look for in the next table.
    pub(crate) fn look(&self) -> Look {
        let requested = self.requested.values().map(|requested| requested.map.piece());
        Look(requested.chain(self.only.map(|map| map.piece())).collect())
    }

    /// Takes a new memory table into account; `candidates` is the result of [`Look::through`].
    /// Returns the number of its regions outside the window, or of all regions while the base is
    /// not known.
    pub(crate) fn table(&mut self, mem: &GuestMemoryMmap, Found(candidates): Found) -> usize {
        self.history.table(mem);
        (self.outdated, self.table_since_map) = (false, true);
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

    /// Updates the base if the guest has moved the window: the only map is no longer at its old
    /// address, and exactly one new region shows its piece.
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

    /// Whether the only map exists after a stop that no reset followed (docs/front-ends.md Q10): it
    /// was made since the last reset, and no valid table that came since lacks it.
    pub(crate) fn outlives_stop(&self) -> bool {
        self.made && (self.outdated || !self.table_since_map || self.is_shown())
    }

    /// Whether a whole table that came since the last stop shows the only map.
    pub(crate) fn is_proved(&self) -> bool {
        self.history.freshness == Freshness::WholeTables && self.is_shown()
    }

    /// Whether a map was made before a reset, which the front-end may have kept. The caller must
    /// then remove it; the next call returns false.
    pub(crate) fn take_made_before_reset(&mut self) -> bool {
        std::mem::take(&mut self.made_before_reset)
    }

    /// Whether the last table is valid and shows the only map at its address in the window.
    pub(crate) fn is_shown(&self) -> bool {
        let Some(only) = self.only.filter(|_| !self.outdated) else { return false };
        // The map may be in the table before its ack has come.
        let candidate = self.requested.get(&only.at.0).and_then(Requested::base);
        let base = candidate.or(self.base);
        base.is_some() && self.candidates.iter().any(|it| it.base(&only) == base)
    }

    /// Notes that the device was stopped. A whole table is invalid after a stop, since a reset may
    /// follow and drop the maps without a message (docs/front-ends.md Q10). Differences stay valid:
    /// the next start brings the differences that a reset has made (Q17).
    pub(crate) fn stopped(&mut self) {
        self.outdated |= self.history.freshness == Freshness::WholeTables;
    }

    /// Notes that the driver has reset the device: the front-end has dropped all maps, and the
    /// guest may move the window (docs/front-ends.md Q10).
    pub(crate) fn reset(&mut self) {
        self.base = None;
        self.made_before_reset |= std::mem::take(&mut self.made);
        self.settled = false;
        self.requested.clear();
    }
}

/// The base of the window, shared by the threads of all requests.
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
    /// Two addresses of another device's map.
    const THEIRS: [u64; 2] = [OURS / 2, OURS * 2];

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8 * BYTES).unwrap();
        file
    }

    /// A table with regions of 2 MiB of `file`: guest physical address, and number of the 2 MiB
    /// range that the region shows.
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

    /// Requests a map of range `range` of `file` at the same range of the window, delivers
    /// `tables`, and acks the map.
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

    /// Delivers a table. Returns the number of regions outside the window.
    fn tell(locator: &mut MapLocator, table: &GuestMemoryMmap) -> usize {
        let found = locator.look().through(table);
        locator.table(table, found)
    }

    /// The regions of range 1 and range 2 in the window: address and range.
    const FIRST: (u64, u64) = (OURS + BYTES, 1);
    const SECOND: (u64, u64) = (OURS + 2 * BYTES, 2);

    /// Shows: the base is the map's address minus its window offset, whether the table comes before
    /// the ack or after it; regions in the window are distinguished from others; after a reset the
    /// base is unknown.
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

    /// Shows: another device's map of the same piece, made earlier, at the same time or later, does
    /// not lead to a wrong base. With a wrong base, buffers of a request would be taken for bytes
    /// of another file.
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
            assert_eq!((early.base(), late.base()), (Some(OURS), Some(OURS)), "made earlier");

            let (mut early, mut late) = (locator(), locator());
            map(&mut early, 1, &file, &[&alone, &both]);
            map(&mut late, 1, &file, &[&alone]);
            tell(&mut late, &both);
            assert_eq!((early.base(), late.base()), (None, None), "two candidates");
            map(&mut early, 2, &file, &[&all]);
            map(&mut late, 2, &file, &[]);
            tell(&mut late, &all);
            assert_eq!((early.base(), late.base()), (Some(OURS), Some(OURS)), "by the next map");

            let mut later = locator();
            map(&mut later, 1, &file, &[]);
            tell(&mut later, &ours);
            tell(&mut later, &both);
            assert_eq!(later.base(), Some(OURS), "made later");
        }
    }

    /// Shows: no base follows from a refused or removed map, or from a region of another piece or
    /// another file.
    #[test]
    fn no_base_without_a_map_of_this_device() {
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
