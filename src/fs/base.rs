// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the window is in the guest's memory. No message says it: it is read off the memory table, in which
//! QEMU lists each of our maps (row Q3 of our notes). But other devices' maps stand there, too, and a share
//! of the same directory may have mapped the same piece of the same file. Ours is what was not there before
//! the map was asked for, and is there when it has been made: with CONFIGURE_MEM_SLOTS the table comes before
//! the ack, without it a little later.

use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, StatxFlags, statx};
use vm_memory::{
    FileOffset as Backing, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::window::{FileOffset, WindowBytes, WindowOffset};

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
pub(super) struct Base {
    /// The length of the window.
    window: WindowBytes,
    /// It, once it is known.
    pub(super) found: Option<u64>,
    /// Where the regions of the last table begin, in order.
    starts: Vec<u64>,
    asked: BTreeMap<u64, Asked>,
}

impl Base {
    pub(super) fn new(window: WindowBytes) -> Self {
        Self { window, found: None, starts: Vec::new(), asked: BTreeMap::new() }
    }

    /// A map is about to be asked for.
    pub(super) fn asked_for(
        &mut self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) {
        if self.found.is_none()
            && let Some(inode) = inode_of(file)
        {
            self.asked.insert(at.0, Asked { made: false, inode, from, bytes, bases: Vec::new() });
        }
    }

    /// The front-end has answered: whether the map was made.
    pub(super) fn answered(&mut self, at: WindowOffset, made: bool) {
        if let Some(asked) = self.asked.get_mut(&at.0).filter(|_| made) {
            asked.made = true;
            self.decide();
        } else {
            self.asked.remove(&at.0);
        }
    }

    /// A map was removed.
    pub(super) fn removed(&mut self, at: WindowOffset) {
        self.asked.remove(&at.0);
    }

    /// Takes the base from a map that was made. Of several candidates (another device has mapped the same piece
    /// meanwhile) none is believed: the next map will tell.
    fn decide(&mut self) {
        self.found = self.asked.values().find_map(|asked| match asked.bases[..] {
            [base] if asked.made => Some(base),
            _ => None,
        });
        if self.found.is_some() {
            self.asked.clear();
        }
        self.asked.retain(|_, asked| asked.bases.len() < 2);
    }

    /// Reads a new memory table. How many of its regions are not ours, as far as that is known.
    pub(super) fn table_came(&mut self, mem: &GuestMemoryMmap) -> usize {
        let starts: Vec<_> = mem.iter().map(|region| region.start_addr().0).collect();
        if self.found.is_none() && !self.asked.is_empty() {
            let is_new = |region: &&GuestRegionMmap| {
                self.starts.binary_search(&region.start_addr().0).is_err()
            };
            for region in mem.iter().filter(is_new) {
                let Some(backing) = region.file_offset() else { continue };
                for (at, asked) in &mut self.asked {
                    let base = region.start_addr().0.checked_sub(*at);
                    asked.bases.extend(base.filter(|_| asked.may_be(region, backing)));
                }
            }
            self.decide();
        }
        self.starts = starts;
        let is_ours = |start: &&u64| {
            let at = self.found.and_then(|base| start.checked_sub(base));
            at.is_some_and(|at| at < self.window.0)
        };
        self.starts.len() - self.starts.iter().filter(is_ours).count()
    }

    /// The front-end has dropped all maps, and the guest may move the window (Q10).
    pub(super) fn forget(&mut self) {
        self.found = None;
        self.asked.clear();
    }
}

/// The base, for all who ask for it with each request.
pub(super) struct Place(AtomicU64);

impl Place {
    const UNKNOWN: u64 = u64::MAX;

    pub(super) fn publish(&self, base: Option<u64>) {
        self.0.store(base.unwrap_or(Self::UNKNOWN), Ordering::Release);
    }

    pub(super) fn base(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Acquire)).filter(|base| *base != Self::UNKNOWN)
    }
}

impl Default for Place {
    fn default() -> Self {
        Self(AtomicU64::new(Self::UNKNOWN))
    }
}

/// Device (major and minor) and number.
type Inode = (u32, u32, u64);

/// Nothing else is asked for: more would be a request to the server of a stretched file.
fn inode_of(file: &File) -> Option<Inode> {
    let found = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::INO).ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor, found.stx_ino))
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
        file.set_len(4 * BYTES).unwrap();
        file
    }

    /// A table with the first 2 MiB of `file` at each of these places.
    fn table(file: &File, places: &[u64]) -> GuestMemoryMmap {
        let mut places = places.to_vec();
        places.sort_unstable();
        let region = |&at: &u64| {
            let backing = Backing::new(file.try_clone().unwrap(), 0);
            let region = MmapRegion::from_file(backing, BYTES as usize).unwrap();
            GuestRegionMmap::new(region, GuestAddress(at)).unwrap()
        };
        GuestMemoryMmap::from_regions(places.iter().map(region).collect()).unwrap()
    }

    fn base() -> Base {
        Base::new(WindowBytes(8 * BYTES))
    }

    /// Maps the first 2 MiB of `file` at `at`, while these tables come.
    fn map(base: &mut Base, at: u64, file: &File, tables: &[&GuestMemoryMmap]) {
        base.asked_for(WindowOffset(at), file, FileOffset(0), WindowBytes(BYTES));
        for table in tables {
            base.table_came(table);
        }
        base.answered(WindowOffset(at), true);
    }

    /// Shows: the base is where the map came up, less its place in the window; the regions of the window are
    /// told from others; a reset ends that.
    #[test]
    fn the_base_is_read_off_the_first_map() {
        let (file, mut base) = (file(), base());
        let with_ours = table(&file, &[0, OURS + BYTES]);
        assert_eq!(base.table_came(&table(&file, &[0])), 1);
        map(&mut base, BYTES, &file, &[&with_ours]);
        assert_eq!(base.found, Some(OURS));
        assert_eq!(base.table_came(&with_ours), 1);
        base.forget();
        assert_eq!((base.found, base.table_came(&with_ours)), (None, 2));
    }

    /// Shows: another device that has mapped the same piece of the file, before us, at the same moment or
    /// later, does not make the base its own: buffers would be taken for those of another file.
    #[test]
    fn another_window_with_the_same_file_is_not_ours() {
        let file = file();
        for theirs in THEIRS {
            let (alone, both) = (table(&file, &[theirs]), table(&file, &[theirs, OURS + BYTES]));
            let mut before = base();
            before.table_came(&alone);
            map(&mut before, BYTES, &file, &[&both]);
            assert_eq!(before.found, Some(OURS), "before us");

            let mut meanwhile = base();
            map(&mut meanwhile, BYTES, &file, &[&alone, &both]);
            assert_eq!(meanwhile.found, None, "one of two, nobody knows which");
            map(&mut meanwhile, 0, &file, &[&table(&file, &[theirs, OURS, OURS + BYTES])]);
            assert_eq!(meanwhile.found, Some(OURS), "the next map tells");

            let mut without_slots = base();
            without_slots.table_came(&alone);
            map(&mut without_slots, BYTES, &file, &[]);
            assert_eq!(without_slots.found, None);
            without_slots.table_came(&both);
            assert_eq!(without_slots.found, Some(OURS), "a table that comes after the ack");

            let mut later = base();
            map(&mut later, BYTES, &file, &[&table(&file, &[OURS + BYTES])]);
            map(&mut later, 0, &file, &[&both]);
            assert_eq!(later.found, Some(OURS), "later");
        }
    }

    /// Shows: a map that was refused or removed, and regions that are another piece or another file, say nothing.
    #[test]
    fn what_is_no_map_of_ours_says_nothing() {
        let (file, mut base) = (file(), base());
        map(&mut base, 0, &file, &[&table(&self::file(), &[OURS])]);
        base.asked_for(WindowOffset(0), &file, FileOffset(BYTES), WindowBytes(BYTES));
        base.table_came(&table(&file, &[OURS * 2]));
        base.answered(WindowOffset(0), true);
        base.asked_for(WindowOffset(0), &file, FileOffset(0), WindowBytes(BYTES));
        base.table_came(&table(&file, &[OURS * 4]));
        base.answered(WindowOffset(0), false);
        map(&mut base, 0, &file, &[]);
        base.removed(WindowOffset(0));
        base.table_came(&table(&file, &[OURS]));
        assert_eq!(base.found, None);
    }
}
