// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's open files, and which of them have lost data. After a failed sync each later sync of
//! the file fails, too, until the guest has closed all handles of the file and opens it again.
//! Files are identified by their inode on the host, since one file may have several node ids.

use crate::support::lock::{Mutex, MutexGuard, Rank, lock};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::support::file_id::FileId;

#[derive(Default)]
struct Open {
    handles: u64,
    /// Handles through which the guest may write.
    writers: HashSet<u64>,
    /// A sync of the file has failed since its first handle was opened.
    failed: bool,
}

#[derive(Default)]
struct State {
    /// For each handle the node id and the file. No handle is used twice in a session.
    handles: HashMap<u64, (u64, FileId)>,
    files: HashMap<FileId, Open>,
    /// A SYNCFS has failed. It is not known which files have lost data, so all count as lost.
    all_failed: bool,
}

impl State {
    fn open(&mut self, handle: u64) -> Option<&mut Open> {
        let (_, file) = self.handles.get(&handle)?;
        self.files.get_mut(file)
    }
}

/// Whether a sync or a write-out that ended with `e` may have lost data. With the errnos listed
/// here the kernel has not tried to write. (A disk's errors become EIO, ENOSPC, ENODATA, ENOLINK,
/// ETIMEDOUT, EILSEQ and others.)
pub(crate) fn is_loss(e: &io::Error) -> bool {
    use libc::{EBADF, EINTR, EINVAL, ENOSYS, EOPNOTSUPP, ESPIPE};
    !matches!(e.raw_os_error(), Some(EBADF | EINTR | EINVAL | ENOSYS | EOPNOTSUPP | ESPIPE))
}

/// Whether a SYNCFS that ended with `e` failed before syncfs(2): the file system could not be
/// opened.
fn is_not_begun(e: &io::Error) -> bool {
    use libc::{EACCES, EMFILE, ENFILE, ENOENT, ENOMEM, EPERM, ESTALE};
    matches!(e.raw_os_error(), Some(EACCES | EMFILE | ENFILE | ENOENT | ENOMEM | EPERM | ESTALE))
}

/// Files with lost data that no FSYNC has reported to the guest yet. The loss was found by a
/// write-out of the daemon, or in a file that is no longer mapped. The kernel reports a loss once
/// for each open file, so the daemon keeps it here until an FSYNC reports it.
#[derive(Clone, Default)]
pub(crate) struct Losses(Arc<Mutex<HashSet<FileId>>>);

impl Losses {
    /// Notes that data of the file was lost.
    pub(crate) fn note(&self, file: FileId) {
        lock(&self.0).insert(file);
    }

    fn has(&self, file: FileId) -> bool {
        lock(&self.0).contains(&file)
    }

    fn has_any(&self) -> bool {
        !lock(&self.0).is_empty()
    }

    /// Removes the file. Whether data of it was lost; the caller must report that to the guest.
    fn take(&self, file: FileId) -> bool {
        lock(&self.0).remove(&file)
    }
}

/// State of a file after a RELEASE.
pub(crate) struct Released {
    /// Another handle of the file can write.
    pub(crate) writer_left: bool,
    /// It was the last handle of a file with lost data, and the loss was reported through a handle:
    /// handles opened from now on have lost nothing.
    pub(crate) forgiven: bool,
}

/// The guest's open files and their losses.
pub(crate) struct WritebackErrors {
    state: Mutex<State>,
    losses: Losses,
}

impl WritebackErrors {
    /// Creates the state of a device. `losses` is shared with the write-outs in `dax`.
    pub(crate) fn new(losses: Losses) -> Self {
        Self { state: Mutex::ranked(Rank::Opened, State::default()), losses }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Counts a handle that can't write, opened by the node id `nodeid`.
    pub(crate) fn open(&self, nodeid: u64, handle: u64, file: FileId) {
        let mut state = self.lock();
        state.handles.insert(handle, (nodeid, file));
        state.files.entry(file).or_default().handles += 1;
    }

    /// Counts a handle that can write. Returns whether the file had such a handle before.
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

    /// Removes a handle.
    pub(crate) fn release(&self, handle: u64) -> Released {
        let none = Released { writer_left: false, forgiven: false };
        let mut state = self.lock();
        let Some((_, file)) = state.handles.remove(&handle) else { return none };
        let Some(open) = state.files.get_mut(&file) else { return none };
        open.handles -= 1;
        open.writers.remove(&handle);
        let (is_last, writer_left) = (open.handles == 0, !open.writers.is_empty());
        let forgiven = is_last && open.failed;
        if is_last {
            state.files.remove(&file);
        }
        Released { writer_left, forgiven }
    }

    /// The file of a handle. None for a handle of another node id, or of no open file.
    pub(crate) fn file(&self, nodeid: u64, handle: u64) -> Option<FileId> {
        let (of, file) = *self.lock().handles.get(&handle)?;
        (of == nodeid).then_some(file)
    }

    /// Checks that no data of the handle's file was lost.
    ///
    /// # Errors
    /// EIO if data was lost.
    pub(crate) fn check(&self, handle: u64) -> io::Result<()> {
        let mut state = self.lock();
        let lost = state.handles.get(&handle).is_some_and(|(_, file)| self.losses.has(*file));
        let failed = state.open(handle).is_some_and(|open| open.failed);
        if state.all_failed || failed || lost { Err(Errno::EIO.into()) } else { Ok(()) }
    }

    /// Calls `sync`, which makes the handle's file durable, if no data of the file was lost before.
    ///
    /// # Errors
    /// Those of `sync`; EIO if data was lost before or meanwhile. Each later sync of the file
    /// fails.
    pub(crate) fn sync(
        &self,
        handle: u64,
        sync: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        self.move_loss(handle)?;
        let done = sync();
        if done.as_ref().is_err_and(is_loss)
            && let Some(open) = self.lock().open(handle)
        {
            open.failed = true;
        }
        // The lost page may have been noted by a write-out of this sync, or by another thread
        // during it.
        done.and_then(|()| self.move_loss(handle))
    }

    /// Moves a loss of the handle's file from `losses` to the open file, whose syncs fail from now
    /// on.
    fn move_loss(&self, handle: u64) -> io::Result<()> {
        {
            let mut state = self.lock();
            let file = state.handles.get(&handle).map(|(_, file)| *file);
            if file.is_some_and(|file| self.losses.take(file))
                && let Some(open) = state.open(handle)
            {
                open.failed = true;
            }
        }
        self.check(handle)
    }

    /// Calls `sync`, which makes all files durable, if no data was lost before.
    ///
    /// # Errors
    /// Those of `sync`; EIO if data was lost before. After a failure each sync of each file fails.
    pub(crate) fn sync_all(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        {
            let state = self.lock();
            let failed = state.files.values().any(|open| open.failed);
            if state.all_failed || failed || self.losses.has_any() {
                return Err(Errno::EIO.into());
            }
        }
        let done = sync();
        if done.as_ref().is_err_and(|e| is_loss(e) && !is_not_begun(e)) {
            self.lock().all_failed = true;
        }
        done
    }

    /// Drops all handles at the end of the guest's mount. Losses that no FSYNC has reported stay.
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

    /// Shows: after a failed sync of a file each sync of it fails, until all its handles are
    /// closed.
    #[test]
    fn a_failed_sync_counts_until_all_handles_are_closed() {
        let opened = WritebackErrors::new(Losses::default());
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

    /// Shows: a failed sync through one node id of a file (a bind mount) also counts for its other
    /// node ids, and for handles opened later, until all handles are closed.
    #[test]
    fn a_failed_sync_counts_for_each_node_id() {
        let opened = WritebackErrors::new(Losses::default());
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

    /// Shows: a sync that the kernel did not try fails, and later syncs succeed.
    #[test]
    fn an_untried_sync_loses_nothing() {
        let opened = WritebackErrors::new(Losses::default());
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync(0, || Err(Errno::EBADF.into()))), Some(libc::EBADF));
        assert_eq!(errno(opened.sync_all(|| Err(Errno::EINVAL.into()))), Some(libc::EINVAL));
        assert_eq!(errno(opened.sync(0, || Ok(()))), None);
    }

    /// Shows: after a failed SYNCFS the sync of each file fails.
    #[test]
    fn a_failed_syncfs_counts_for_each_file() {
        let opened = WritebackErrors::new(Losses::default());
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync_all(fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(0, || Ok(()))), Some(libc::EIO));
        opened.clear();
        opened.open(5, 1, FILE);
        assert_eq!(errno(opened.sync(1, || Ok(()))), None);
    }

    /// Shows: a loss that was noted before the open, or by another thread, is reported by each
    /// FLUSH and FSYNC until all handles are closed; after a report by FSYNC the next handle has
    /// lost nothing.
    #[test]
    fn a_loss_is_reported() {
        let losses = Losses::default();
        let opened = WritebackErrors::new(losses.clone());
        losses.note(FILE);
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.check(0)), Some(libc::EIO));
        assert!(!opened.release(0).forgiven, "no FSYNC has reported the loss");
        opened.clear();
        opened.open(5, 1, FILE);
        assert_eq!(errno(opened.sync_all(|| Ok(()))), Some(libc::EIO));
        for _ in 0..2 {
            assert_eq!(errno(opened.sync(1, || Ok(()))), Some(libc::EIO));
        }
        assert!(opened.release(1).forgiven);
        opened.open(5, 2, FILE);
        let meanwhile = || {
            losses.note(FILE);
            Ok(())
        };
        assert_eq!(errno(opened.sync(2, meanwhile)), Some(libc::EIO));
    }
}
