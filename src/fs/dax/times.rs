// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The times of a file that a guest may store to by itself. Knows no message, and no window.
//!
//! A store through the window makes no request. The host's kernel sees the first one to a clean
//! page, and sets mtime and ctime; of those to a page that is dirty already it sees nothing. So
//! whenever the guest asks for the times, or POSIX wants them to be right (close, fsync, msync),
//! they are *settled*:
//!
//! 1. Was anything stored since they were settled last? It was if a write grant came (a guest asks
//!    for one with a store in hand), or if mtime has moved on; and where it need not move with each
//!    first store, if a page is dirty.
//! 2. If so: the pages are made clean, mtime and ctime become now, and both are remembered. The
//!    next store meets a clean page again, and moves mtime.
//!
//! What the guest sets by itself stays: the pages are made clean first, so that what was stored
//! before can't be taken for a later store. A file that nobody has open for writing costs nothing:
//! all stores were settled when it was closed.
//!
//! In memory (tmpfs) no page is ever clean, and only the first store to each is seen. There a file
//! that the guest has open for writing is taken for stored to at each close and fsync, until the
//! guest sets its times.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use log::debug;
use nix::errno::Errno;
use nix::sys::stat::futimens;
use nix::sys::time::TimeSpec;

use crate::dax::engine::{Engine, Space};
use crate::dax::sync::{CheckedOut, Checkout};
use crate::fs::sync_errors::{Losses, is_loss};
use crate::persist::Backing;
use crate::persist::dirty::{dirty_pages, wait_for_writeback, write_out};
use crate::support::file_id::FileId;
use crate::support::lock::Rank;
use crate::support::units::FileRange;

/// When times are settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// The guest asks for attributes. Waits for no page that is on its way to the disk.
    Look,
    /// POSIX wants the times to be right: a close, an fsync, an msync, or the end of a grant.
    Close,
    /// The guest is about to set mtime by itself.
    Given,
    /// The driver is over. Waits for nothing: the next one waits for this.
    End,
}

/// How long a look waits for a request that is changing the attributes of the same file: a
/// truncation may wait for the front-end, and looks must not take all threads. One that has waited
/// in vain tells of the attributes as they are.
const LOOK_WAIT: Duration = Duration::from_millis(100);

/// The shortest tick of a kernel's clock (HZ is at most 1000). [`MORE_THAN_TICKS`] changes within
/// one tick see fewer ticks than there are changes.
const TICK: Duration = Duration::from_millis(1);
const MORE_THAN_TICKS: u32 = 3;

/// Seconds and nanoseconds.
type Stamp = (i64, i64);

/// What was seen last, when nothing that had been stored was left unseen.
#[derive(Default)]
struct Seen {
    /// mtime and ctime. None before the first write grant was settled.
    times: Option<(Stamp, Stamp)>,
    /// In memory: there may be stores that can't be seen.
    unseen: bool,
    /// A page may have been left dirty: it was under writeback, or a store met the write-out.
    left: bool,
    /// Stores have moved mtime, and mtime was not set since: a close sets it.
    moved: bool,
    /// Whether two changes never have the same time, once one of them was looked at (Linux 6.13,
    /// ext4, xfs, btrfs, tmpfs); else the kernel's clock has ticks.
    fine: Option<bool>,
}

fn stamps(found: &Metadata) -> (Stamp, Stamp) {
    ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()))
}

/// The times of one file.
pub(crate) struct Times {
    file: Arc<File>,
    id: FileId,
    losses: Losses,
    in_memory: bool,
    /// The guest may store, or has stored since the times were settled last.
    watched: AtomicBool,
    /// Something was stored since then, or is about to be.
    stored: AtomicBool,
    /// Whoever has it may do system calls. Above the invalidate lock of the file's space: see
    /// `dax`.
    seen: Checkout<Seen>,
}

impl Times {
    /// Of `file`, whose losses of data are noted in `losses`.
    pub(crate) fn new(file: Arc<File>, id: FileId, backing: Backing, losses: Losses) -> Self {
        Self {
            file,
            id,
            losses,
            in_memory: backing == Backing::Memory,
            watched: AtomicBool::new(false),
            stored: AtomicBool::new(false),
            seen: Checkout::new(Rank::Times, Seen::default()),
        }
    }

    /// Whether the guest may store to the file, or has stored to it since its times were settled.
    pub(crate) fn is_watched(&self) -> bool {
        self.watched.load(Ordering::SeqCst)
    }

    /// A write grant was made, and is not yet answered.
    pub(crate) fn granted(&self) {
        // Behind the grant: whoever takes this back finds its pages among those to be made clean.
        self.stored.store(true, Ordering::SeqCst);
        self.watched.store(true, Ordering::SeqCst);
    }

    /// The file was opened for writing; `count` counts that, and tells whether it was open so
    /// before.
    pub(crate) fn opened(&self, engine: &Engine, space: &Space, count: impl FnOnce() -> bool) {
        let mut seen = self.seen.take();
        let written = space.written();
        if !count() && !written.is_empty() {
            // What came since it was closed is not this guest's.
            self.clean(engine, space, &written);
            self.remember(&mut seen);
            seen.unseen = self.in_memory;
        }
        if !written.is_empty() {
            self.watched.store(true, Ordering::SeqCst);
        }
    }

    /// A handle that could write is about to go; `count` counts that, and tells whether another one
    /// stays.
    pub(crate) fn closed(&self, engine: &Engine, space: &Space, count: impl FnOnce() -> bool) {
        let mut seen = self.seen.take();
        // Not a close: that was its FLUSH. A store by mmap behind that is settled here.
        self.settle_now(&mut seen, engine, space, Occasion::Look);
        if !count() {
            self.watched.store(false, Ordering::SeqCst);
        }
    }

    /// Settles the times.
    pub(crate) fn settle(&self, engine: &Engine, space: &Space, occasion: Occasion) {
        if !self.is_watched() {
            return;
        }
        let seen = match occasion {
            Occasion::Look => self.seen.take_within(LOOK_WAIT),
            Occasion::End => self.seen.take_within(Duration::ZERO),
            Occasion::Close | Occasion::Given => {
                self.wait_for_writeback(engine, space);
                Some(self.seen.take())
            }
        };
        match seen {
            Some(mut seen) => self.settle_now(&mut seen, engine, space, occasion),
            // Whoever has it may have looked before the last store.
            None => self.stored.store(true, Ordering::SeqCst),
        }
    }

    /// Lets `change` change attributes of the file, mtime among them if it is `given`.
    pub(crate) fn change<T>(
        &self,
        engine: &Engine,
        space: &Space,
        given: bool,
        change: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        if !self.is_watched() {
            return change();
        }
        if given {
            self.wait_for_writeback(engine, space);
        }
        let mut seen = self.seen.take();
        let occasion = if given { Occasion::Given } else { Occasion::Look };
        self.settle_now(&mut seen, engine, space, occasion);
        let done = change();
        if done.is_ok() {
            self.remember(&mut seen);
            seen.unseen &= !given;
        }
        done
    }

    /// `range` was granted for writing, and is not any more.
    pub(crate) fn removed(&self, range: FileRange) {
        if !self.is_watched() || self.stored.load(Ordering::SeqCst) {
            return;
        }
        // Whoever has it may have looked before the last store.
        let seen = self.seen.take_within(Duration::ZERO);
        if seen.is_none_or(|mut seen| self.is_stored(&mut seen, &[range], Occasion::Close)) {
            self.stored.store(true, Ordering::SeqCst);
        }
    }

    fn settle_now(
        &self,
        seen: &mut CheckedOut<'_, Seen>,
        engine: &Engine,
        space: &Space,
        occasion: Occasion,
    ) {
        // Before the pages are looked up: a grant that comes meanwhile is the next one's.
        let granted = self.stored.swap(false, Ordering::SeqCst);
        let written = space.written();
        seen.unseen |= granted && self.in_memory;
        let unseen = seen.unseen && occasion == Occasion::Close;
        if !(granted || unseen || self.is_stored(seen, &written, occasion)) {
            return;
        }
        self.clean(engine, space, &written);
        if occasion == Occasion::Given {
            return;
        }
        // Behind the write-out: a store that came before it is older than the new times.
        self.renew(seen);
        // What was stored meanwhile has moved mtime on from what is remembered.
        self.clean(engine, space, &written);
    }

    /// Whether something was stored since the times were settled, as far as can be told, that mtime
    /// does not tell of.
    fn is_stored(&self, seen: &mut Seen, written: &[FileRange], occasion: Occasion) -> bool {
        if written.is_empty() {
            return false;
        }
        let Ok(found) = self.file.metadata() else { return false };
        let (mtime, ctime) = stamps(&found);
        let Some((seen_mtime, seen_ctime)) = seen.times else { return true };
        // One that was set by somebody is older, or lies in the future.
        let moved = mtime != seen_mtime && mtime >= seen_ctime && mtime <= ctime;
        if moved {
            // A look sees that mtime has moved; it need not be later than the last store. To set it
            // would look like a store to a daemon of another VM that has mapped the file, which
            // would set it in its turn.
            let is_clean = self.in_memory || self.is_dirty(written) == Some(false);
            if occasion != Occasion::Look || !is_clean {
                return true;
            }
            seen.times = Some((mtime, ctime));
            seen.moved = true;
            return false;
        }
        if seen.moved && matches!(occasion, Occasion::Close | Occasion::End) {
            return true;
        }
        // Else it would have moved, unless somebody on the host has set it since. To ask costs 90
        // ns for each page that is cached.
        let may_be_missed = seen.left || seen.fine != Some(true) || mtime != seen_mtime;
        if may_be_missed && self.is_dirty(written) == Some(true) {
            return true;
        }
        seen.left = false;
        seen.times = Some((mtime, ctime));
        false
    }

    /// None where the system does not tell, or all pages count as dirty.
    fn is_dirty(&self, written: &[FileRange]) -> Option<bool> {
        if self.in_memory {
            return None;
        }
        for range in written {
            if dirty_pages(&self.file, *range).ok()? > 0 {
                return Some(true);
            }
        }
        Some(false)
    }

    /// Waits until no page is under writeback: a write-out leaves those out. Nobody else waits
    /// meanwhile.
    fn wait_for_writeback(&self, engine: &Engine, space: &Space) {
        if self.in_memory {
            return;
        }
        for range in space.written() {
            self.note(engine, space, wait_for_writeback(&self.file, range));
        }
    }

    /// Writes the dirty pages out, so that the next store to each is seen.
    fn clean(&self, engine: &Engine, space: &Space, written: &[FileRange]) {
        if self.in_memory {
            return;
        }
        for range in written {
            self.note(engine, space, write_out(&self.file, *range));
        }
    }

    /// Data of the file was lost, and the guest may not have been told.
    pub(crate) fn has_lost(&self) {
        self.losses.note(self.id);
    }

    /// The kernel tells of lost pages once, and has now told us.
    fn note(&self, engine: &Engine, space: &Space, done: io::Result<()>) {
        match done {
            Err(e) if is_loss(&e) => {
                self.has_lost();
                engine.lost(space, e);
            }
            Err(e) => debug!("pages can't be written out: {e}"),
            Ok(()) => {}
        }
    }

    fn remember(&self, seen: &mut Seen) {
        seen.times = self.file.metadata().ok().as_ref().map(stamps);
        seen.moved = false;
        // A store that met the write-out may have left its page dirty.
        seen.left = true;
    }

    /// The daemon itself has changed the file's bytes, and not by a system call.
    pub(crate) fn touch(&self) {
        if let Err(e) = self.set_now() {
            debug!("times can't be set: {e}");
        }
    }

    /// Sets mtime and ctime to now, and remembers them.
    fn renew(&self, seen: &mut Seen) {
        self.touch();
        self.remember(seen);
        if seen.fine.is_some() || self.in_memory {
            return;
        }
        // Tried once for each file: more changes than there can be ticks.
        let began = Instant::now();
        for _ in 0..MORE_THAN_TICKS {
            let before = seen.times;
            self.touch();
            self.remember(seen);
            if seen.times <= before {
                seen.fine = Some(false);
                return;
            }
        }
        if began.elapsed() < TICK {
            seen.fine = Some(true);
        }
    }

    fn set_now(&self) -> io::Result<()> {
        let (omit, now) = (TimeSpec::UTIME_OMIT, TimeSpec::UTIME_NOW);
        match futimens(&*self.file, &omit, &now) {
            // Only the owner may set one of the two; whoever may write, both.
            Err(Errno::EPERM) => Ok(futimens(&*self.file, &now, &now)?),
            done => Ok(done?),
        }
    }
}
