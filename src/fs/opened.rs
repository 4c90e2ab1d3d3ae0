// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which inodes are open, and which of them to write; and which have lost data: a sync that failed is
//! never made good by one that succeeds later, until the file has been closed by all and is opened anew.

use crate::lock::lock;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;

#[derive(Default)]
struct Open {
    handles: u64,
    /// Those through which the guest may store.
    writers: HashSet<u64>,
    failed: bool,
}

#[derive(Default)]
struct State {
    inodes: HashMap<u64, Open>,
    /// A sync of the whole file system failed: whose pages were lost is not known.
    all_failed: bool,
}

/// Whether a sync failed; one that the file system would not even try has lost nothing.
fn lost_data(done: &io::Result<()>) -> bool {
    let errno = done.as_ref().err().map(io::Error::raw_os_error);
    !matches!(
        errno,
        None | Some(Some(libc::EBADF | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP))
    )
}

/// The guest's open files.
#[derive(Default)]
pub(super) struct Opened(Mutex<State>);

impl Opened {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// The inode was opened once more.
    pub(super) fn open(&self, nodeid: u64) {
        self.lock().inodes.entry(nodeid).or_default().handles += 1;
    }

    /// It was, through a handle that can write. Whether it was open so before.
    pub(super) fn open_to_write(&self, nodeid: u64, fh: u64) -> bool {
        let mut state = self.lock();
        let open = state.inodes.entry(nodeid).or_default();
        open.handles += 1;
        let before = !open.writers.is_empty();
        open.writers.insert(fh);
        before
    }

    /// Whether the handle can write.
    pub(super) fn is_writer(&self, nodeid: u64, fh: u64) -> bool {
        self.lock().inodes.get(&nodeid).is_some_and(|open| open.writers.contains(&fh))
    }

    /// A handle of the inode was released. Whether another one that can write is left.
    pub(super) fn release(&self, nodeid: u64, fh: u64) -> bool {
        let mut state = self.lock();
        let Some(open) = state.inodes.get_mut(&nodeid) else { return false };
        open.handles -= 1;
        open.writers.remove(&fh);
        let left = !open.writers.is_empty();
        if open.handles == 0 {
            state.inodes.remove(&nodeid);
        }
        left
    }

    /// Whether the inode, as it is open now, has lost nothing.
    ///
    /// # Errors
    /// EIO if it has.
    pub(super) fn check(&self, nodeid: u64) -> io::Result<()> {
        let state = self.lock();
        let failed = state.inodes.get(&nodeid).is_some_and(|open| open.failed);
        if state.all_failed || failed { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// Lets `sync` make the inode durable, if that can still be said of it.
    ///
    /// # Errors
    /// Its own, and EIO ever after.
    pub(super) fn sync(
        &self,
        nodeid: u64,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(nodeid)?;
        let done = sync();
        if lost_data(&done)
            && let Some(open) = self.lock().inodes.get_mut(&nodeid)
        {
            open.failed = true;
        }
        done
    }

    /// The same for all inodes.
    ///
    /// # Errors
    /// Its own, and EIO ever after.
    pub(super) fn sync_all(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        {
            let state = self.lock();
            if state.all_failed || state.inodes.values().any(|open| open.failed) {
                return Err(Errno::EIO.into());
            }
        }
        let done = sync();
        if lost_data(&done) {
            self.lock().all_failed = true;
        }
        done
    }

    /// The guest has gone, and all its handles with it.
    pub(super) fn clear(&self) {
        *self.lock() = State::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fails() -> io::Result<()> {
        Err(Errno::ENOSPC.into())
    }

    fn errno(done: io::Result<()>) -> Option<i32> {
        done.err().and_then(|e| e.raw_os_error())
    }

    /// Shows: after one failure no sync of the inode succeeds, until it was closed as often as opened.
    #[test]
    fn a_failure_stays_until_the_file_is_opened_anew() {
        let opened = Opened::default();
        opened.open(5);
        opened.open(5);
        opened.open(6);
        assert_eq!(errno(opened.sync(5, fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(5, || unreachable!("it is final"))), Some(libc::EIO));
        assert_eq!(errno(opened.sync(6, || Ok(()))), None);
        assert_eq!(errno(opened.sync_all(|| unreachable!("one has failed"))), Some(libc::EIO));
        opened.release(5, 0);
        assert_eq!(errno(opened.check(5)), Some(libc::EIO));
        opened.release(5, 0);
        opened.open(5);
        assert_eq!(errno(opened.sync(5, || Ok(()))), None);
    }

    /// Shows: a sync of what can't be synced is an error, and says nothing about later ones.
    #[test]
    fn what_was_not_tried_has_not_failed() {
        let opened = Opened::default();
        opened.open(5);
        assert_eq!(errno(opened.sync(5, || Err(Errno::EBADF.into()))), Some(libc::EBADF));
        assert_eq!(errno(opened.sync_all(|| Err(Errno::EINVAL.into()))), Some(libc::EINVAL));
        assert_eq!(errno(opened.sync(5, || Ok(()))), None);
    }

    /// Shows: when all were to be synced and that failed, no inode is vouched for.
    #[test]
    fn a_failure_of_all_is_everyones() {
        let opened = Opened::default();
        opened.open(5);
        assert_eq!(errno(opened.sync_all(fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(5, || Ok(()))), Some(libc::EIO));
        opened.clear();
        opened.open(5);
        assert_eq!(errno(opened.sync(5, || Ok(()))), None);
    }
}
