// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk that loses unsynced writes, as at a power failure: a FUSE file system with the one file
//! `disk`, on which a loop device is set up.
//!
//! The disk keeps two images: the written one and the durable one. A sync copies the unsynced
//! writes to the durable image. After `lose_power` the disk refuses writes and syncs, and `recover`
//! makes an image that a real disk could hold then: the durable image plus any subset of the
//! sectors written since the last sync, applied in the order of the writes.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry,
    ReplyOpen, ReplyWrite, Request, Session, WriteFlags,
};

/// The unit that a disk writes completely or not at all, in bytes.
const SECTOR: usize = 512;
const DISK: INodeNo = INodeNo(2);
/// The name of the only file.
pub const NAME: &str = "disk";

struct State {
    written: File,
    durable: File,
    /// Writes since the last sync, in order: offset and bytes.
    unsynced: Vec<(u64, Vec<u8>)>,
    held: bool,
    lost: bool,
}

/// The disk. Clones share one state.
#[derive(Clone)]
pub struct LossyDisk {
    state: Arc<Mutex<State>>,
    changed: Arc<Condvar>,
    bytes: u64,
}

/// Which of the unsynced sectors survive the power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survivors {
    None,
    /// Each sector with a probability of 1/2; the value is the random seed.
    Some(u64),
    All,
}

impl LossyDisk {
    pub fn new(bytes: u64) -> Self {
        let image = || {
            let file = tempfile::tempfile_in("/dev/shm").expect("a file in memory");
            file.set_len(bytes).expect("set its length");
            file
        };
        let unsynced = Vec::new();
        let state =
            State { written: image(), durable: image(), unsynced, held: false, lost: false };
        Self { state: Arc::new(Mutex::new(state)), changed: Arc::default(), bytes }
    }

    /// A snapshot of the disk as after a power failure at this moment; the disk itself stays in
    /// use.
    pub fn copy(&self) -> io::Result<Self> {
        let copy = Self::new(self.bytes);
        let state = self.lock();
        let mut new = copy.lock();
        copy_sparse(&state.durable, &new.durable, self.bytes)?;
        new.unsynced.clone_from(&state.unsynced);
        new.lost = true;
        drop(new);
        Ok(copy)
    }

    /// Mounts the disk as `dir/disk`, in the mount namespace of the calling thread.
    pub fn mount(&self, dir: &Path) -> io::Result<BackgroundSession> {
        let mut config = Config::default();
        // Several threads, so that a held sync does not block the writes behind it.
        config.n_threads = Some(4);
        Session::new(self.clone(), dir, &config)?.spawn()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Blocks every sync until power is lost. A guest that gets its flush acknowledged after this
    /// call got it without a sync.
    pub fn hold_syncs(&self) {
        self.lock().held = true;
    }

    /// Simulates the power failure: every later write and sync fails.
    pub fn lose_power(&self) {
        self.lock().lost = true;
        self.changed.notify_all();
    }

    /// Number of writes since the last sync.
    pub fn unsynced(&self) -> usize {
        self.lock().unsynced.len()
    }

    /// Writes the image that is found after the power failure to `to`.
    pub fn recover(&self, to: &File, survivors: Survivors) -> io::Result<()> {
        let state = self.lock();
        copy_sparse(&state.durable, to, self.bytes)?;
        let mut coin = match survivors {
            Survivors::Some(seed) => seed | 1,
            _ => 1,
        };
        for (at, bytes) in &state.unsynced {
            for (n, sector) in bytes.chunks(SECTOR).enumerate() {
                // xorshift64
                coin ^= coin << 13;
                coin ^= coin >> 7;
                coin ^= coin << 17;
                let survives = match survivors {
                    Survivors::None => false,
                    Survivors::Some(_) => coin & 1 == 1,
                    Survivors::All => true,
                };
                if survives {
                    to.write_all_at(sector, at + (n * SECTOR) as u64)?;
                }
            }
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.lock();
        if state.lost {
            return Err(io::ErrorKind::Other.into());
        }
        state.written.write_all_at(bytes, at)?;
        state.unsynced.push((at, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let state = self.lock();
        let mut state = self.changed.wait_while(state, |s| s.held && !s.lost).unwrap();
        if state.lost {
            return Err(io::ErrorKind::Other.into());
        }
        let unsynced = std::mem::take(&mut state.unsynced);
        unsynced.iter().try_for_each(|(at, bytes)| state.durable.write_all_at(bytes, *at))
    }

    fn attr(&self, inode: INodeNo) -> Option<FileAttr> {
        let (kind, size) = match inode {
            INodeNo::ROOT => (FileType::Directory, 0),
            DISK => (FileType::RegularFile, self.bytes),
            _ => return None,
        };
        Some(FileAttr {
            ino: inode,
            size,
            blocks: size / 512,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: 0o700,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            flags: 0,
            blksize: 4096,
        })
    }
}

fn copy_sparse(from: &File, to: &File, bytes: u64) -> io::Result<()> {
    use nix::unistd::{Whence, lseek};
    to.set_len(0)?;
    to.set_len(bytes)?;
    let mut at = 0;
    let mut buffer = vec![0; 1 << 20];
    while let Ok(data) = lseek(from, at, Whence::SeekData) {
        let end = lseek(from, data, Whence::SeekHole)?;
        at = data;
        while at < end {
            let now = (end - at).min(buffer.len() as i64) as usize;
            from.read_exact_at(&mut buffer[..now], at as u64)?;
            to.write_all_at(&buffer[..now], at as u64)?;
            at += now as i64;
        }
    }
    Ok(())
}

const ALWAYS: Duration = Duration::from_secs(1 << 20);

impl Filesystem for LossyDisk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.attr(DISK).filter(|_| parent == INodeNo::ROOT && name == NAME) {
            Some(attr) => reply.entry(&ALWAYS, &attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.attr(inode) {
            Some(attr) => reply.attr(&ALWAYS, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        bytes: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let mut data = vec![0; (self.bytes.saturating_sub(at)).min(bytes.into()) as usize];
        match self.lock().written.read_exact_at(&mut data, at) {
            Ok(()) => reply.data(&data),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match LossyDisk::write(self, at, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(_) => reply.error(Errno::EIO),
        }
    }

    /// FLUSH, sent at close(2), is not a sync.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.sync() {
            Ok(()) => reply.ok(),
            Err(_) => reply.error(Errno::EIO),
        }
    }
}

/// Shows: synced sectors survive; of the unsynced sectors none, all, or some whole sectors survive,
/// as requested.
#[test]
fn any_sectors_may_survive() {
    let disk = LossyDisk::new(1 << 20);
    let (old, new) = (vec![1; 64 * SECTOR], vec![2; 64 * SECTOR]);
    disk.write(4096, &old).unwrap();
    disk.sync().unwrap();
    disk.write(4096, &new).unwrap();
    disk.lose_power();
    assert!(
        disk.write(0, &old).is_err() && disk.sync().is_err(),
        "a write or a sync after the power failure succeeded"
    );
    let found = |disk: &LossyDisk, survivors| {
        let image = tempfile::tempfile().unwrap();
        disk.recover(&image, survivors).unwrap();
        let mut found = vec![0; 64 * SECTOR];
        image.read_exact_at(&mut found, 4096).unwrap();
        found
    };
    for disk in [&disk, &disk.copy().unwrap()] {
        assert!(found(disk, Survivors::None) == old);
        assert!(found(disk, Survivors::All) == new);
        let some = found(disk, Survivors::Some(9));
        let whole = |sector: &[u8]| sector.iter().all(|byte| *byte == sector[0]);
        assert!(some.chunks(SECTOR).all(whole) && some != old && some != new);
    }
}
