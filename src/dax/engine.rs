// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: grants: SETUPMAPPING as a fault over a range (behaviours 6, 8, 9, 14 to 16).
//! Knows no FUSE: a grant is a range of a file, an offset in the window, and an access.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use log::warn;

use super::counters::Counters;
use super::entries::Entries;
use super::entry::PAGE_BYTES;
use super::extent::{Access, ExtentSource};
use super::grant::{Grant, Window, extent_of};
pub use super::grant::{GrantError, Span};
pub use super::space::Space;
use super::sync::{Arc, CheckedOut, Checkout, InvalidateLock, Mutex, lock};
use super::wait::{SpaceId, WaitTable};
use crate::persist::Persist;
use crate::support::lock::Rank;
use crate::window::layout::{Piece, ShowError};
use crate::window::{
    FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset, WindowRange,
};

/// The engine of one device.
pub struct Engine {
    pub(super) bytes: WindowBytes,
    pub(super) mapper: Arc<dyn Mapper>,
    most_maps: AtomicUsize,
    pub(super) window: Checkout<Window>,
    waits: Arc<WaitTable>,
    next_space: AtomicU64,
    pub(super) counters: Counters,
}

impl Engine {
    /// An engine without grants, over a window of `bytes` bytes, with at most `most_maps` maps.
    pub fn new(bytes: WindowBytes, mapper: Arc<dyn Mapper>, most_maps: usize) -> Self {
        Self {
            bytes,
            mapper,
            most_maps: AtomicUsize::new(most_maps),
            window: Checkout::new(Rank::Window, Window::default()),
            waits: Arc::new(WaitTable::default()),
            next_space: AtomicU64::new(0),
            counters: Counters::default(),
        }
    }

    /// A new space for a file that has none yet in this engine.
    pub fn space(&self, source: Box<dyn ExtentSource>, persist: Persist) -> Arc<Space> {
        let id = SpaceId(self.next_space.fetch_add(1, Ordering::Relaxed));
        Arc::new(Space {
            id,
            entries: Entries::new(id, self.waits.clone()),
            source,
            persist,
            invalidate_lock: InvalidateLock::default(),
            known_bytes: AtomicU64::new(0),
            coverage: Mutex::default(),
            failed: Mutex::default(),
        })
    }

    /// Largest number of maps in the window.
    pub fn most_maps(&self) -> usize {
        self.most_maps.load(Ordering::Relaxed)
    }

    /// Sets the largest number of maps: the maps of all devices of the VM share one limit
    /// (docs/front-ends.md Q2). Maps above a lowered limit stay.
    pub fn set_most_maps(&self, most_maps: usize) {
        self.most_maps.store(most_maps, Ordering::Relaxed);
    }

    /// The grant that covers byte `at` of the window: its space, and the granted range of the file
    /// from that byte to the grant's end.
    pub fn granted_at(&self, at: WindowOffset) -> Option<(Arc<Space>, FileRange)> {
        let window = self.window.take();
        let (start, grant) = window.grants.range(..=at).next_back()?;
        let left = WindowRange::between(at, grant.range(*start).end())?;
        Some((grant.space.clone(), grant.part(*start, left).of_file()))
    }

    /// The engine's counters.
    pub fn counters(&self) -> &Counters {
        self.counters.waits.set(self.waits.joined());
        &self.counters
    }

    /// Number of grants and number of maps.
    pub fn sizes(&self) -> (usize, usize) {
        let window = self.window.take();
        (window.grants.len(), window.layout.len())
    }

    /// Checks a range of the window: `bytes` bytes from `at` on.
    ///
    /// # Errors
    /// [`GrantError::Invalid`] if the range is empty, is not whole pages, or ends past the window.
    pub fn span(&self, at: WindowOffset, bytes: WindowBytes) -> Result<Span, GrantError> {
        let whole = |n: u64| n.is_multiple_of(PAGE_BYTES);
        if bytes.0 == 0 || !whole(at.0) || !whole(bytes.0) {
            return Err(GrantError::Invalid("the window range is not whole pages of 4 KiB"));
        }
        match at.0.checked_add(bytes.0) {
            Some(end) if end <= self.bytes.0 => Ok(Span(WindowRange::new(at, bytes))),
            _ => Err(GrantError::Invalid("the range ends past the end of the window")),
        }
    }

    /// SETUPMAPPING: grants `span` of the window, which then shows `space`'s file from `from` on.
    /// Earlier grants in `span` are replaced. `may` returns false if the request belongs to an
    /// earlier life of the device (it was reset or unmounted since); it is called under the
    /// checkout of the window, so no other grant comes in between.
    ///
    /// # Errors
    /// See [`GrantError`].
    pub fn grant(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        span: Span,
        access: Access,
        may: impl Fn() -> bool,
    ) -> Result<(), GrantError> {
        let done = self.try_grant(space, from, span, access, may);
        match &done {
            Ok(()) => self.counters.grants.add(1),
            Err(_) => self.counters.grants_failed.add(1),
        }
        done
    }

    fn try_grant(
        &self,
        space: &Arc<Space>,
        from: FileOffset,
        span: Span,
        access: Access,
        may: impl Fn() -> bool,
    ) -> Result<(), GrantError> {
        let range = span.0;
        let grant = Grant { space: space.clone(), from, bytes: range.bytes, access };
        if !from.0.is_multiple_of(PAGE_BYTES) || grant.of_file().checked_end().is_none() {
            return Err(GrantError::Invalid("the file range is not whole pages of 4 KiB"));
        }
        let shared = space.invalidate_lock.read();
        let (last, mapped) = extent_of(&grant)?;
        if access == Access::Write {
            // Behaviour 16: blocks are allocated before the grant.
            self.counters.allocations.add(1);
            space.source.allocate(grant.first(), last)?;
        }
        // Counted before the fault: a thread that releases another grant of these pages at the same
        // time must see that this grant covers them, and keep the entries.
        lock(&space.coverage).add(grant.first(), grant.last(), access);
        let shown = self
            .fault(&grant, range.at, grant.first(), last)
            .map_err(GrantError::from)
            .and_then(|()| self.show(range, &grant, mapped, may));
        drop(shared);
        match shown {
            Ok(replaced) => {
                self.release(&replaced);
                Ok(())
            }
            Err(e) => {
                self.release(&[grant]);
                Err(e)
            }
        }
    }

    fn show(
        &self,
        range: WindowRange,
        grant: &Grant,
        mapped: WindowBytes,
        may: impl Fn() -> bool,
    ) -> Result<Vec<Grant>, GrantError> {
        let mut window = self.window.take();
        if !may() {
            return Err(GrantError::Unwanted);
        }
        self.show_piece(&mut window, range, Some((grant, mapped)))?;
        let replaced = window.cut_out(range);
        window.grants.insert(range.at, grant.clone());
        Ok(replaced)
    }

    pub(super) fn show_piece(
        &self,
        window: &mut CheckedOut<'_, Window>,
        range: WindowRange,
        new: Option<(&Grant, WindowBytes)>,
    ) -> Result<(), ShowError> {
        let piece = new.map(|(grant, mapped)| Piece {
            file: grant.space.source.file().clone(),
            from: grant.from,
            bytes: mapped,
        });
        window.layout.show(range, piece.as_ref(), &*self.mapper, self.most_maps())
    }

    /// REMOVEMAPPING: removes the grants in `spans`, of any files, in the order of `spans`. A span
    /// without a grant is no error.
    ///
    /// # Errors
    /// [`GrantError::Window`]: the front-end refused an unmap, and that span and all later spans
    /// are unchanged. Or a span lies in the middle of a map, whose two remaining parts would be
    /// too many maps ([`ShowError::TooMany`]): then only that span is unchanged.
    pub fn revoke(&self, spans: &[Span]) -> Result<(), GrantError> {
        self.revoke_if(spans, || true)
    }

    fn revoke_if(&self, spans: &[Span], may: impl Fn() -> bool) -> Result<(), GrantError> {
        let mut result = Ok(());
        for Span(range) in spans {
            let removed = {
                let mut window = self.window.take();
                if !may() {
                    return result;
                }
                match self.show_piece(&mut window, *range, None) {
                    Ok(()) => {}
                    Err(e @ ShowError::TooMany(_)) => {
                        result = result.and(Err(e.into()));
                        continue;
                    }
                    Err(e) => return Err(e.into()),
                }
                window.cut_out(*range)
            };
            self.release(&removed);
        }
        result
    }

    /// Removes all grants if `may` returns true. `may` is called under the checkout of the window,
    /// so no grant comes in between.
    ///
    /// # Errors
    /// See [`revoke`](Self::revoke).
    pub fn revoke_all(&self, may: impl Fn() -> bool) -> Result<(), GrantError> {
        self.revoke_if(&[self.whole()], may)
    }

    /// Sends every map again, and keeps the grants: for a front-end that has dropped all maps, or a
    /// new front-end.
    ///
    /// # Errors
    /// See [`MapError`]: the error of the first map that fails. The later maps are not sent. The
    /// grants stay, and the next call sends their maps. Until then call only this function or
    /// [`reset`](Self::reset).
    pub fn map_again(&self) -> Result<(), MapError> {
        let window = self.window.take();
        window
            .layout
            .maps()
            .try_for_each(|(at, piece)| self.mapper.map(at, &piece.file, piece.from, piece.bytes))
    }

    /// Drops all grants and maps without a message: the driver has reset the device, and the
    /// front-end has dropped all maps by itself (docs/front-ends.md Q10).
    pub fn reset(&self) {
        let removed: Vec<_> = {
            let mut window = self.window.take();
            window.layout.forget();
            std::mem::take(&mut window.grants).into_values().collect()
        };
        self.release(&removed);
    }

    /// Releases removed grants: entries without another write grant are written back a last time,
    /// and entries without another grant are deleted (behaviour 9).
    pub(super) fn release(&self, removed: &[Grant]) {
        for grant in removed {
            // Another thread must not truncate the file during the last flush: the flush would
            // touch pages behind the end of the file.
            let _shared = grant.space.tracks().then(|| grant.space.invalidate_lock.read());
            lock(&grant.space.coverage).remove(grant.first(), grant.last(), grant.access);
            if let Err(e) = self.clean_or_drop(&grant.space, grant.first(), grant.last()) {
                warn!("the last write-back of a removed grant failed, its stores may be lost: {e}");
            }
        }
    }
}
