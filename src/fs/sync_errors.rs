// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which files are open, and which of them to write; and which have lost data: a sync that failed is never
//! made good by one that succeeds later, until the file has been closed by all and is opened anew. It is the
//! file that counts, not the guest's number for it, of which it may have several.

use crate::support::lock::lock;
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;

use super::identity::FileId;

#[derive(Default)]
struct Open {
    handles: u64,
    /// Those through which the guest may store.
    writers: HashSet<u64>,
    failed: bool,
}

#[derive(Default)]
struct State {
    /// By the handle, which is never used twice: the guest's number, and the file.
    handles: HashMap<u64, (u64, FileId)>,
    files: HashMap<FileId, Open>,
    /// A sync of the whole file system failed: whose pages were lost is not known.
    all_failed: bool,
}

impl State {
    fn open(&mut self, handle: u64) -> Option<&mut Open> {
        let (_, file) = self.handles.get(&handle)?;
        self.files.get_mut(file)
    }
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
pub(crate) struct Opened(Mutex<State>);

impl Opened {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }

    /// A file was opened by the guest's number `nodeid`.
    pub(crate) fn open(&self, nodeid: u64, handle: u64, file: FileId) {
        let mut state = self.lock();
        state.handles.insert(handle, (nodeid, file));
        state.files.entry(file).or_default().handles += 1;
    }

    /// It was, through a handle that can write. Whether it was open so before.
    pub(crate) fn open_to_write(&self, nodeid: u64, handle: u64, file: FileId) -> bool {
        let mut state = self.lock();
        state.handles.insert(handle, (nodeid, file));
        let open = state.files.entry(file).or_default();
        open.handles += 1;
        let before = !open.writers.is_empty();
        open.writers.insert(handle);
        before
    }

    /// Whether the handle can write.
    pub(crate) fn is_writer(&self, handle: u64) -> bool {
        self.lock().open(handle).is_some_and(|open| open.writers.contains(&handle))
    }

    /// A handle was released. Whether another one of its file that can write is left.
    pub(crate) fn release(&self, handle: u64) -> bool {
        let mut state = self.lock();
        let Some((_, file)) = state.handles.remove(&handle) else { return false };
        let Some(open) = state.files.get_mut(&file) else { return false };
        open.handles -= 1;
        open.writers.remove(&handle);
        let left = !open.writers.is_empty();
        if open.handles == 0 {
            state.files.remove(&file);
        }
        left
    }

    /// Which file the handle is of.
    pub(crate) fn file(&self, nodeid: u64, handle: u64) -> Option<FileId> {
        let (of, file) = *self.lock().handles.get(&handle)?;
        (of == nodeid).then_some(file)
    }

    /// Whether the file, as it is open now, has lost nothing.
    ///
    /// # Errors
    /// EIO if it has.
    pub(crate) fn check(&self, handle: u64) -> io::Result<()> {
        let mut state = self.lock();
        let failed = state.open(handle).is_some_and(|open| open.failed);
        if state.all_failed || failed { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// Lets `sync` make the file durable, if that can still be said of it.
    ///
    /// # Errors
    /// Its own, and EIO ever after.
    pub(crate) fn sync(
        &self,
        handle: u64,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        self.check(handle)?;
        let done = sync();
        if lost_data(&done)
            && let Some(open) = self.lock().open(handle)
        {
            open.failed = true;
        }
        done
    }

    /// The same for all files.
    ///
    /// # Errors
    /// Its own, and EIO ever after.
    pub(crate) fn sync_all(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        {
            let state = self.lock();
            if state.all_failed || state.files.values().any(|open| open.failed) {
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
    pub(crate) fn clear(&self) {
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

    const FILE: FileId = FileId { ino: 5, dev: 1 };
    const OTHER: FileId = FileId { ino: 5, dev: 2 };

    /// Shows: after one failure no sync of the file succeeds, until it was closed as often as opened.
    #[test]
    fn a_failure_stays_until_the_file_is_opened_anew() {
        let opened = Opened::default();
        opened.open(5, 0, FILE);
        opened.open(5, 1, FILE);
        opened.open(6, 2, OTHER);
        assert_eq!(errno(opened.sync(0, fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(0, || unreachable!("it is final"))), Some(libc::EIO));
        assert_eq!(errno(opened.sync(2, || Ok(()))), None);
        assert_eq!(errno(opened.sync_all(|| unreachable!("one has failed"))), Some(libc::EIO));
        opened.release(0);
        assert_eq!(errno(opened.check(1)), Some(libc::EIO));
        opened.release(1);
        opened.open(5, 3, FILE);
        assert_eq!(errno(opened.sync(3, || Ok(()))), None);
    }

    /// Shows: what one number of a file has lost is lost for its other number (a bind mount), also for one that
    /// opens it later, until all have closed it.
    #[test]
    fn a_failure_is_the_files_whatever_led_to_it() {
        let opened = Opened::default();
        opened.open(5, 0, FILE);
        opened.open(7, 1, FILE);
        assert_eq!(errno(opened.sync(1, fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(0, || unreachable!("it is final"))), Some(libc::EIO));
        opened.open(8, 2, FILE);
        assert_eq!(errno(opened.check(2)), Some(libc::EIO));
        opened.release(0);
        opened.release(1);
        assert_eq!(errno(opened.check(2)), Some(libc::EIO));
        opened.release(2);
        opened.open(5, 3, FILE);
        assert_eq!(errno(opened.check(3)), None);
        assert_eq!(
            (opened.file(5, 3), opened.file(7, 3), opened.file(5, 0)),
            (Some(FILE), None, None)
        );
    }

    /// Shows: a sync of what can't be synced is an error, and says nothing about later ones.
    #[test]
    fn what_was_not_tried_has_not_failed() {
        let opened = Opened::default();
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync(0, || Err(Errno::EBADF.into()))), Some(libc::EBADF));
        assert_eq!(errno(opened.sync_all(|| Err(Errno::EINVAL.into()))), Some(libc::EINVAL));
        assert_eq!(errno(opened.sync(0, || Ok(()))), None);
    }

    /// Shows: when all were to be synced and that failed, no file is vouched for.
    #[test]
    fn a_failure_of_all_is_everyones() {
        let opened = Opened::default();
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync_all(fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(0, || Ok(()))), Some(libc::EIO));
        opened.clear();
        opened.open(5, 1, FILE);
        assert_eq!(errno(opened.sync(1, || Ok(()))), None);
    }
}
