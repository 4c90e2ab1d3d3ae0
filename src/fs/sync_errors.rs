// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which files are open, and which of them to write; and which have lost data: a sync that failed
//! is never made good by one that succeeds later, until the file has been closed by all and is
//! opened anew. It is the file that counts, not the guest's number for it, of which it may have
//! several.

use crate::support::lock::{Mutex, MutexGuard, Rank, lock};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use nix::errno::Errno;

use crate::support::file_id::FileId;

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

/// Whether a sync or a write-out that ended with `e` may have lost data. One that the file system
/// did not even try has not. (The kernel makes errnos of a disk's errors: EIO, ENOSPC, ENODATA,
/// ENOLINK, ETIMEDOUT, EILSEQ ...)
pub(crate) fn is_loss(e: &io::Error) -> bool {
    use libc::{EBADF, EINTR, EINVAL, ENOSYS, EOPNOTSUPP, ESPIPE};
    !matches!(e.raw_os_error(), Some(EBADF | EINTR | EINVAL | ENOSYS | EOPNOTSUPP | ESPIPE))
}

/// Whether a SYNCFS that ended with `e` could not even open the file system.
fn is_not_begun(e: &io::Error) -> bool {
    use libc::{EACCES, EMFILE, ENFILE, ENOENT, ENOMEM, EPERM, ESTALE};
    matches!(e.raw_os_error(), Some(EACCES | EMFILE | ENFILE | ENOENT | ENOMEM | EPERM | ESTALE))
}

/// Files whose data was lost by a write-out of our own, or by one of a file that is not mapped any
/// more, and whose guest has not been told of it by an FSYNC. The kernel tells of a loss once:
/// whoever asked it has to pass that on.
#[derive(Clone, Default)]
pub(crate) struct Losses(Arc<Mutex<HashSet<FileId>>>);

impl Losses {
    /// Data of the file was lost.
    pub(crate) fn note(&self, file: FileId) {
        lock(&self.0).insert(file);
    }

    fn has(&self, file: FileId) -> bool {
        lock(&self.0).contains(&file)
    }

    fn has_any(&self) -> bool {
        !lock(&self.0).is_empty()
    }

    /// Whether data of the file was lost. The caller tells the guest of it.
    fn take(&self, file: FileId) -> bool {
        lock(&self.0).remove(&file)
    }
}

/// What a RELEASE leaves.
pub(crate) struct Released {
    /// Another handle of the file can write.
    pub(crate) writer_left: bool,
    /// It was the file's last handle, and the guest has been told by it, or one before it, that
    /// data was lost: what is opened from now on starts anew.
    pub(crate) forgiven: bool,
}

/// The guest's open files.
pub(crate) struct WritebackErrors {
    state: Mutex<State>,
    losses: Losses,
}

impl WritebackErrors {
    /// With the losses that others find.
    pub(crate) fn new(losses: Losses) -> Self {
        Self { state: Mutex::ranked(Rank::Opened, State::default()), losses }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
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

    /// A handle was released.
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
        let lost = state.handles.get(&handle).is_some_and(|(_, file)| self.losses.has(*file));
        let failed = state.open(handle).is_some_and(|open| open.failed);
        if state.all_failed || failed || lost { Err(Errno::EIO.into()) } else { Ok(()) }
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
        self.tell(handle)?;
        let done = sync();
        if done.as_ref().is_err_and(is_loss)
            && let Some(open) = self.lock().open(handle)
        {
            open.failed = true;
        }
        // A write-out that this sync began, or that another thread did meanwhile, may have met the
        // error.
        done.and_then(|()| self.tell(handle))
    }

    /// Tells the guest of a loss, from now on each time.
    fn tell(&self, handle: u64) -> io::Result<()> {
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

    /// The same for all files.
    ///
    /// # Errors
    /// Its own, and EIO ever after.
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

    /// The guest has gone, and all its handles with it. What it was not told of, the next one is.
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

    /// Shows: after one failure no sync of the file succeeds, until it was closed as often as
    /// opened.
    #[test]
    fn a_failure_stays_until_the_file_is_opened_anew() {
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

    /// Shows: what one number of a file has lost is lost for its other number (a bind mount), also
    /// for one that opens it later, until all have closed it.
    #[test]
    fn a_failure_is_the_files_whatever_led_to_it() {
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

    /// Shows: a sync of what can't be synced is an error, and says nothing about later ones.
    #[test]
    fn what_was_not_tried_has_not_failed() {
        let opened = WritebackErrors::new(Losses::default());
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync(0, || Err(Errno::EBADF.into()))), Some(libc::EBADF));
        assert_eq!(errno(opened.sync_all(|| Err(Errno::EINVAL.into()))), Some(libc::EINVAL));
        assert_eq!(errno(opened.sync(0, || Ok(()))), None);
    }

    /// Shows: when all were to be synced and that failed, no file is vouched for.
    #[test]
    fn a_failure_of_all_is_everyones() {
        let opened = WritebackErrors::new(Losses::default());
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.sync_all(fails)), Some(libc::ENOSPC));
        assert_eq!(errno(opened.sync(0, || Ok(()))), Some(libc::EIO));
        opened.clear();
        opened.open(5, 1, FILE);
        assert_eq!(errno(opened.sync(1, || Ok(()))), None);
    }

    /// Shows: a loss that was found before the file was opened, or by somebody else, is told by a
    /// FLUSH each time, and by an FSYNC until all have closed the file; a file that was told of it
    /// starts anew then.
    #[test]
    fn a_loss_is_told_of_by_an_fsync() {
        let losses = Losses::default();
        let opened = WritebackErrors::new(losses.clone());
        losses.note(FILE);
        opened.open(5, 0, FILE);
        assert_eq!(errno(opened.check(0)), Some(libc::EIO));
        assert!(!opened.release(0).forgiven, "a FLUSH is easily missed");
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
