// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: which part of the guest's memory is RAM. Knows no ring and no device.
//!
//! A load beyond the end of a mapped file is SIGBUS, which ends the process. RAM has no such place.
//! But a memory table also lists the windows of virtio-fs devices, of this daemon and of others
//! (Q3): maps of files that the guest can truncate. So rings, descriptor tables, requests and
//! replies are read and written in RAM only. Data in other regions is moved by system calls, which
//! return EFAULT instead.
//!
//! | file of the region | kind |
//! |---|---|
//! | none; a memfd with F_SEAL_SHRINK (QEMU's RAM) | RAM |
//! | on a FUSE file system: a window ([`passthrough`](crate::passthrough)) | not RAM |
//! | any other: `/dev/shm`, huge pages, a disk, a pmem file | RAM with a SIGBUS guard |

use std::fs::File;
use std::io;
use std::sync::Arc;

use log::debug;
use nix::sys::statfs::fstatfs;
use rustix::fs::{SealFlags, fcntl_get_seals};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend};
use vm_memory::{GuestMemoryLoadGuard, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use crate::persist::{Guarded, page_bytes};
use crate::support::lock::{Mutex, lock};

/// The guest's memory, as in the last memory table of the front-end.
pub type GuestMemory = GuestMemoryAtomic<GuestMemoryMmap>;

/// The kind of a region.
enum Kind {
    /// RAM, with a SIGBUS guard if its pages can vanish. The guard exists while the region is in
    /// the table.
    Ram { _guard: Option<Guarded> },
    /// A map of a file that the guest can truncate.
    Other,
}

/// The guest address of a region, its length, and its address in this process. Another region that
/// is mapped at the same time differs in at least one of them.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    at: GuestAddress,
    bytes: u64,
    here: usize,
}

impl Place {
    fn of(region: &GuestRegionMmap) -> Self {
        Self { at: region.start_addr(), bytes: region.len(), here: region.as_ptr().addr() }
    }
}

/// The guest's memory, and the part of it that is RAM.
#[derive(Clone)]
pub(crate) struct Memory {
    all: GuestMemory,
    ram: GuestMemory,
    known: Arc<Mutex<Vec<(Place, Kind)>>>,
}

impl Memory {
    /// `all` is the memory table of the front-end. After each change of the table
    /// [`table_came`](Self::table_came) must be called.
    pub(crate) fn new(all: GuestMemory) -> Self {
        let ram = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        Self { all, ram, known: Arc::default() }
    }

    /// All regions: only for addresses that are passed to system calls.
    pub(crate) fn all(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.all.memory()
    }

    /// The regions that may be read and written by loads and stores.
    pub(crate) fn ram(&self) -> GuestMemoryLoadGuard<GuestMemoryMmap> {
        self.ram.memory()
    }

    /// Finds the RAM regions of a new memory table.
    pub(crate) fn table_came(&self) {
        let all = self.all.memory();
        let mut known = lock(&self.known);
        let mut before = std::mem::take(&mut *known);
        let mut changed = false;
        for region in all.iter() {
            let place = Place::of(region);
            let seen = before.iter().position(|(seen, _)| *seen == place);
            let kind = match seen {
                Some(seen) => before.swap_remove(seen).1,
                None => {
                    let kind = kind_of(region);
                    changed |= matches!(kind, Kind::Ram { .. });
                    kind
                }
            };
            known.push((place, kind));
        }
        changed |= before.iter().any(|(_, kind)| matches!(kind, Kind::Ram { .. }));
        if changed {
            let is_ram = |(place, kind): &(Place, Kind)| {
                let ram = matches!(kind, Kind::Ram { .. });
                // remove_region() is the only way to the Arc of a region. It returns another table,
                // and leaves `all` as it is.
                ram.then(|| all.remove_region(place.at, place.bytes).ok()).flatten()
            };
            let regions = known.iter().filter_map(is_ram).map(|(_, region)| region).collect();
            match GuestMemoryMmap::from_arc_regions(regions) {
                Ok(ram) => self.publish(ram),
                // Can't happen: the regions are a part of a valid table, so they do not overlap.
                Err(e) => debug!("no RAM in a table of {} regions: {e}", all.num_regions()),
            }
        }
        drop(known);
        drop(before); // Drops guards after `ram` lists their regions no more.
    }

    fn publish(&self, ram: GuestMemoryMmap) {
        match self.ram.lock() {
            Ok(guard) => guard.replace(ram),
            Err(poisoned) => poisoned.into_inner().replace(ram),
        }
    }
}

fn kind_of(region: &GuestRegionMmap) -> Kind {
    let Some(backing) = region.file_offset() else { return Kind::Ram { _guard: None } };
    let file: &File = backing.file();
    match fcntl_get_seals(file) {
        Ok(seals) if seals.contains(SealFlags::SHRINK) => return Kind::Ram { _guard: None },
        Ok(_) => {} // On tmpfs or hugetlbfs.
        // If fstatfs(2) fails, the file is treated as one on a FUSE file system.
        Err(_) if fstatfs(file).map_or(true, |fs| is_fuse(fs.filesystem_type().0)) => {
            return Kind::Other;
        }
        Err(_) => {}
    }
    let (start, bytes) = (region.as_ptr().addr(), region.len() as usize);
    let page = page_bytes(file).and_then(|bytes| usize::try_from(bytes).map_err(io::Error::other));
    let guarded = page.and_then(|page| Guarded::new(start, bytes, page));
    let guarded = guarded.inspect_err(|e| debug!("RAM without a guard: {e}"));
    Kind::Ram { _guard: guarded.ok() }
}

fn is_fuse(magic: libc::__fsword_t) -> bool {
    magic == libc::FUSE_SUPER_MAGIC
}

#[cfg(test)]
mod tests {
    use rustix::fs::{MemfdFlags, fcntl_add_seals, memfd_create};
    use vm_memory::{Bytes, FileOffset, MmapRegion};

    use super::*;

    const BYTES: u64 = 1 << 20;

    fn region(file: &File, at: u64) -> Arc<GuestRegionMmap> {
        let backing = FileOffset::new(file.try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(backing, BYTES as usize).unwrap();
        Arc::new(GuestRegionMmap::new(region, GuestAddress(at)).unwrap())
    }

    fn memory() -> Memory {
        Memory::new(GuestMemoryAtomic::new(GuestMemoryMmap::new()))
    }

    fn set(memory: &Memory, regions: Vec<Arc<GuestRegionMmap>>) {
        let table = GuestMemoryMmap::from_arc_regions(regions).unwrap();
        memory.all.lock().unwrap().replace(table);
        memory.table_came();
    }

    fn has_guard(kind: &Kind) -> bool {
        matches!(kind, Kind::Ram { _guard: Some(_) })
    }

    /// Shows: RAM whose file was truncated reads as zeros without a SIGBUS. A memfd with
    /// F_SEAL_SHRINK gets no guard.
    #[test]
    fn ram_that_vanishes_is_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let sealed = File::from(memfd_create("ram", MemfdFlags::ALLOW_SEALING).unwrap());
        sealed.set_len(BYTES).unwrap();
        fcntl_add_seals(&sealed, SealFlags::SHRINK).unwrap();
        let memory = memory();
        set(&memory, vec![region(&sealed, 0), region(&file, BYTES)]);
        memory.ram().write_obj(7u8, GuestAddress(BYTES)).unwrap();
        memory.ram().write_obj(8u8, GuestAddress(0)).unwrap();
        file.set_len(0).unwrap();
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(BYTES)).unwrap(), 0);
        assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(0)).unwrap(), 8);
        let guards: Vec<_> = lock(&memory.known).iter().map(|(_, kind)| has_guard(kind)).collect();
        assert_eq!(guards, [false, true]);
    }

    /// Shows: a region that leaves the table leaves the RAM, and is unmapped.
    #[test]
    fn a_removed_region_is_unmapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let (memory, kept, gone) = (memory(), region(&file, 0), region(&file, BYTES));
        set(&memory, vec![kept.clone(), gone.clone()]);
        assert_eq!(memory.ram().num_regions(), 2);
        set(&memory, vec![kept]);
        assert_eq!(memory.ram().num_regions(), 1);
        assert_eq!(Arc::strong_count(&gone), 1, "a table still refers to the region");
    }
}
