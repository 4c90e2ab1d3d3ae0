// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A window that shows one whole file in one map, as virtio-pmem does.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, MutexGuard};

use log::{debug, info};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};

/// What the last memory table said, if one has come since the last stop.
///
/// QEMU lists its live maps in the table which it sends at each start (row Q3 of our notes), so a
/// fresh table that shows the file proves that a map outlived a pause (Q10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Stale,
    Fresh { shows_file: bool },
}

/// How an attempt to bring the window up ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The window shows the file.
    Up,
    /// The ring was stopped before the map was sent: nothing was sent.
    Cancelled,
    /// The window can't be had from this front-end, which lacks what the text names.
    Unsupported(&'static str),
    /// The front-end did not map the file; the text says more.
    Failed(String),
}

/// The window of one session.
pub(crate) struct WholeFile {
    file: Arc<File>,
    bytes: WindowBytes,
    mapper: Mutex<Option<Arc<dyn Mapper>>>,
    table: Mutex<Table>,
}

impl WholeFile {
    pub(crate) fn new(file: Arc<File>, bytes: WindowBytes) -> Self {
        Self { file, bytes, mapper: Mutex::new(None), table: Mutex::new(Table::Stale) }
    }

    pub(crate) fn set_mapper(&self, mapper: Arc<dyn Mapper>) {
        *lock(&self.mapper) = Some(mapper);
    }

    /// Reads a new memory table.
    pub(crate) fn table_came(&self, mem: &GuestMemoryMmap) {
        let shows_file = mem.iter().any(|region| {
            region.len() == self.bytes.0
                && region.file_offset().is_some_and(|backing| {
                    backing.start() == 0 && same_file(backing.file(), &self.file)
                })
        });
        debug!("memory table of {} regions, file shown: {shows_file}", mem.num_regions());
        *lock(&self.table) = Table::Fresh { shows_file };
    }

    /// The device was stopped: a reset may follow, and would drop the map without a word (Q10).
    pub(crate) fn stopped(&self) {
        *lock(&self.table) = Table::Stale;
    }

    /// Whether a table that came since the last stop shows the file.
    pub(crate) fn is_shown(&self) -> bool {
        *lock(&self.table) == Table::Fresh { shows_file: true }
    }

    /// Sends the map and waits for the answer. `still_wanted` is asked just before it is sent.
    pub(crate) fn bring_up(&self, still_wanted: impl Fn() -> bool) -> Outcome {
        let Some(mapper) = lock(&self.mapper).clone() else {
            return Outcome::Unsupported("a back-end channel");
        };
        // Q1: a map that reaches a stopped device kills QEMU.
        if !still_wanted() {
            return Outcome::Cancelled;
        }
        match mapper.map(WindowOffset(0), &self.file, FileOffset(0), self.bytes) {
            Ok(()) => self.check_ack(&*mapper),
            Err(MapError::NotNegotiated) => Outcome::Unsupported("protocol feature SHMEM"),
            // Q4: refused because it is still there.
            Err(MapError::Refused) if self.is_shown() => Outcome::Up,
            Err(e) => Outcome::Failed(e.to_string()),
        }
    }

    /// Without REPLY_ACK a map "succeeds" as soon as it is sent, and the library does not tell the
    /// two apart. A table that shows the file is proof enough. Else ask for what every front-end
    /// must refuse (Q5): only a real ack can be a refusal.
    fn check_ack(&self, mapper: &dyn Mapper) -> Outcome {
        if self.is_shown() {
            return Outcome::Up;
        }
        info!("the memory table does not show the window (more than 8 regions?); asking back");
        let never_mapped = WindowBytes(4096);
        match mapper.unmap(WindowOffset(0), never_mapped) {
            Err(MapError::Refused) => Outcome::Up,
            Ok(()) if self.is_shown() => Outcome::Up,
            Ok(()) => Outcome::Unsupported("protocol feature REPLY_ACK"),
            Err(e) => Outcome::Failed(e.to_string()),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn same_file(a: &File, b: &File) -> bool {
    let id = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
    id(a).is_some_and(|a| Some(a) == id(b))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicBool, Ordering};

    use vm_memory::{FileOffset as Backing, GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const BYTES: u64 = 2 << 20;

    /// A front-end that answers as scripted, and counts what it was sent.
    #[derive(Default)]
    struct Scripted {
        map_refused: bool,
        unmap_refused: bool,
        no_shmem: bool,
        asked_back: AtomicBool,
    }

    impl Mapper for Scripted {
        fn map(
            &self,
            at: WindowOffset,
            _file: &File,
            from: FileOffset,
            bytes: WindowBytes,
        ) -> Result<(), MapError> {
            assert_eq!((at.0, from.0, bytes.0), (0, 0, BYTES), "the whole file, in one map");
            match (self.no_shmem, self.map_refused) {
                (true, _) => Err(MapError::NotNegotiated),
                (_, true) => Err(MapError::Refused),
                _ => Ok(()),
            }
        }

        fn unmap(&self, _at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
            assert_ne!(bytes.0, BYTES, "asking back must not name the live map");
            self.asked_back.store(true, Ordering::Relaxed);
            if self.unmap_refused { Err(MapError::Refused) } else { Ok(()) }
        }
    }

    fn file() -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * BYTES).unwrap();
        Arc::new(file)
    }

    fn table(file: &File, start: u64, bytes: u64) -> GuestMemoryMmap {
        let backing = Backing::new(file.try_clone().unwrap(), start);
        let region = MmapRegion::from_file(backing, bytes as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(1 << 32)).unwrap();
        GuestMemoryMmap::from_regions(vec![region]).unwrap()
    }

    fn bring_up(front_end: Scripted, shown: bool) -> (Outcome, bool) {
        let file = file();
        let window = WholeFile::new(file.clone(), WindowBytes(BYTES));
        let front_end = Arc::new(front_end);
        window.set_mapper(front_end.clone());
        if shown {
            window.table_came(&table(&file, 0, BYTES));
        }
        (window.bring_up(|| true), front_end.asked_back.load(Ordering::Relaxed))
    }

    /// Shows: only a table that came since the stop, with the whole of this very file, is proof.
    #[test]
    fn what_counts_as_proof_that_the_window_is_mapped() {
        let file = file();
        let window = WholeFile::new(file.clone(), WindowBytes(BYTES));
        assert!(!window.is_shown());
        for other in [
            table(&file, 4096, BYTES),
            table(&file, 0, BYTES / 2),
            table(&self::file(), 0, BYTES),
            GuestMemoryMmap::new(),
        ] {
            window.table_came(&other);
            assert!(!window.is_shown());
        }
        window.table_came(&table(&file, 0, BYTES));
        assert!(window.is_shown());
        window.stopped();
        assert!(!window.is_shown(), "a reset may have dropped the map since");
    }

    /// Shows: an ack is believed if the table agrees, or if the front-end can refuse.
    #[test]
    fn an_ack_is_checked() {
        assert_eq!(bring_up(Scripted::default(), true), (Outcome::Up, false));
        let acks = Scripted { unmap_refused: true, ..Scripted::default() };
        assert_eq!(bring_up(acks, false), (Outcome::Up, true));
        let never_acks = Outcome::Unsupported("protocol feature REPLY_ACK");
        assert_eq!(bring_up(Scripted::default(), false), (never_acks, true));
    }

    /// Shows: a refused map is fine only where the window shows the file all the same (Q4, Q10).
    #[test]
    fn a_refusal_is_checked() {
        let refuses = || Scripted { map_refused: true, ..Scripted::default() };
        assert_eq!(bring_up(refuses(), true), (Outcome::Up, false));
        let failed = Outcome::Failed(MapError::Refused.to_string());
        assert_eq!(bring_up(refuses(), false), (failed, false));
    }

    /// Shows: a front-end without SHMEM or without a back-end channel is named as such.
    #[test]
    fn a_front_end_that_cannot_map_is_unsupported() {
        let no_shmem = Scripted { no_shmem: true, ..Scripted::default() };
        assert_eq!(bring_up(no_shmem, false).0, Outcome::Unsupported("protocol feature SHMEM"));
        let window = WholeFile::new(file(), WindowBytes(BYTES));
        assert_eq!(window.bring_up(|| true), Outcome::Unsupported("a back-end channel"));
    }

    /// Shows: a map is not sent to a device that was stopped meanwhile (Q1).
    #[test]
    fn a_map_that_is_no_longer_wanted_is_not_sent() {
        let window = WholeFile::new(file(), WindowBytes(BYTES));
        window.set_mapper(Arc::new(Scripted { no_shmem: true, ..Scripted::default() }));
        let asked = Cell::new(false);
        let outcome = window.bring_up(|| {
            asked.set(true);
            false
        });
        assert_eq!((outcome, asked.get()), (Outcome::Cancelled, true));
    }
}
