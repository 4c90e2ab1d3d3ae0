// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside step 5 of 6: passthrough files, whose length is above the end of any map. Knows no virtio
//! and no window.
//!
//! QEMU refuses a map that ends past the end of the file, and Linux guests always map whole chunks
//! of 2 MiB. So the last chunk of nearly every file can't be mapped from the file itself. A FUSE
//! inode has the length that its server returns. With FUSE passthrough (Linux >= 6.9) a map of the
//! inode *is* a map of the backing file: the kernel puts the backing file into the mapping. Page
//! faults, stores, truncation and writeback then use the backing file's inode, without FUSE.
//!
//! Past the end of the backing file such a map shows what any map of that file shows: zeros to the
//! end of the last page, and SIGBUS behind, until the file has grown. The caller must keep the
//! guest from accessing pages there.
//!
//! # Lifetimes
//!
//! | object | lives until |
//! |---|---|
//! | [`PassthroughMount`]: the mount, the connection, one thread | it is dropped, or the process is killed; after an abort they are re-created |
//! | [`PassthroughFile`]: one inode, one backing id | it is dropped |
//! | a map of it, in any process | it is unmapped, also after the drop of the two above |
//!
//! The mount is detached: it is in no mount table, needs no directory, and works from any mount
//! namespace, since files are opened relative to its descriptor.
//!
//! A descriptor of a file outlives its [`PassthroughMount`]. It can still be mapped, and `lseek`
//! returns its length; calls that need the server (`fstat` after a map, `fstatfs`) then return
//! ENOTCONN.
//!
//! # Requirements
//!
//! The process must not fork without exec while it has a [`PassthroughMount`]: the child would keep
//! the connection open, and a call that needs the server after the drop of the
//! [`PassthroughMount`] would block until the child ends.
//!
//! [`PassthroughMount::new`], and the threads that call [`PassthroughMount::open`] or drop a
//! [`PassthroughFile`], need CAP_SYS_ADMIN: the kernel checks it each time a backing id is opened
//! or closed. A process without it uses a [`Mounter`]: [`PassthroughMount::by`].

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

/// The length in bytes that each passthrough file has for `fstat` and `lseek`.
///
/// QEMU 11.1 demands `lseek(fd, 0, SEEK_END) >= offset + length`, added as u64 and compared as i64.
/// 2^62 is above the length of any file on ext4, and half of the largest off_t. So rounding it up
/// or adding the length of a window overflows neither in QEMU nor in the kernel. FUSE accepts
/// lengths up to 2^63 - 1 (`s_maxbytes`, `fuse_valid_size`).
pub const CLAIMED_BYTES: u64 = 1 << 62;

/// Why this host has no passthrough files.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// `/dev/fuse` can't be opened.
    #[error("no FUSE: /dev/fuse can't be opened: {0}")]
    Device(io::Error),
    /// A system call returned EPERM. The value is its name.
    #[error("not permitted to make a FUSE mount: CAP_SYS_ADMIN is needed ({0} returned EPERM)")]
    NotPermitted(&'static str),
    /// The kernel's INIT request does not offer FUSE_PASSTHROUGH.
    #[error(
        "the kernel has no FUSE passthrough (FUSE {major}.{minor}): Linux >= 6.9 with \
         CONFIG_FUSE_PASSTHROUGH is needed"
    )]
    NoPassthrough {
        /// The kernel's major version of the FUSE protocol.
        major: u32,
        /// The kernel's minor version of the FUSE protocol. 40 is the first with passthrough.
        minor: u32,
    },
    /// A root directory without /proc.
    #[error("a daemon in a chroot can't watch mapped files")]
    Chroot,
    /// RLIMIT_FSIZE forbids the trial file. The value is its length in bytes.
    #[error("the limit of the length of files (RLIMIT_FSIZE) permits no file of {0} bytes")]
    FileSizeLimit(usize),
    /// The kernel accepted passthrough, but a trial read did not return the backing file's
    /// bytes.
    #[error("the kernel accepted FUSE passthrough, but a trial read of a file fails: {0}")]
    NotPassedThrough(io::Error),
    /// Another call failed.
    #[error("a private FUSE mount can't be made: {step}: {cause}")]
    Host {
        /// The call that failed.
        step: &'static str,
        /// Its error.
        cause: io::Error,
    },
}

impl Unavailable {
    /// What the user can do about the error, in the imperative.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Chroot => "take --sandbox namespace",
            Self::FileSizeLimit(_) => "raise the limit ('ulimit -f unlimited')",
            _ => "run the daemon as root on Linux 6.9 or newer",
        }
    }

    /// Converts the error of the call `step`.
    fn at(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |cause| match cause.raw_os_error() {
            Some(e) if e == Errno::EPERM as i32 => Self::NotPermitted(step),
            _ => Self::Host { step, cause },
        }
    }
}

/// A private FUSE mount of passthrough files. If its connection is aborted
/// (`/sys/fs/fuse/connections`), the next [`open`](Self::open) re-creates the mount.
pub struct PassthroughMount {
    mounter: Mounter,
    /// Of rank `Rank::Leaf`.
    current: Mutex<Arc<PrivateMount>>,
    /// Held by the thread that re-creates the mount. Only [`open`](Self::open) takes it.
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
    /// The server thread ends when this is closed.
    stop: Option<PipeWriter>,
    server: Option<JoinHandle<()>>,
}

impl PassthroughMount {
    /// Makes the mount, and tries it with a file in memory.
    ///
    /// # Errors
    /// See [`Unavailable`].
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

    /// A read-write descriptor whose maps show `file`'s page cache, and whose length (`fstat`,
    /// `lseek`) is [`CLAIMED_BYTES`].
    ///
    /// Each call makes a new inode. Maps of two inodes of one file are coherent, as two maps of the
    /// file are.
    ///
    /// # Errors
    /// - EBADF: `file` was opened with O_PATH.
    /// - EACCES: `file` was not opened for reading and writing. The kernel would not refuse it: it
    ///   opens the file again by its path, without a check of permissions.
    /// - EINVAL: `file` is no regular file.
    /// - EPERM: `file` is immutable or append-only, or the calling thread has no CAP_SYS_ADMIN.
    /// - EFBIG: `file` has [`CLAIMED_BYTES`] or more.
    /// - ELOOP: `file` is on a file system stacked twice (overlayfs over overlayfs), or is a
    ///   passthrough file.
    /// - EOPNOTSUPP: `file` is on a file system that passthrough can't use.
    /// - ENOTCONN: the connection was aborted, and the mount could not be re-created.
    pub fn open(&self, file: &File) -> io::Result<PassthroughFile> {
        check(file)?;
        let mount = lock(&self.current).clone();
        match mount.open(file) {
            Err(e) if is_aborted(&e) => self.renewed(&mount)?.open(file),
            done => done,
        }
    }

    /// Re-creates the mount if `aborted` is still the current one, and returns the current one.
    fn renewed(&self, aborted: &Arc<PrivateMount>) -> io::Result<Arc<PrivateMount>> {
        let _turn = lock(&self.renewal);
        let current = lock(&self.current).clone();
        if !Arc::ptr_eq(&current, aborted) {
            return Ok(current); // Another thread has re-created the mount meanwhile.
        }
        let new = PrivateMount::new(&self.mounter).map(Arc::new).map_err(|e| {
            error!(
                "the private FUSE mount was aborted, and can't be re-created ({e}): no further \
                 file can be mapped until the daemon is restarted"
            );
            io::Error::from(Errno::ENOTCONN)
        })?;
        warn!(
            "the private FUSE mount was aborted, and was re-created; maps of files are unchanged"
        );
        let old = std::mem::replace(&mut *lock(&self.current), new.clone());
        drop(old); // Not under the lock `current`: the drop joins the old mount's thread.
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
        // If a later step fails, the drop of `held` closes the backing id.
        let held = Held { node, connection: Arc::downgrade(&self.connection) };
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        // The server thread never blocks on another call, so only a signal can interrupt the open.
        let opened = rustix::io::retry_on_intr(|| {
            rustix::fs::openat(&self.root, node.name(), flags, Mode::empty())
        });
        self.connection.forget_name(node);
        Ok(PassthroughFile { file: Arc::new(File::from(opened?)), _held: held })
    }

    /// Reads a file in memory through the mount: the kernel may accept passthrough and then refuse
    /// it, for example by a security module.
    fn try_it(&self) -> Result<(), Unavailable> {
        const WRITTEN: &[u8] = b"vhost-user-dax";
        let memory = rustix::fs::memfd_create("passthrough", MemfdFlags::CLOEXEC)
            .map_err(|e| Unavailable::at("memfd_create")(e.into()))?;
        let memory = File::from(memory);
        let mut seen = [0; WRITTEN.len()];
        let tried = memory.write_all_at(WRITTEN, 0).and_then(|()| {
            let passthrough = self.open(&memory)?;
            passthrough.read_exact_at(&mut seen, 0)?;
            Ok(passthrough.metadata()?.len())
        });
        match tried {
            Ok(CLAIMED_BYTES) if seen == WRITTEN => Ok(()),
            Ok(_) => Err(Unavailable::NotPassedThrough(Errno::EIO.into())),
            Err(e) if e.raw_os_error() == Some(Errno::EPERM as i32) => {
                Err(Unavailable::NotPermitted("FUSE_DEV_IOC_BACKING_OPEN"))
            }
            Err(e) if e.raw_os_error() == Some(Errno::EFBIG as i32) => {
                Err(Unavailable::FileSizeLimit(WRITTEN.len()))
            }
            Err(e) => Err(Unavailable::NotPassedThrough(e)),
        }
    }
}

impl Drop for PrivateMount {
    fn drop(&mut self) {
        // A map or descriptor in any process keeps the superblock alive, and the superblock keeps
        // all open backing ids. So they are closed before the connection is.
        self.connection.close_all();
        drop(self.stop.take());
        if self.server.take().is_some_and(|server| server.join().is_err()) {
            warn!("the thread \"passthrough\", which serves the private FUSE mount, has panicked");
        }
        // The server thread has closed the connection, so no process waits for its answer. The
        // mount is removed with its last descriptor or map.
    }
}

/// A file of [`CLAIMED_BYTES`] bytes whose maps, reads and writes are those of its backing file.
///
/// Its attributes are not those of the backing file. It can't be synced or resized: `fsync`,
/// `ftruncate` and `fallocate` fail. Locks on it are not locks on the backing file.
pub struct PassthroughFile {
    file: Arc<File>,
    _held: Held,
}

impl PassthroughFile {
    /// The file. A clone of it can be mapped after the drop of the [`PassthroughFile`], but can't
    /// be opened again then (through `/proc/self/fd`).
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

/// A backing id, which is closed on drop. Its inode can be opened until then.
struct Held {
    node: NodeId,
    /// Dead after the drop of the [`PrivateMount`], which has closed all backing ids.
    connection: Weak<Connection>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.upgrade() {
            connection.close(self.node);
        }
    }
}

/// Whether `e` is an error of an aborted connection: ENOTCONN after the server thread has ended, or
/// one of the kernel's errors before.
fn is_aborted(e: &io::Error) -> bool {
    let errno = e.raw_os_error().map(Errno::from_raw);
    matches!(
        errno,
        Some(Errno::ENOTCONN | Errno::ECONNABORTED | Errno::ECONNREFUSED | Errno::ENODEV)
    )
}

/// Refuses files that the kernel would accept as a backing file, but of which a writable map would
/// be refused.
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
