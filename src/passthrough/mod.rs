// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside step 5 of 6: files that claim to be longer than any map of them. Knows no virtio, no
//! window.
//!
//! QEMU refuses a map that ends past the end of the file, and Linux guests always ask for whole
//! 2 MiB, so the last range of nearly every file can't be mapped from the file itself. A FUSE inode
//! has the length that its server says, and with FUSE passthrough (Linux >= 6.9) a map of it *is* a
//! map of the backing file: the kernel puts the backing file into the mapping, so page faults,
//! stores, truncation and writeback meet the real inode, and nothing of FUSE is in their way.
//!
//! What such a map shows past the end of the file is what any map of the file shows there: zeros to
//! the end of the last page, then SIGBUS, until the file has grown. Keeping the guest away from
//! there is the caller's business.
//!
//! # Who holds what
//!
//! | what | lives until |
//! |---|---|
//! | [`PassthroughMount`]: the mount, the connection, one thread | it is dropped; kill -9 ends them all the same; aborted, they are made anew |
//! | [`PassthroughFile`]: one inode, one backing id | it is dropped |
//! | a map of it, in any process | it is unmapped, whatever became of the two above |
//!
//! The mount is detached: it is in no mount table, needs no directory, and works from any mount
//! namespace, since files are opened relative to its descriptor.
//!
//! A descriptor outlives its [`PassthroughMount`] as well, and can still be mapped, and measured with
//! `lseek`; what needs the server (`fstat` after a map, `fstatfs`) then gets ENOTCONN.
//!
//! # Needs
//!
//! No fork without exec while there is a [`PassthroughMount`]: the child would keep the connection open, and
//! whoever asks something of it after the [`PassthroughMount`] is gone would wait for the child to end.
//!
//! CAP_SYS_ADMIN in [`PassthroughMount::new`], and in the threads that call [`PassthroughMount::open`] and drop a
//! [`PassthroughFile`]: the kernel asks for it each time a backing id is made or closed. A process
//! that has it not has a [`Mounter`]: [`PassthroughMount::by`].

mod backing_id;
pub mod broker;
mod mount;
mod protocol;
mod server;

use std::fs::File;
use std::io::{self, PipeWriter};
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use log::{error, warn};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::fs::{AtFlags, FileType, MemfdFlags, Mode, OFlags, StatxAttributes, StatxFlags};
use thiserror::Error;

use self::backing_id::BackingId;
use self::broker::Broker;
use self::server::{Connection, NodeId};
use crate::support::lock::{Mutex, Rank, lock};

/// The length that every passthrough file claims to have.
///
/// QEMU 11.1 wants `lseek(fd, 0, SEEK_END) >= offset + length`, added as u64 and compared as i64.
/// 2^62 is more than any file that ext4 can hold and half of what an off_t can, so rounding it up,
/// or adding a window to it, overflows neither QEMU's arithmetic nor the kernel's; FUSE itself
/// accepts up to 2^63 - 1 (`s_maxbytes`, `fuse_valid_size`).
pub const CLAIMED_BYTES: u64 = 1 << 62;

/// Why this host has no passthrough files.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// The device node.
    #[error("no FUSE: /dev/fuse can't be opened: {0}")]
    Device(io::Error),
    /// What every step from here on needs.
    #[error("not permitted to make a FUSE mount: CAP_SYS_ADMIN is needed ({0} fails)")]
    NotPermitted(&'static str),
    /// The kernel's answer to the handshake.
    #[error(
        "the kernel has no FUSE passthrough (FUSE {major}.{minor}): Linux >= 6.9 with \
         CONFIG_FUSE_PASSTHROUGH is needed"
    )]
    NoPassthrough {
        /// Of the protocol.
        major: u32,
        /// Of the protocol. 40 is the first that can have it.
        minor: u32,
    },
    /// A root without /proc.
    #[error("a daemon in a chroot can't watch what is mapped")]
    Chroot,
    /// RLIMIT_FSIZE.
    #[error("the limit of the length of files (RLIMIT_FSIZE) permits no file of {0} bytes")]
    FileSizeLimit(usize),
    /// All was granted, but a file that was opened in trial is not the file behind it.
    #[error("FUSE passthrough was granted, but does not pass through: {0}")]
    NotPassedThrough(io::Error),
    /// Anything else.
    #[error("a private FUSE mount can't be made: {step}: {cause}")]
    Host {
        /// Which step failed.
        step: &'static str,
        /// The system's answer.
        cause: io::Error,
    },
}

impl Unavailable {
    /// What helps.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Chroot => "take --sandbox namespace",
            Self::FileSizeLimit(_) => "raise the limit ('ulimit -f unlimited')",
            _ => "run the daemon as root on Linux 6.9 or newer",
        }
    }

    /// What a step's failure means.
    fn at(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |cause| match cause.raw_os_error() {
            Some(e) if e == Errno::EPERM as i32 => Self::NotPermitted(step),
            _ => Self::Host { step, cause },
        }
    }
}

/// A private FUSE mount whose files are passthrough files that claim to be longer than any map of
/// them. Somebody may abort it (`/sys/fs/fuse/connections`): then the next file makes it anew.
pub struct PassthroughMount {
    mounter: Mounter,
    /// A leaf.
    current: Mutex<Arc<PrivateMount>>,
    /// Whose turn it is to make a new one; held while that is made, by requests for files alone.
    renewal: Mutex<()>,
}

/// What makes the mount, and its backing ids.
#[derive(Debug, Clone, Default)]
pub enum Mounter {
    /// This process, which has CAP_SYS_ADMIN.
    #[default]
    Here,
    /// A broker.
    Broker(Arc<Broker>),
    /// Nothing: no process of the daemon may.
    Unprivileged,
    /// Nothing: the process has a root without /proc.
    Chroot,
}

/// How backing ids of one mount are made.
enum Privilege {
    /// By this process.
    Here,
    /// By a broker, for which the mount has this number.
    Broker(Arc<Broker>, u32),
}

impl Privilege {
    fn open(&self, device: &File, file: BorrowedFd<'_>) -> io::Result<BackingId> {
        match self {
            Self::Here => BackingId::open(device, file),
            Self::Broker(broker, mount) => broker.open(*mount, file),
        }
    }

    fn close(&self, device: &File, backing: BackingId) -> io::Result<()> {
        match self {
            Self::Here => backing.close(device),
            Self::Broker(broker, mount) => {
                broker.close(*mount, backing);
                Ok(())
            }
        }
    }

    /// The connection is to end: a broker holds it open, too.
    fn unmount(&self) {
        if let Self::Broker(broker, mount) = self {
            broker.unmount(*mount);
        }
    }
}

/// One mount, its connection and its thread.
struct PrivateMount {
    connection: Arc<Connection>,
    root: OwnedFd,
    /// The server ends when this is closed.
    stop: Option<PipeWriter>,
    server: Option<JoinHandle<()>>,
}

impl PassthroughMount {
    /// Makes the mount, and tries it with a file in memory.
    ///
    /// # Errors
    /// One clear phrase why this host can't.
    pub fn new() -> Result<Self, Unavailable> {
        Self::by(Mounter::Here)
    }

    /// As [`new`](Self::new); `mounter` performs the steps that need a capability.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub fn by(mounter: Mounter) -> Result<Self, Unavailable> {
        let current = Mutex::new(Arc::new(PrivateMount::new(&mounter)?));
        Ok(Self { mounter, current, renewal: Mutex::ranked(Rank::Renewal, ()) })
    }

    /// A read-write descriptor that maps `file`'s own page cache, and whose length (`fstat`,
    /// `lseek`) is [`CLAIMED_BYTES`].
    ///
    /// Each call makes an inode of its own. Two of the same file are as coherent as two maps of it.
    ///
    /// # Errors
    /// - EBADF: opened with O_PATH.
    /// - EACCES: not opened for reading and writing. The kernel would not mind: it opens the file
    ///   anew by its path, and asks for no permission.
    /// - EINVAL: no regular file.
    /// - EPERM: immutable or append-only, or the caller has no CAP_SYS_ADMIN.
    /// - EFBIG: as long as what it would claim to be.
    /// - ELOOP: on a file system stacked twice (overlayfs over overlayfs, or one of these files).
    /// - EOPNOTSUPP: on a file system that passthrough can't use.
    /// - ENOTCONN: someone aborted the connection, and a new one could not be made.
    pub fn open(&self, file: &File) -> io::Result<PassthroughFile> {
        check(file)?;
        let mount = lock(&self.current).clone();
        match mount.open(file) {
            Err(e) if is_aborted(&e) => self.renewed(&mount)?.open(file),
            done => done,
        }
    }

    /// The mount in the place of `aborted`.
    fn renewed(&self, aborted: &Arc<PrivateMount>) -> io::Result<Arc<PrivateMount>> {
        let _turn = lock(&self.renewal);
        let current = lock(&self.current).clone();
        if !Arc::ptr_eq(&current, aborted) {
            return Ok(current); // Somebody else was quicker.
        }
        let new = PrivateMount::new(&self.mounter).map(Arc::new).map_err(|e| {
            error!(
                "the private FUSE mount was aborted, and a new one can't be had ({e}): no file can be mapped \
                 until the daemon is started again"
            );
            io::Error::from(Errno::ENOTCONN)
        })?;
        warn!(
            "the private FUSE mount was aborted; there is a new one, and what is mapped stays mapped"
        );
        let old = std::mem::replace(&mut *lock(&self.current), new.clone());
        drop(old); // Waits for its thread: not under the lock.
        Ok(new)
    }
}

impl PrivateMount {
    fn new(mounter: &Mounter) -> Result<Self, Unavailable> {
        let (device, root, privilege) = match mounter {
            Mounter::Unprivileged => return Err(Unavailable::NotPermitted("fsopen")),
            Mounter::Chroot => return Err(Unavailable::Chroot),
            Mounter::Here => {
                let prepared = mount::prepare()?;
                let root = prepared.mount()?;
                (prepared.device, root, Privilege::Here)
            }
            Mounter::Broker(broker) => {
                let (mount, device, root) = broker.mount()?;
                (device, root, Privilege::Broker(broker.clone(), mount))
            }
        };
        server::handshake(&device)?;
        let (stopped, stop) = io::pipe().map_err(Unavailable::at("pipe"))?;
        let connection = Arc::new(Connection::new(device, privilege));
        let theirs = connection.clone();
        let server = std::thread::Builder::new()
            .name("passthrough".into())
            .spawn(move || server::serve(&theirs, &stopped))
            .map_err(Unavailable::at("thread"))?;
        let made = Self { connection, root, stop: Some(stop), server: Some(server) };
        made.try_it()?;
        Ok(made)
    }

    fn open(&self, file: &File) -> io::Result<PassthroughFile> {
        let node = self.connection.add(file.as_fd())?;
        // From here on it is dropped, and with it the backing id, if anything fails.
        let held = Held { node, connection: Arc::downgrade(&self.connection) };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        // The server has no way to block, so a signal is all that can interrupt this.
        let opened = rustix::io::retry_on_intr(|| {
            rustix::fs::openat(&self.root, node.name(), flags, Mode::empty())
        });
        self.connection.forget_name(node);
        Ok(PassthroughFile { file: Arc::new(File::from(opened?)), _held: held })
    }

    /// What the kernel grants and what it does may differ, by a security module for one.
    fn try_it(&self) -> Result<(), Unavailable> {
        const TOLD: &[u8] = b"vhost-user-dax";
        let memory = rustix::fs::memfd_create("passthrough", MemfdFlags::CLOEXEC)
            .map_err(|e| Unavailable::at("memfd_create")(e.into()))?;
        let memory = File::from(memory);
        let mut seen = [0; TOLD.len()];
        let tried = memory.write_all_at(TOLD, 0).and_then(|()| {
            let passthrough = self.open(&memory)?;
            passthrough.read_exact_at(&mut seen, 0)?;
            Ok(passthrough.metadata()?.len())
        });
        match tried {
            Ok(CLAIMED_BYTES) if seen == TOLD => Ok(()),
            Ok(_) => Err(Unavailable::NotPassedThrough(Errno::EIO.into())),
            Err(e) if e.raw_os_error() == Some(Errno::EPERM as i32) => {
                Err(Unavailable::NotPermitted("FUSE_DEV_IOC_BACKING_OPEN"))
            }
            Err(e) if e.raw_os_error() == Some(Errno::EFBIG as i32) => {
                Err(Unavailable::FileSizeLimit(TOLD.len()))
            }
            Err(e) => Err(Unavailable::NotPassedThrough(e)),
        }
    }
}

impl Drop for PrivateMount {
    fn drop(&mut self) {
        // Whoever holds a map or a descriptor keeps the superblock alive, and the superblock would
        // keep every backing id, so they are closed while there is a connection to close them by.
        self.connection.close_all();
        drop(self.stop.take());
        if self.server.take().is_some_and(|server| server.join().is_err()) {
            warn!("the thread that serves passthrough files panicked");
        }
        // It has closed the connection, so nobody waits for an answer of ours. The mount goes with
        // its descriptor, now or when the last map does.
    }
}

/// A file that claims to be [`CLAIMED_BYTES`] long, and else is the file it was made from.
///
/// Only maps of it, and reads and writes through it, are the real file's. Its attributes are made
/// up, and it can't be synced or resized: `fsync`, `ftruncate` and `fallocate` fail. Locks on it
/// are not locks on the real file.
pub struct PassthroughFile {
    file: Arc<File>,
    _held: Held,
}

impl PassthroughFile {
    /// For those who want to keep it for themselves. It can be mapped for as long as it is kept,
    /// but opened anew (`/proc/self/fd`) only until the [`PassthroughFile`] is dropped.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }
}

impl Deref for PassthroughFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

/// A backing id, for as long as its inode may be opened.
struct Held {
    node: NodeId,
    /// Gone when the [`PassthroughMount`] is, which closes all the ids that are left.
    connection: Weak<Connection>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.upgrade() {
            connection.close(self.node);
        }
    }
}

/// What there is to hear of a connection that was aborted: from the server that has ended, or from
/// the kernel before that.
fn is_aborted(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ECONNREFUSED | Errno::ENODEV)
    )
}

/// What the kernel would not refuse, but a map of the real file would be refused for.
fn check(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_PATH) {
        return Err(Errno::EBADF.into());
    }
    if flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
        return Err(Errno::EACCES.into());
    }
    let wanted = StatxFlags::TYPE | StatxFlags::SIZE;
    let found = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted)?;
    if FileType::from_raw_mode(found.stx_mode.into()) != FileType::RegularFile {
        return Err(Errno::EINVAL.into());
    }
    if found.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND) {
        return Err(Errno::EPERM.into());
    }
    if found.stx_size >= CLAIMED_BYTES {
        return Err(Errno::EFBIG.into());
    }
    Ok(())
}
