// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the front-end tells of its memory, and so for how long that holds.
//!
//! The library does not say what was negotiated, but it keeps what is told piece by piece: each
//! region that a message did not add is in the next table too, mapped where it was. A whole table's
//! regions are all mapped anew, while the old ones still are (vhost-user-backend 0.24,
//! `set_mem_table`).

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// For how long a memory table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Freshness {
    /// Until the device is stopped: each start brings a whole table.
    #[default]
    WholeTables,
    /// Until something else is said, over stops too (CONFIGURE_MEM_SLOTS): a start brings only what
    /// has changed meanwhile (Q17).
    Deltas,
}

/// What has been told.
#[derive(Default)]
pub(super) struct Telling {
    pub(super) freshness: Freshness,
    /// Where the regions of the last table are mapped in this process.
    addresses: Vec<usize>,
}

impl Telling {
    /// A table has come.
    pub(super) fn came(&mut self, mem: &GuestMemoryMmap) {
        let addresses: Vec<_> = mem.iter().map(|region| region.as_ptr().addr()).collect();
        if self.addresses.iter().any(|address| addresses.contains(address)) {
            self.freshness = Freshness::Deltas;
        } else if !self.addresses.is_empty() && !addresses.is_empty() {
            self.freshness = Freshness::WholeTables;
        }
        // An empty table, and what follows one, can be either: it is as it was.
        self.addresses = addresses;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const BYTES: u64 = 4096;

    fn region(at: u64) -> GuestRegionMmap {
        let region = MmapRegion::new(BYTES as usize).unwrap();
        GuestRegionMmap::new(region, GuestAddress(at)).unwrap()
    }

    fn whole(regions: u64) -> GuestMemoryMmap {
        let regions = (0..regions).map(|i| region(i * BYTES)).collect();
        GuestMemoryMmap::from_regions(regions).unwrap()
    }

    fn plus(mem: &GuestMemoryMmap, at: u64) -> GuestMemoryMmap {
        mem.insert_region(Arc::new(region(at))).unwrap()
    }

    fn less(mem: &GuestMemoryMmap, at: u64) -> GuestMemoryMmap {
        mem.remove_region(GuestAddress(at), BYTES).unwrap().0
    }

    /// Shows: whole tables are told from differences, whatever the regions are and however often it
    /// changes.
    #[test]
    fn differences_are_told_from_whole_tables() {
        use Freshness::{Deltas, WholeTables};
        let mut telling = Telling::default();
        let mut tell = |mem: &GuestMemoryMmap| {
            telling.came(mem);
            telling.freshness
        };
        assert_eq!(tell(&GuestMemoryMmap::new()), WholeTables, "until it is known");
        let one = whole(1);
        assert_eq!(tell(&one), WholeTables, "it may be a first difference, too");
        let two = plus(&one, BYTES);
        assert_eq!(tell(&two), Deltas);
        let other = less(&two, 0);
        assert_eq!(tell(&other), Deltas);
        assert_eq!(tell(&less(&other, BYTES)), Deltas, "nothing is left to tell by");
        // A table is mapped until the next one is: as the library has it.
        let single = whole(1);
        assert_eq!(tell(&single), Deltas);
        let old = whole(3);
        assert_eq!(tell(&old), WholeTables);
        let new = whole(3);
        assert_eq!(tell(&new), WholeTables);
        assert_eq!(tell(&new), Deltas, "nothing has changed");
    }
}
