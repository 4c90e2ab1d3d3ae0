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
