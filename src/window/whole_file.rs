// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window of virtio-pmem: one map that shows one whole file.

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use log::{debug, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use super::locate::{MapLocator, Outcome, WindowMap};
use super::{Acks, FileOffset, MapError, Mapper, ShmemMapper, WindowBytes, WindowOffset};
use crate::support::file_id::FileId;
use crate::support::lock::{Mutex, lock};

/// A mapper over a back-end channel.
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
    /// None if fstat(2) of the file failed: then the map is found in no memory table.
    map: Option<WindowMap>,
    channel: OnceLock<Arc<dyn Channel>>,
    locator: Mutex<MapLocator>,
    /// Number of stops of the device.
    stops: AtomicU64,
}

impl WholeFile {
    /// The window of `bytes` bytes that shows all of `file`.
    pub(crate) fn new(file: &File, bytes: WindowBytes) -> Self {
        let (at, from) = (WindowOffset(0), FileOffset(0));
        let map = FileId::of(file).ok().map(|id| WindowMap { at, id, from, bytes });
        let locator = Mutex::new(MapLocator::new(bytes, map));
        Self { map, channel: OnceLock::new(), locator, stops: AtomicU64::new(0) }
    }

    /// Sets the back-end channel. A session has one; a second channel is logged and ignored.
    pub(crate) fn set_channel(&self, channel: impl Channel + 'static) {
        if self.channel.set(Arc::new(channel)).is_err() {
            warn!("the front-end sent a second back-end channel, which is ignored");
        }
    }

    /// Ends the session's channel: a map that waits for an ack returns with an error.
    pub(crate) fn close(&self) {
        if let Some(channel) = self.channel.get() {
            channel.close();
        }
    }

    /// Searches a new memory table for the map.
    pub(crate) fn table_came(&self, mem: &GuestMemoryMmap) {
        let look = lock(&self.locator).look();
        let found = look.through(mem);
        lock(&self.locator).table(mem, found);
        debug!("memory table of {} regions; shows the map: {}", mem.num_regions(), self.is_shown());
    }

    /// Notes that the device was stopped.
    pub(crate) fn stopped(&self) {
        self.stops.fetch_add(1, Ordering::SeqCst);
        lock(&self.locator).stopped();
    }

    /// Notes that the driver has reset the device.
    pub(crate) fn reset(&self) {
        lock(&self.locator).reset();
    }

    /// See [`MapLocator::outlives_stop`].
    pub(crate) fn outlives_stop(&self) -> bool {
        lock(&self.locator).outlives_stop()
    }

    /// See [`MapLocator::is_proved`].
    pub(crate) fn is_proved(&self) -> bool {
        lock(&self.locator).is_proved()
    }

    /// See [`MapLocator::is_shown`].
    fn is_shown(&self) -> bool {
        lock(&self.locator).is_shown()
    }
}

/// The front-end's acks, checked against its memory table.
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
        let send = || {
            if let Some(map) = self.map {
                lock(&self.locator).requested(map);
            }
            let done = channel.map(at, file, from, bytes);
            let outcome = if done.is_ok() { Outcome::Made } else { Outcome::Failed };
            lock(&self.locator).answered(at, outcome);
            done
        };
        let stops = self.stops.load(Ordering::SeqCst);
        let mut done = send();
        if matches!(done, Err(MapError::Refused)) {
            // QEMU refuses a map that overlaps another one (docs/front-ends.md Q4). A refusal
            // proves that the map exists only if this session has made it and no reset came since.
            if self.outlives_stop() {
                return Ok(());
            }
            // The front-end may have kept the map over the reset. It can be removed: the new driver
            // does not use the window yet.
            if lock(&self.locator).take_made_before_reset() {
                channel.unmap(at, bytes)?;
                done = send();
            }
        }
        match done {
            // It is not known whether this front-end acks: its memory table must show the map.
            Ok(()) if acks == Acks::Unknown && !self.is_shown() => {
                // The table does not show the map because a stop has outdated it.
                if self.stops.load(Ordering::SeqCst) != stops {
                    return Err(MapError::Stopped);
                }
                lacks("protocol feature REPLY_ACK")
            }
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

#[cfg(test)]
mod tests {
    use std::sync::Weak;
    use std::sync::atomic::AtomicBool;

    use vm_memory::{FileOffset as Backing, GuestAddress, GuestRegionMmap, MmapRegion};

    use super::*;

    const BYTES: u64 = 2 << 20;

    const OURS: u64 = 1 << 32;

    /// A front-end that sends `table` when it gets a map, and then returns the result of `map`.
    struct Scripted {
        window: Weak<WholeFile>,
        table: Option<GuestMemoryMmap>,
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
            if let Some(table) = &self.table {
                let window = self.window.upgrade().unwrap();
                window.table_came(table);
                assert!(window.is_shown(), "a start before the ack would send the map again");
            }
            (self.map)()
        }

        fn unmap(&self, _: WindowOffset, _: WindowBytes) -> Result<(), MapError> {
            unreachable!("the map is never removed")
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

    /// A table with these regions: guest physical address, file, offset in the file, length in
    /// bytes.
    fn table(regions: &[(u64, &File, u64, u64)]) -> GuestMemoryMmap {
        let region = |&(at, file, start, bytes): &(u64, &File, u64, u64)| {
            let backing = Backing::new(file.try_clone().unwrap(), start);
            let region = MmapRegion::from_file(backing, bytes as usize).unwrap();
            GuestRegionMmap::new(region, GuestAddress(at)).unwrap()
        };
        GuestMemoryMmap::from_regions(regions.iter().map(region).collect()).unwrap()
    }

    fn map(window: &WholeFile, file: &File) -> Result<(), String> {
        let done = window.map(WindowOffset(0), file, FileOffset(0), WindowBytes(BYTES));
        done.map_err(|e| e.to_string())
    }

    /// A window of `file`, with a [`Scripted`] front-end.
    fn window(
        file: &Arc<File>,
        answer: fn() -> Result<(), MapError>,
        acks: Acks,
        table: Option<GuestMemoryMmap>,
    ) -> Arc<WholeFile> {
        let window = Arc::new(WholeFile::new(file, WindowBytes(BYTES)));
        let back = Arc::downgrade(&window);
        window.set_channel(Scripted { window: back, table, map: answer, acks });
        window
    }

    fn bring_up(
        answer: fn() -> Result<(), MapError>,
        acks: Acks,
        shown: bool,
    ) -> Result<(), String> {
        let file = file();
        let table = shown.then(|| table(&[(OURS, &file, 0, BYTES)]));
        map(&window(&file, answer, acks, table), &file)
    }

    /// Shows: the map counts as existing only if a table since the last stop shows the whole file
    /// at the address at which the map was made.
    #[test]
    fn what_counts_as_proof_that_the_window_is_mapped() {
        let file = file();
        let ours = (OURS, &*file, 0, BYTES);
        let window = window(&file, || Ok(()), Acks::Real, Some(table(&[ours])));
        window.table_came(&table(&[ours]));
        assert!(!window.is_shown(), "no map was made");
        window.table_came(&GuestMemoryMmap::new());
        map(&window, &file).unwrap();
        assert!(window.is_shown());
        window.stopped();
        assert!(!window.is_shown(), "a reset may have dropped the map after the stop");
        assert!(window.outlives_stop(), "without a reset the map exists");
        for other in [
            (OURS, &*file, 4096, BYTES),
            (OURS, &*file, 0, BYTES / 2),
            (OURS, &*self::file(), 0, BYTES),
        ] {
            window.table_came(&table(&[other]));
            assert!(!window.is_shown() && !window.outlives_stop());
        }
        window.table_came(&table(&[(OURS / 2, &file, 0, BYTES), ours]));
        assert!(window.is_shown());
        window.reset();
        assert!(!window.is_shown() && !window.outlives_stop());
    }

    /// The table after ADD_MEM_REG of a region.
    fn plus(mem: &GuestMemoryMmap, (at, file): (u64, &File)) -> GuestMemoryMmap {
        let backing = Backing::new(file.try_clone().unwrap(), 0);
        let region = MmapRegion::from_file(backing, BYTES as usize).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(at)).unwrap();
        mem.insert_region(Arc::new(region)).unwrap()
    }

    /// The table after REM_MEM_REG of the region at `at`.
    fn less(mem: &GuestMemoryMmap, at: u64) -> GuestMemoryMmap {
        mem.remove_region(GuestAddress(at), BYTES).unwrap().0
    }

    /// Shows (Q17): with differences, the table holds across a stop, since a start may bring no
    /// difference. Differences between stop and start count, but only at the address of our map.
    #[test]
    fn differences_hold_over_a_stop() {
        let (file, ram) = (file(), file());
        let before = plus(&GuestMemoryMmap::new(), (0, &ram));
        let with = plus(&before, (OURS, &file));
        let window = window(&file, || Ok(()), Acks::Real, Some(with.clone()));
        window.table_came(&before);
        map(&window, &file).unwrap();
        for _ in 0..3 {
            window.stopped();
            assert!(window.is_shown(), "the map is kept over a pause");
        }
        window.table_came(&plus(&with, (OURS / 2, &ram)));
        window.stopped();
        assert!(window.is_shown(), "a region of other memory was added");
        let gone = less(&with, OURS);
        window.table_came(&gone);
        assert!(!window.outlives_stop(), "QEMU has removed the map's region");
        window.stopped();
        window.reset();
        window.table_came(&plus(&gone, (OURS * 2, &file)));
        assert!(!window.outlives_stop(), "another device's map of the file");
        window.table_came(&gone);
        map(&window, &file).unwrap();
        window.table_came(&with);
        window.stopped();
        assert!(window.is_shown());
        window.table_came(&table(&[(0, &ram, 0, BYTES), (OURS, &file, 0, BYTES)]));
        assert!(window.is_shown(), "a whole table shows the map");
        window.stopped();
        assert!(!window.is_shown(), "a whole table holds until the stop");
    }

    /// Shows: the map is found again after the guest has moved the window, whether the front-end
    /// sends one table or two for that.
    #[test]
    fn a_window_that_moves() {
        let (file, ram) = (file(), file());
        let before = plus(&GuestMemoryMmap::new(), (0, &ram));
        let with = plus(&before, (OURS, &file));
        for steps in [vec![], vec![before.clone()]] {
            let window = window(&file, || Ok(()), Acks::Real, Some(with.clone()));
            window.table_came(&before);
            map(&window, &file).unwrap();
            steps.iter().for_each(|table| window.table_came(table));
            window.table_came(&plus(&before, (OURS * 2, &file)));
            window.stopped();
            assert!(window.outlives_stop());
        }
    }

    /// Shows: after a stop, a refused map counts as existing, unless a table since the stop lacks
    /// it.
    #[test]
    fn a_refusal_behind_a_stop() {
        static REFUSES: AtomicBool = AtomicBool::new(false);
        let answer = || match REFUSES.load(Ordering::SeqCst) {
            true => Err(MapError::Refused),
            false => Ok(()),
        };
        let (file, ram) = (file(), file());
        let (without, with) = (table(&[(0, &ram, 0, BYTES)]), [(0, &*ram, 0, BYTES)]);
        let with = table(&[with[0], (OURS, &file, 0, BYTES)]);
        for (table, is_window) in [(None, true), (Some(&with), true), (Some(&without), false)] {
            REFUSES.store(false, Ordering::SeqCst);
            let window = window(&file, answer, Acks::Real, None);
            window.table_came(&without);
            map(&window, &file).unwrap();
            window.table_came(&with);
            window.stopped();
            table.into_iter().for_each(|table| window.table_came(table));
            REFUSES.store(true, Ordering::SeqCst);
            assert_eq!(map(&window, &file).is_ok(), is_window);
        }
    }

    /// Shows: the map is found in a table that comes after the ack, as QEMU's tables do.
    #[test]
    fn a_table_may_come_after_the_ack() {
        let file = file();
        let both = [(OURS / 2, &*file, 0, BYTES), (OURS, &*file, 0, BYTES)];
        let window = window(&file, || Ok(()), Acks::Real, None);
        window.table_came(&table(&both[..1]));
        map(&window, &file).unwrap();
        assert!(!window.is_shown());
        window.table_came(&table(&both));
        assert!(window.is_shown());
        window.stopped();
        window.table_came(&table(&both[..1]));
        assert!(!window.is_shown());
    }

    /// Shows: another device's map of the same file, at a lower or higher address, is not taken for
    /// our map. Otherwise stores of the guest would be lost after a reset.
    #[test]
    fn another_devices_map_of_the_file_is_not_ours() {
        let file = file();
        for theirs in [OURS / 2, OURS * 2] {
            let (ours, theirs) = ((OURS, &*file, 0, BYTES), (theirs, &*file, 0, BYTES));
            let mut both = [ours, theirs];
            both.sort_by_key(|region| region.0);
            let window = window(&file, || Ok(()), Acks::Real, Some(table(&both)));
            window.table_came(&table(&[theirs]));
            assert!(!window.is_shown());
            map(&window, &file).unwrap();
            assert!(window.is_shown());
            window.stopped();
            window.table_came(&table(&both));
            assert!(window.is_shown(), "the map is kept over a pause");
            window.stopped();
            window.table_came(&table(&[theirs]));
            assert!(!window.is_shown(), "the map was dropped by a reset");
        }
    }

    /// Shows: a successful ack counts if the front-end is known to ack, or if its table shows the
    /// map.
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

    /// Shows: if the first map of a session is refused, the map fails, even if a table shows the
    /// file: it may be another device's map.
    #[test]
    fn a_first_refusal_is_no_window() {
        let refused = || Err(MapError::Refused);
        for shown in [true, false] {
            assert_eq!(bring_up(refused, Acks::Real, shown), Err(MapError::Refused.to_string()));
        }
    }

    /// Shows: after a reset, the map of before is offered for removal once.
    #[test]
    fn a_map_that_outlives_a_reset_is_removed_once() {
        let file = file();
        let window = window(&file, || Ok(()), Acks::Real, None);
        map(&window, &file).unwrap();
        window.reset();
        // This front-end accepts the second map. tests/frontend has front-ends that refuse it.
        map(&window, &file).unwrap();
        assert!(window.outlives_stop());
        assert!(lock(&window.locator).take_made_before_reset());
        assert!(!lock(&window.locator).take_made_before_reset(), "it was removed already");
    }

    /// Shows: without a back-end channel a map fails, and the error names the channel.
    #[test]
    fn a_channel_is_needed() {
        let no_channel = WholeFile::new(&file(), WindowBytes(BYTES));
        assert_eq!(map(&no_channel, &file()), Err("the front-end lacks a back-end channel".into()));
    }
}
