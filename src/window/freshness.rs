// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the front-end sends its memory table: whole (SET_MEM_TABLE) or as differences (ADD_MEM_REG,
//! REM_MEM_REG). This decides for how long a table holds.
//!
//! The vhost-user-backend library does not report whether CONFIGURE_MEM_SLOTS was negotiated. It is
//! derived from the addresses at which the library maps the regions. After a difference, the other
//! regions of the table are mapped at the same addresses as before. After a whole table, all
//! regions have new addresses, since the library maps the new regions before it unmaps the old ones
//! (vhost-user-backend 0.24, `set_mem_table`).

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// For how long a memory table holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Freshness {
    /// Until the device is stopped: the front-end sends a whole table at each start.
    #[default]
    WholeTables,
    /// Until the next difference, across stops too (CONFIGURE_MEM_SLOTS): at a start the front-end
    /// sends only the differences since the stop (docs/front-ends.md Q17).
    Deltas,
}

/// What is known from the memory tables so far.
#[derive(Default)]
pub(super) struct TableHistory {
    pub(super) freshness: Freshness,
    /// The addresses at which the regions of the last table are mapped in this process.
    addresses: Vec<usize>,
}

impl TableHistory {
    /// Takes a new table into account.
    pub(super) fn table(&mut self, mem: &GuestMemoryMmap) {
        let addresses: Vec<_> = mem.iter().map(|region| region.as_ptr().addr()).collect();
        if self.addresses.iter().any(|address| addresses.contains(address)) {
            self.freshness = Freshness::Deltas;
        } else if !self.addresses.is_empty() && !addresses.is_empty() {
            self.freshness = Freshness::WholeTables;
        }
        // An empty table, and the table after it, prove neither: `freshness` stays.
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

    /// Shows: differences and whole tables are distinguished, with any regions, and also when the
    /// front-end changes from one to the other.
    #[test]
    fn differences_are_distinguished_from_whole_tables() {
        use Freshness::{Deltas, WholeTables};
        let mut history = TableHistory::default();
        let mut freshness = |mem: &GuestMemoryMmap| {
            history.table(mem);
            history.freshness
        };
        assert_eq!(freshness(&GuestMemoryMmap::new()), WholeTables, "the default");
        let one = whole(1);
        assert_eq!(freshness(&one), WholeTables, "a whole table or a first difference");
        let two = plus(&one, BYTES);
        assert_eq!(freshness(&two), Deltas);
        let other = less(&two, 0);
        assert_eq!(freshness(&other), Deltas);
        assert_eq!(freshness(&less(&other, BYTES)), Deltas, "an empty table proves neither");
        // The library unmaps a table only after it has mapped the next one.
        let single = whole(1);
        assert_eq!(freshness(&single), Deltas);
        let old = whole(3);
        assert_eq!(freshness(&old), WholeTables);
        let new = whole(3);
        assert_eq!(freshness(&new), WholeTables);
        assert_eq!(freshness(&new), Deltas, "the same addresses again");
    }
}
