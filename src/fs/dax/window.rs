// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window of one session: its maps, which SETUPMAPPING and REMOVEMAPPING change.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use log::{debug, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::dax::engine::Engine;
use crate::device::{RingStart, SessionWindow};
use crate::support::file_id::FileId;
use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};
use crate::window::{
    Acks, Current, FileOffset, MapError, Mapper, ShmemMapper, WindowBytes, WindowOffset,
};

use crate::window::locate::{MapLocator, Outcome, SharedBase, WindowMap};

/// Largest number of memory regions of a VM, for all its devices together, with which QEMU 11.1
/// does not abort (Q2: 512; vhost-user-backend refuses the 510th), minus a reserve for maps that
/// other devices make between two memory tables.
const MOST_REGIONS: usize = 500;

struct State {
    /// The session or the process is about to end. Never cleared: after SIGTERM the front-end may
    /// still continue and pause the VM.
    ended: bool,
    /// Number of resets. A map that was requested before a reset is not wanted any more.
    generation: u64,
    /// Set from a reset to the next start. A request of the last driver must not wait for that
    /// start: the start waits until the device has dropped that driver's state.
    forgetting: bool,
    locator: MapLocator,
}

impl State {
    /// Whether a map that was requested in `generation` is not wanted any more.
    fn is_over(&self, generation: u64) -> bool {
        self.ended || self.forgetting || self.generation != generation
    }
}

/// The window of one session.
pub(crate) struct FsWindow {
    engine: Arc<Engine>,
    /// Largest number of maps that this window needs.
    most_maps: usize,
    /// The front-end has requested the length of the region. A vhost-user-fs device of QEMU does
    /// not, but has a back-end channel, too.
    has_region: AtomicBool,
    channel: OnceLock<ShmemMapper>,
    state: Mutex<State>,
    changed: Condvar,
    /// Guest physical address of the window, read by all requests.
    base: Arc<SharedBase>,
    /// Number of the VM's memory regions.
    regions: Arc<AtomicUsize>,
    /// The warning that not all maps fit has been logged.
    warned_full: AtomicBool,
}

impl FsWindow {
    pub(crate) fn new(
        engine: Arc<Engine>,
        bytes: WindowBytes,
        most_maps: usize,
        (base, regions): (Arc<SharedBase>, Arc<AtomicUsize>),
    ) -> Self {
        base.publish(None);
        let state = State {
            ended: false,
            generation: 0,
            forgetting: false,
            locator: MapLocator::new(bytes, None),
        };
        Self {
            engine,
            most_maps,
            has_region: AtomicBool::new(false),
            channel: OnceLock::new(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            base,
            regions,
            warned_full: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether the front-end can map. It needs the region, a back-end channel, and acks, without
    /// which a refused map looks like a made one. May block on the front-end.
    pub(crate) fn can_map(&self) -> bool {
        if !self.has_region.load(Ordering::Relaxed) {
            return false;
        }
        let Some(channel) = self.channel.get() else { return false };
        channel.probe_acks() != Acks::Missing
    }

    /// Runs `work`, which may find or lose the window's guest physical address.
    fn with_base<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let done = work(&mut state);
        // Under the lock, so that two threads publish in the order in which they have found it.
        self.base.publish(state.locator.base());
        done
    }

    /// The driver has reset the device, and the front-end has removed all maps (Q10).
    pub(crate) fn reset(&self) {
        self.with_base(|state| {
            state.generation += 1;
            state.forgetting = true;
            state.locator.reset();
        });
        self.changed.notify_all();
    }

    /// Calls `send` while the device is started. Waits while it is stopped: the stop does not wait
    /// for this request, which stays in flight. Returns false if a reset came during `send`.
    fn while_started(
        &self,
        send: impl Fn(&ShmemMapper) -> Result<(), MapError>,
    ) -> Result<bool, MapError> {
        let Some(channel) = self.channel.get() else {
            return Err(MapError::Unsupported("a back-end channel"));
        };
        let generation = self.lock().generation;
        loop {
            if self.lock().is_over(generation) {
                return Err(MapError::Stopped);
            }
            match send(channel) {
                Err(MapError::Stopped) => self.wait_started(channel, generation),
                done => return done.map(|()| generation == self.lock().generation),
            }
        }
    }

    /// Waits until the device is started, or until no map of `generation` is wanted. The start is
    /// marked by the ring's thread, or by the watchdog, before that thread calls
    /// [`started`](SessionWindow::started), which takes the lock and notifies this thread. So this
    /// thread either sees the mark under the lock, or waits already and is notified.
    fn wait_started(&self, channel: &ShmemMapper, generation: u64) {
        let mut state = self.lock();
        while !channel.is_started() && !state.is_over(generation) {
            state = self.changed.wait(state);
        }
    }

    /// Finds this window's maps in a memory table, the number of other regions, and the window's
    /// guest physical address.
    fn read_table(&self, mem: &GuestMemoryMmap) {
        self.regions.store(mem.num_regions(), Ordering::Relaxed);
        let look = self.lock().locator.look();
        let found = look.through(mem);
        let others = self.with_base(|state| state.locator.table(mem, found));
        let most = MOST_REGIONS.saturating_sub(others).min(self.most_maps);
        if most < self.most_maps && !self.warned_full.swap(true, Ordering::Relaxed) {
            warn!(
                "the VM has {others} other memory regions: {most} maps are left for this window, \
                 which may need {}; use a smaller window here or in other devices",
                self.most_maps
            );
        }
        self.engine.set_most_maps(most);
        debug!("memory table of {} regions, {others} not ours", mem.num_regions());
    }
}

impl Mapper for FsWindow {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        // Before the send: the memory table with the new map comes before the ack (Q3).
        if let Ok(id) = FileId::of(file) {
            self.lock().locator.requested(WindowMap { at, id, from, bytes });
        }
        let done = self.while_started(|channel| channel.map(at, file, from, bytes));
        let outcome = if matches!(done, Ok(true)) { Outcome::Made } else { Outcome::Failed };
        self.with_base(|state| state.locator.answered(at, outcome));
        if done? {
            return Ok(());
        }
        // A reset came meanwhile: no request wants the map, and it would be in the way of the next
        // one (Q4).
        self.while_started(|channel| channel.unmap(at, bytes))?;
        Err(MapError::Stopped)
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.while_started(|channel| channel.unmap(at, bytes))?;
        self.lock().locator.removed(at);
        Ok(())
    }
}

impl SessionWindow for FsWindow {
    fn set_channel(&self, channel: ShmemMapper) {
        if self.channel.set(channel).is_err() {
            warn!("the front-end sent a second back-end channel; it is not used");
        }
    }

    fn region_asked(&self) {
        self.has_region.store(true, Ordering::Relaxed);
    }

    fn table_came(&self, mem: &GuestMemoryMmap) {
        self.read_table(mem);
    }

    fn started(&self, _: RingStart) -> bool {
        self.lock().forgetting = false;
        self.changed.notify_all();
        true
    }

    fn bring_up(&self) -> Result<(), MapError> {
        Ok(())
    }

    /// Empty: the channel sends nothing while the device is stopped.
    fn stopped(&self) {}

    fn ended(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
        if let Some(channel) = self.channel.get() {
            channel.close();
        }
    }
}

/// The window of the current session.
pub(crate) type CurrentWindow = Current<FsWindow>;

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use vhost::vhost_user::Backend;

    use super::*;

    /// Shows: after ended() no request waits for the VM, even if the device starts and stops again.
    #[test]
    fn the_end_is_final() {
        let (bytes, none) = (WindowBytes(2 << 20), Arc::new(CurrentWindow::default()));
        let engine = Arc::new(Engine::new(bytes, none, 1));
        let window = FsWindow::new(engine, bytes, 1, Default::default());
        let (ours, _theirs) = UnixStream::pair().unwrap();
        window.set_channel(ShmemMapper::new(Backend::from_stream(ours), || true));
        window.ended();
        window.started(RingStart::Resumed);
        window.stopped();
        assert!(matches!(window.unmap(WindowOffset(0), bytes), Err(MapError::Stopped)));
    }
}
