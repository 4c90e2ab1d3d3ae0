// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A window that shows one whole file in one map, as virtio-pmem does.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, OnceLock};

use log::{debug, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{Acks, FileOffset, MapError, Mapper, ShmemMapper, WindowBytes, WindowOffset};
use crate::lock::lock;

/// What the last memory table said, if one has come since the last stop.
///
/// QEMU lists its live maps in the table which it sends at each start (row Q3 of our notes), so a
/// fresh table that shows the file proves that a map outlived a pause (Q10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Table {
    Stale,
    Fresh { shows_file: bool },
}

/// A mapper that can find out what its acks are worth.
pub(crate) trait Channel: Mapper {
    /// See [`ShmemMapper::acks`].
    fn acks(&self) -> Result<Acks, MapError>;

    /// See [`ShmemMapper::close`].
    fn close(&self);
}

impl Channel for ShmemMapper {
    fn acks(&self) -> Result<Acks, MapError> {
        ShmemMapper::acks(self)
    }

    fn close(&self) {
        ShmemMapper::close(self);
    }
}

/// The window of one session.
pub(crate) struct WholeFile {
    file: Arc<File>,
    bytes: WindowBytes,
    channel: OnceLock<Arc<dyn Channel>>,
    table: Mutex<Table>,
}

impl WholeFile {
    pub(crate) fn new(file: Arc<File>, bytes: WindowBytes) -> Self {
        Self { file, bytes, channel: OnceLock::new(), table: Mutex::new(Table::Stale) }
    }

    /// The channel to the front-end, which a session gets once.
    pub(crate) fn set_channel(&self, channel: impl Channel + 'static) {
        if self.channel.set(Arc::new(channel)).is_err() {
            warn!("the front-end sent a second back-end channel; it is not used");
        }
    }

    /// The session is over: a map that is under way returns.
    pub(crate) fn close(&self) {
        if let Some(channel) = self.channel.get() {
            channel.close();
        }
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
}

/// The front-end as the device sees it: what it answers has been checked against what it shows.
impl Mapper for WholeFile {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        let lacks = |what| Err(MapError::Unsupported(what));
        let Some(channel) = self.channel.get() else { return lacks("a back-end channel") };
        let acks = channel.acks()?;
        if acks == Acks::Missing {
            return lacks("protocol feature REPLY_ACK");
        }
        match channel.map(at, file, from, bytes) {
            // A front-end that can't be asked whether it acks: its table is the proof.
            Ok(()) if acks == Acks::Unknown && !self.is_shown() => {
                lacks("protocol feature REPLY_ACK")
            }
            // Q4: refused because it is still there.
            Err(MapError::Refused) if self.is_shown() => Ok(()),
            other => other,
        }
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        match self.channel.get() {
            Some(channel) => channel.unmap(at, bytes),
            None => Err(MapError::Unsupported("a back-end channel")),
        }
    }
}

fn same_file(a: &File, b: &File) -> bool {
    let id = |file: &File| file.metadata().map(|m| (m.dev(), m.ino())).ok();
    id(a).is_some_and(|a| Some(a) == id(b))
}

#[cfg(test)]
mod tests {
    use vm_memory::{FileOffset as Backing, GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const BYTES: u64 = 2 << 20;

    /// A front-end that answers as scripted.
    struct Scripted {
        map: fn() -> Result<(), MapError>,
        acks: Acks,
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
            (self.map)()
        }

        fn unmap(&self, _: WindowOffset, _: WindowBytes) -> Result<(), MapError> {
            unreachable!("one map, and it stays")
        }
    }

    impl Channel for Scripted {
        fn acks(&self) -> Result<Acks, MapError> {
            Ok(self.acks)
        }

        fn close(&self) {}
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

    fn map(window: &WholeFile) -> Result<(), String> {
        let file = window.file.clone();
        let done = window.map(WindowOffset(0), &file, FileOffset(0), window.bytes);
        done.map_err(|e| e.to_string())
    }

    fn bring_up(
        answer: fn() -> Result<(), MapError>,
        acks: Acks,
        shown: bool,
    ) -> Result<(), String> {
        let file = file();
        let window = WholeFile::new(file.clone(), WindowBytes(BYTES));
        window.set_channel(Scripted { map: answer, acks });
        if shown {
            window.table_came(&table(&file, 0, BYTES));
        }
        map(&window)
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

    /// Shows: an ack is believed if it is one, or if the memory table agrees.
    #[test]
    fn an_ack_is_checked() {
        let no_acks = || Err("the front-end lacks protocol feature REPLY_ACK".to_string());
        for (acks, shown, outcome) in [
            (Acks::Real, false, Ok(())),
            (Acks::Unknown, true, Ok(())),
            (Acks::Unknown, false, no_acks()),
            (Acks::Missing, true, no_acks()),
        ] {
            assert_eq!(bring_up(|| Ok(()), acks, shown), outcome, "{acks:?} {shown}");
        }
    }

    /// Shows: a refused map is fine only where the window shows the file all the same (Q4, Q10).
    #[test]
    fn a_refusal_is_checked() {
        let refused = || Err(MapError::Refused);
        assert_eq!(bring_up(refused, Acks::Real, true), Ok(()));
        assert_eq!(bring_up(refused, Acks::Real, false), Err(MapError::Refused.to_string()));
    }

    /// Shows: a session without a back-end channel is told apart.
    #[test]
    fn a_channel_is_needed() {
        let no_channel = WholeFile::new(file(), WindowBytes(BYTES));
        assert_eq!(map(&no_channel), Err("the front-end lacks a back-end channel".into()));
    }
}
