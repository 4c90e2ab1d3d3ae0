// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! mtime and ctime of a file that a guest may store to through the window. Knows no message and no
//! window.
//!
//! A store through the window makes no request. The host's kernel sees the first store to a clean
//! page, and sets mtime and ctime. It does not see later stores to the page while it is dirty. So
//! the daemon *settles* the times when the guest requests them, and when POSIX requires that they
//! are right (close, fsync, msync):
//!
//! 1. Was anything stored since the times were settled last? Yes, if a write grant was made since
//!    (a guest requests one when it is about to store), or if mtime has changed. On a kernel on
//!    which the first store to a clean page need not change mtime: also if a page is dirty.
//! 2. If so, the dirty pages are written out, which makes them clean, mtime and ctime are set to
//!    now, and both are remembered. The next store is the first one to a clean page, and changes
//!    mtime.
//!
//! An mtime that the guest sets stays: dirty pages are written out before it is set, so that an
//! earlier store can't be mistaken for a later one. A file that the guest does not have open for
//! writing needs no work: all stores were settled when it was closed.
//!
//! In memory (tmpfs) no page becomes clean, and the kernel sees only the first store to each page.
//! There each close and fsync of a file that the guest has open for writing counts as a store,
//! until the guest sets mtime.

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

/// Why times are settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// The guest requests attributes. Does not wait for pages under writeback.
    Look,
    /// POSIX requires that the times are right: a close, an fsync, an msync, or the end of a grant.
    Close,
    /// The guest is about to set mtime.
    Given,
    /// The driver's mount has ended. Does not wait: the next driver waits for this thread.
    End,
}

/// Largest time for which a GETATTR waits for a SETATTR of the same file. A truncation may wait for
/// the front-end, and must not occupy all threads by the GETATTRs that wait for it. After this time
/// a GETATTR returns the attributes without settling them.
const LOOK_WAIT: Duration = Duration::from_millis(100);

/// Shortest tick of the kernel's clock: HZ is at most 1000. [`MORE_THAN_TICKS`] changes within one
/// tick get fewer different times than there are changes.
const TICK: Duration = Duration::from_millis(1);
/// Number of changes of a file in the test for a clock without ticks.
const MORE_THAN_TICKS: u32 = 3;

/// Seconds and nanoseconds.
type Stamp = (i64, i64);

/// The state of the file when its times were settled last.
#[derive(Default)]
struct Seen {
    /// mtime and ctime. None before the first settling after a write grant.
    times: Option<(Stamp, Stamp)>,
    /// In memory only: stores may have been missed.
    unseen: bool,
    /// A page may have stayed dirty: it was under writeback, or a store came during the write-out.
    left: bool,
    /// Stores have changed mtime, and the daemon has not set it since. The next close sets it.
    moved: bool,
    /// Whether two changes always have different times if the first time was read in between (Linux
    /// 6.13 with ext4, xfs, btrfs, tmpfs). Else times have the resolution of the kernel's tick.
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
    /// The guest may store to the file, or has stored since the times were settled last.
    watched: AtomicBool,
    /// A write grant or a store came since the times were settled last.
    stored: AtomicBool,
    /// The thread that has checked this out may do system calls. Taken before the invalidate lock
    /// of the file's space: see `dax`.
    seen: Checkout<Seen>,
}

impl Times {
    /// Creates the times of `file`. Its losses of data are noted in `losses`.
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

    /// A write grant was made. Called before the reply to SETUPMAPPING.
    pub(crate) fn granted(&self) {
        // After the grant: a thread in settle_now() that clears `stored` finds the pages of the
        // grant.
        self.stored.store(true, Ordering::SeqCst);
        self.watched.store(true, Ordering::SeqCst);
    }

    /// The file was opened for writing. `count` counts the handle, and returns whether the file had
    /// such a handle before.
    pub(crate) fn opened(&self, engine: &Engine, space: &Space, count: impl FnOnce() -> bool) {
        let mut seen = self.seen.take();
        let written = space.written();
        if !count() && !written.is_empty() {
            // Earlier stores were made by other processes of the host.
            self.clean(engine, space, &written);
            self.remember(&mut seen);
            seen.unseen = self.in_memory;
        }
        if !written.is_empty() {
            self.watched.store(true, Ordering::SeqCst);
        }
    }

    /// A handle that can write is released. `count` removes it from the count, and returns whether
    /// another one remains.
    pub(crate) fn closed(&self, engine: &Engine, space: &Space, count: impl FnOnce() -> bool) {
        let mut seen = self.seen.take();
        // The FLUSH before RELEASE was the close. This settles stores by mmap after the FLUSH.
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
            // The thread that has it checked out may have looked for stores before the last store.
            None => self.stored.store(true, Ordering::SeqCst),
        }
    }

    /// Calls `change`, which changes attributes of the file. `given`: mtime is one of them.
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

    /// The write grant of `range` was revoked.
    pub(crate) fn removed(&self, range: FileRange) {
        if !self.is_watched() || self.stored.load(Ordering::SeqCst) {
            return;
        }
        // The thread that has it checked out may have looked for stores before the last store.
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
        // Cleared before the granted ranges are read: a grant after that is settled the next time.
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
        // After the write-out: stores before it are older than the new times.
        self.renew(seen);
        // A store during the first write-out may have left its page dirty. It has changed mtime
        // since.
        self.clean(engine, space, &written);
    }

    /// Whether the daemon must set the times, since stores may have been missed or mtime is older
    /// than the last store.
    fn is_stored(&self, seen: &mut Seen, written: &[FileRange], occasion: Occasion) -> bool {
        if written.is_empty() {
            return false;
        }
        let Ok(found) = self.file.metadata() else { return false };
        let (mtime, ctime) = stamps(&found);
        let Some((seen_mtime, seen_ctime)) = seen.times else { return true };
        // An mtime before the remembered ctime, or after the present ctime, was set by
        // utimensat(2).
        let moved = mtime != seen_mtime && mtime >= seen_ctime && mtime <= ctime;
        if moved {
            // A GETATTR needs an mtime that has changed; it need not be later than the last store.
            // The daemon does not set it: the daemon of another VM that maps the file would take
            // that for a store, set mtime in turn, and so on.
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
        // Without these three a store would have changed mtime. Finding dirty pages takes 90 ns for
        // each cached page.
        let may_be_missed = seen.left || seen.fine != Some(true) || mtime != seen_mtime;
        if may_be_missed && self.is_dirty(written) == Some(true) {
            return true;
        }
        seen.left = false;
        seen.times = Some((mtime, ctime));
        false
    }

    /// Whether a page of `written` is dirty. None if the kernel does not report that, or in memory.
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

    /// Waits until no page is under writeback, since a write-out skips such pages. Called without
    /// the checkout, so no other request waits for this.
    fn wait_for_writeback(&self, engine: &Engine, space: &Space) {
        if self.in_memory {
            return;
        }
        for range in space.written() {
            self.note(engine, space, wait_for_writeback(&self.file, range));
        }
    }

    /// Writes out dirty pages, so that the kernel sees the next store to each page.
    fn clean(&self, engine: &Engine, space: &Space, written: &[FileRange]) {
        if self.in_memory {
            return;
        }
        for range in written {
            self.note(engine, space, write_out(&self.file, *range));
        }
    }

    /// Notes that data of the file was lost and not reported to the guest.
    pub(crate) fn note_loss(&self) {
        self.losses.note(self.id);
    }

    /// Notes a loss of data. The kernel reports it once, and has reported it to this write-out.
    fn note(&self, engine: &Engine, space: &Space, done: io::Result<()>) {
        match done {
            Err(e) if is_loss(&e) => {
                self.note_loss();
                engine.lost(space, e);
            }
            Err(e) => debug!("pages can't be written out: {e}"),
            Ok(()) => {}
        }
    }

    fn remember(&self, seen: &mut Seen) {
        seen.times = self.file.metadata().ok().as_ref().map(stamps);
        seen.moved = false;
        // A store during the write-out may have left its page dirty.
        seen.left = true;
    }

    /// Sets mtime and ctime after the daemon has stored to the file's memory, which the kernel does
    /// not see.
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
        // Tested once for each file, by more changes than there can be ticks meanwhile.
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
            // utimensat(2): only the owner may set mtime alone; a process with write access may set
            // both.
            Err(Errno::EPERM) => Ok(futimens(&*self.file, &now, &now)?),
            done => Ok(done?),
        }
    }
}
