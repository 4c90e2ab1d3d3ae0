// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the window is in the guest's memory. No message says it: it is read off the memory table, in which
//! QEMU lists each of our maps (row Q3 of our notes). But other devices' maps stand there, too, and a share
//! of the same directory may have mapped the same piece of the same file. Ours is what was not there before
//! the map was asked for, and is there when it has been made: in the last table before the ack, or, as with
//! QEMU, in the first one after it.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{
    FileOffset as Backing, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::window::{FileOffset, Inode, WindowBytes, WindowOffset, inode_of};

/// A map that the front-end was asked for, or has made, while the base was not known.
struct Asked {
    made: bool,
    inode: Inode,
    from: FileOffset,
    bytes: WindowBytes,
    /// Where the window would begin, by each new region that might be this map.
    bases: Vec<u64>,
}

impl Asked {
    fn may_be(&self, region: &GuestRegionMmap, backing: &Backing) -> bool {
        (backing.start(), region.len()) == (self.from.0, self.bytes.0)
            && inode_of(backing.file()) == Some(self.inode)
    }
}

/// The window's guest physical address, and what is known on the way to it.
pub(crate) struct Base {
    /// The length of the window.
    window: WindowBytes,
    /// It, once it is known.
    pub(crate) found: Option<u64>,
    /// No table can change that any more.
    settled: bool,
    /// Where the regions of the last table begin, in order.
    starts: Vec<u64>,
    asked: BTreeMap<u64, Asked>,
}

impl Base {
    pub(crate) fn new(window: WindowBytes) -> Self {
        let (starts, asked) = (Vec::new(), BTreeMap::new());
        Self { window, found: None, settled: false, starts, asked }
    }

    /// A map is about to be asked for.
    pub(crate) fn asked_for(
        &mut self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) {
        if !self.settled
            && let Some(inode) = inode_of(file)
        {
            self.asked.insert(at.0, Asked { made: false, inode, from, bytes, bases: Vec::new() });
        }
    }

    /// The front-end has answered: whether the map was made.
    pub(crate) fn answered(&mut self, at: WindowOffset, made: bool) {
        match self.asked.get_mut(&at.0) {
            Some(asked) if made => {
                asked.made = true;
                self.found = self.found.or(self.only_candidate());
            }
            _ => self.removed(at),
        }
    }

    /// A map was removed.
    pub(crate) fn removed(&mut self, at: WindowOffset) {
        self.asked.remove(&at.0);
    }

    /// What a map that was made says. Where there are several candidates for it (another device has mapped the
    /// same piece meanwhile) none is believed: the next map will tell.
    fn only_candidate(&self) -> Option<u64> {
        self.asked.values().find_map(|asked| match asked.bases[..] {
            [base] if asked.made => Some(base),
            _ => None,
        })
    }

    /// Reads a new memory table. How many of its regions are not ours, as far as that is known.
    pub(crate) fn table_came(&mut self, mem: &GuestMemoryMmap) -> usize {
        if !self.asked.is_empty() {
            self.look_for_maps(mem);
            self.found = self.only_candidate();
            self.settled = self.found.is_some();
            self.asked.retain(|_, asked| !self.settled && asked.bases.len() < 2);
        }
        self.starts = mem.iter().map(|region| region.start_addr().0).collect();
        let is_ours = |start: &&u64| {
            let at = self.found.and_then(|base| start.checked_sub(base));
            at.is_some_and(|at| at < self.window.0)
        };
        self.starts.len() - self.starts.iter().filter(is_ours).count()
    }

    fn look_for_maps(&mut self, mem: &GuestMemoryMmap) {
        let is_new =
            |region: &&GuestRegionMmap| self.starts.binary_search(&region.start_addr().0).is_err();
        for region in mem.iter().filter(is_new) {
            let Some(backing) = region.file_offset() else { continue };
            for (at, asked) in &mut self.asked {
                let base = region.start_addr().0.checked_sub(*at);
                asked.bases.extend(base.filter(|_| asked.may_be(region, backing)));
            }
        }
    }

    /// The front-end has dropped all maps, and the guest may move the window (Q10).
    pub(crate) fn forget(&mut self) {
        self.found = None;
        self.settled = false;
        self.asked.clear();
    }
}

/// The base, for all who ask for it with each request.
pub(crate) struct Place(AtomicU64);

impl Place {
    const UNKNOWN: u64 = u64::MAX;

    pub(crate) fn publish(&self, base: Option<u64>) {
        self.0.store(base.unwrap_or(Self::UNKNOWN), Ordering::Release);
    }

    pub(crate) fn base(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|base| *base != Self::UNKNOWN)
    }
}

impl Default for Place {
    fn default() -> Self {
        Self(AtomicU64::new(Self::UNKNOWN))
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, MmapRegion};

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

    fn base() -> Base {
        Base::new(WindowBytes(8 * BYTES))
    }

    /// Maps a range of `file` at its own place in the window, while these tables come.
    fn map(base: &mut Base, range: u64, file: &File, tables: &[&GuestMemoryMmap]) {
        let at = WindowOffset(range * BYTES);
        base.asked_for(at, file, FileOffset(range * BYTES), WindowBytes(BYTES));
        for table in tables {
            base.table_came(table);
        }
        base.answered(at, true);
    }

    /// Where range 1 and range 2 come up.
    const FIRST: (u64, u64) = (OURS + BYTES, 1);
    const SECOND: (u64, u64) = (OURS + 2 * BYTES, 2);

    /// Shows: the base is where the map came up, less its place in the window, whether the table comes before the
    /// ack or after it; the regions of the window are told from others; a reset ends that.
    #[test]
    fn the_base_is_read_off_the_first_map() {
        let file = file();
        let (without, with) = (table(&file, &[(0, 0)]), table(&file, &[(0, 0), FIRST]));
        let mut early = base();
        assert_eq!(early.table_came(&without), 1);
        map(&mut early, 1, &file, &[&with]);
        assert_eq!(early.found, Some(OURS));
        let mut late = base();
        late.table_came(&without);
        map(&mut late, 1, &file, &[]);
        assert_eq!(late.found, None);
        for base in [&mut early, &mut late] {
            assert_eq!((base.table_came(&with), base.found), (1, Some(OURS)));
            base.forget();
            assert_eq!((base.table_came(&with), base.found), (2, None));
        }
    }

    /// Shows: another device that has mapped the same piece of the file, before us, at the same moment or
    /// later, does not make the base its own: buffers would be taken for those of another file.
    #[test]
    fn another_window_with_the_same_file_is_not_ours() {
        let file = file();
        for at in THEIRS {
            let theirs = (at, 1);
            let (ours, alone) = (table(&file, &[FIRST]), table(&file, &[theirs]));
            let both = table(&file, &[theirs, FIRST]);
            let all = table(&file, &[theirs, FIRST, SECOND]);

            let (mut early, mut late) = (base(), base());
            early.table_came(&alone);
            map(&mut early, 1, &file, &[&both]);
            late.table_came(&alone);
            map(&mut late, 1, &file, &[]);
            late.table_came(&both);
            assert_eq!((early.found, late.found), (Some(OURS), Some(OURS)), "before us");

            let (mut early, mut late) = (base(), base());
            map(&mut early, 1, &file, &[&alone, &both]);
            map(&mut late, 1, &file, &[&alone]);
            late.table_came(&both);
            assert_eq!((early.found, late.found), (None, None), "one of two, nobody knows which");
            map(&mut early, 2, &file, &[&all]);
            map(&mut late, 2, &file, &[]);
            late.table_came(&all);
            assert_eq!((early.found, late.found), (Some(OURS), Some(OURS)), "the next map tells");

            let mut later = base();
            map(&mut later, 1, &file, &[]);
            later.table_came(&ours);
            later.table_came(&both);
            assert_eq!(later.found, Some(OURS), "later");
        }
    }

    /// Shows: a map that was refused or removed, and regions that are another piece or another file, say nothing.
    #[test]
    fn what_is_no_map_of_ours_says_nothing() {
        let (file, mut base) = (file(), base());
        map(&mut base, 1, &self::file(), &[]);
        base.table_came(&table(&file, &[FIRST]));
        map(&mut base, 2, &file, &[]);
        base.table_came(&table(&file, &[FIRST, (OURS + 2 * BYTES, 3)]));
        base.asked_for(WindowOffset(0), &file, FileOffset(0), WindowBytes(BYTES));
        base.answered(WindowOffset(0), false);
        map(&mut base, 4, &file, &[]);
        base.removed(WindowOffset(4 * BYTES));
        base.table_came(&table(&file, &[(OURS * 2, 0), (OURS * 3, 4)]));
        assert_eq!(base.found, None);
    }
}
