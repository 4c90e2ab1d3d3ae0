// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window as one front-end shows it: many maps, which come and go with the guest's wishes.

use std::fs::File;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use log::{debug, warn};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::dax::engine::Engine;
use crate::device::{RingStart, SessionWindow};
use crate::support::file_id::FileId;
use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};
use crate::window::{Acks, FileOffset, MapError, Mapper, ShmemMapper, WindowBytes, WindowOffset};

use crate::window::locate::{MapLocator, Outcome, SharedBase, WindowMap};

/// Maps and memory regions of one VM, of all its devices together, of which QEMU 11.1 does not die
/// (Q2: 512; the library itself stops at 509), less what other devices may map while we are not
/// looking.
const MOST_REGIONS: usize = 500;

struct State {
    /// The session or the process is about to end. Final: the front-end may continue and pause the
    /// VM after SIGTERM.
    ended: bool,
    /// Counts the resets: what was to be mapped before one is not wanted any more.
    generation: u64,
    /// From a reset to the next start. A request of the last driver must not wait for that: the
    /// start waits until the device has forgotten that driver.
    forgetting: bool,
    locator: MapLocator,
}

impl State {
    /// Whether what was to be mapped in `generation` is not wanted any more.
    fn is_over(&self, generation: u64) -> bool {
        self.ended || self.forgetting || self.generation != generation
    }
}

/// The window of one session.
pub(crate) struct FsWindow {
    engine: Arc<Engine>,
    /// The most maps that this window ever needs.
    most_maps: usize,
    /// The front-end knows of the region: a vhost-user-fs device of QEMU has a back-end channel,
    /// too.
    has_region: AtomicBool,
    channel: OnceLock<ShmemMapper>,
    state: Mutex<State>,
    changed: Condvar,
    /// Where all requests look up the window's guest physical address.
    base: Arc<SharedBase>,
    /// How many memory regions the VM has.
    regions: Arc<AtomicUsize>,
    /// That there is too little room for all maps has been said.
    said_full: AtomicBool,
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
            said_full: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether the front-end can map at all: without a region and a back-end channel there is no
    /// window, and without acks a map that was refused can't be told from one that was made. May
    /// block.
    pub(crate) fn is_there(&self) -> bool {
        if !self.has_region.load(Ordering::Relaxed) {
            return false;
        }
        let Some(channel) = self.channel.get() else { return false };
        channel.probe_acks() != Acks::Missing
    }

    /// Does something that may find the window's base, or lose it.
    fn with_base<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let done = work(&mut state);
        // Under the lock: what was found last is what is said last.
        self.base.publish(state.locator.base());
        done
    }

    /// The driver has reset the device, and the front-end has dropped all maps (Q10).
    pub(crate) fn reset(&self) {
        self.with_base(|state| {
            state.generation += 1;
            state.forgetting = true;
            state.locator.reset();
        });
        self.changed.notify_all();
    }

    /// Does something with the channel while the device is started, and waits where it is not. (The
    /// request that wants it stays open over a pause, and holds up nobody.) False if it was done,
    /// but after a reset that came in between.
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

    /// The device is stopped: waits until it is started, or nothing of `generation` is wanted any
    /// more. The ring's thread, or the watchdog, says that it is started before it comes to
    /// [`started`](SessionWindow::started), which takes the lock and wakes this thread: either this
    /// thread sees that under the lock, or it waits already and is woken.
    fn wait_started(&self, channel: &ShmemMapper, generation: u64) {
        let mut state = self.lock();
        while !channel.is_started() && !state.is_over(generation) {
            state = self.changed.wait(state);
        }
    }

    /// Looks for our maps in a memory table: how many regions are not ours, and where the window
    /// is.
    fn read_table(&self, mem: &GuestMemoryMmap) {
        self.regions.store(mem.num_regions(), Ordering::Relaxed);
        let look = self.lock().locator.look();
        let found = look.through(mem);
        let others = self.with_base(|state| state.locator.table(mem, found));
        let most = MOST_REGIONS.saturating_sub(others).min(self.most_maps);
        if most < self.most_maps && !self.said_full.swap(true, Ordering::Relaxed) {
            warn!(
                "the VM has {others} other memory regions: {most} maps are left for this window, \
                 which may want {}; make it smaller, or other devices' windows",
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
        // Before it is sent: the memory table that shows it comes before the ack (Q3).
        if let Ok(id) = FileId::of(file) {
            self.lock().locator.requested(WindowMap { at, id, from, bytes });
        }
        let done = self.while_started(|channel| channel.map(at, file, from, bytes));
        let outcome = if matches!(done, Ok(true)) { Outcome::Made } else { Outcome::Failed };
        self.with_base(|state| state.locator.answered(at, outcome));
        if done? {
            return Ok(());
        }
        // Nobody wants it any more, and whoever comes next must not find it in his way (Q4).
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

    /// The channel sends nothing while the device is stopped.
    fn stopped(&self) {}

    fn ended(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
        if let Some(channel) = self.channel.get() {
            channel.close();
        }
    }
}

/// The window of the current session. Where there is none, nothing is granted, and what the engine
/// takes away is shown by no front-end.
#[derive(Default)]
pub(crate) struct CurrentWindow(Mutex<Option<Arc<FsWindow>>>);

impl CurrentWindow {
    pub(crate) fn set(&self, window: Option<Arc<FsWindow>>) {
        *lock(&self.0) = window;
    }

    pub(crate) fn get(&self) -> Option<Arc<FsWindow>> {
        lock(&self.0).clone()
    }
}

impl Mapper for CurrentWindow {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        self.get().map_or(Ok(()), |window| window.map(at, file, from, bytes))
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.get().map_or(Ok(()), |window| window.unmap(at, bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use vhost::vhost_user::Backend;

    use super::*;

    /// Shows: no request waits for a stopped VM after the end, also if the VM starts and stops
    /// once more.
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
