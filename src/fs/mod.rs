// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: virtio-fs (virtio 1.4 section 5.11) with a DAX window. Knows no ring and no message
//! of vhost-user.
//!
//! virtiofsd's passthrough file system does the operations on files. This module adds the FUSE
//! messages (`message`, `server`, `ops`), the copies between guest memory and files (`buffers`),
//! the threads (`schedule`, `pool`), the count of [`descriptors`], and the window. `dax` sends the
//! guest's requests to the engine; `dax::nodes` holds the files that have an address space
//! (`host_file` identifies a file); `dax::times` moves a file's times after stores through the
//! window; `dax::window` holds the maps of one front-end. [`passthrough`](crate::passthrough) makes
//! the last 2 MiB of a file mappable as a whole.

mod buffers;
pub mod config;
mod dax;
pub mod descriptors;
mod host_file;
mod in_window;
pub(crate) mod inodes;
mod lives;
mod message;
mod open_flags;
mod ops;
mod pool;
mod schedule;
mod serve;
mod server;
mod sync_errors;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::errno::Errno;
use nix::sys::statvfs::{FsFlags, statvfs};
use rustix::fs::{Mode, OFlags};
use thiserror::Error;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::{
    self, CachePolicy, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::device::request::Request;
use crate::device::{Device, Drained, InflightPolicy, InlineWork, RingStart, SessionWindow};
use crate::persist::{Backing, Durability, PersistError};
use crate::support::fd_table;
use crate::support::log_limit::RateLimit;
use crate::window::{MapError, ShmemMapper, WindowBytes};

use self::dax::Dax;
use self::dax::times::Occasion;
use self::descriptors::Descriptors;
use self::inodes::Inodes;
use self::lives::Lives;
use self::message::Message;
use self::open_flags::OpenFlags;
use self::pool::JobClass;
use self::pool::Pool;
use self::serve::{Metrics, Serve};
use self::server::Server;
use crate::fs::sync_errors::{Losses, WritebackErrors};
use crate::passthrough::{PassthroughMount, Unavailable};

pub use crate::fs::config::{DaxPolicy, FsConfig, Tag, WindowSize};

/// Length of the config space, in bytes: tag, num_request_queues, notify_buf_size. Only a device
/// with a notification queue has notify_buf_size, but QEMU's config_size=44 reads it from each
/// device.
const CONFIG_BYTES: usize = 44;

/// Why no virtio-fs device can be created.
#[derive(Debug, Error)]
pub enum FsError {
    /// The shared directory can't be opened.
    #[error("--shared-dir {path}: {error}; name a directory that the daemon can read", path = .path.display())]
    SharedDir {
        /// Value of `--shared-dir`.
        path: PathBuf,
        /// Error of the open.
        error: io::Error,
    },
    /// `--dax=always`, and no private FUSE mount can be made, which a window needs.
    #[error(
        "--dax=always: {0}; {advice}, or use --dax=inode, which serves the share without a window \
         if it can't have one",
        advice = .0.advice()
    )]
    NoWindow(Unavailable),
    /// `--dax=always` on a share that is mounted read-only (Q8).
    #[error(
        "--dax=always: the share is mounted read-only, and a window shows only files that can be \
         opened for writing; use --dax=inode, which serves such a share without a window"
    )]
    ReadOnly,
    /// The shared directory can't be served.
    #[error("--shared-dir: {0}")]
    Share(io::Error),
    /// `--inode-file-handles=mandatory`, and file handles can't be used.
    #[error(
        "--inode-file-handles=mandatory: {}; use prefer, which holds inodes by descriptors if it \
         can't hold them by file handles",
        no_handles(.0)
    )]
    NoHandles(io::Error),
    /// `--persist` does not fit the file system of the share.
    #[error("--shared-dir: {0}")]
    Persist(PersistError),
    /// A thread of the pool, or inotify, can't be started.
    #[error("can't start: {0}")]
    Start(io::Error),
}

/// A virtio-fs device over one directory.
pub struct Fs {
    config: Vec<u8>,
    queues: usize,
    mem_slots: bool,
    window_bytes: WindowBytes,
    dax: Option<Arc<Dax>>,
    /// Number of the VM's memory regions. Each region holds one descriptor.
    regions: Arc<AtomicUsize>,
    server: Arc<dyn Serve>,
    pool: Arc<Pool>,
    log_limit: RateLimit,
    closing: AtomicBool,
    /// A session was opened and not yet reported in the log.
    in_session: AtomicBool,
    /// The shared directory. The passthrough file system opens it again at each INIT.
    _root: OwnedFd,
}

impl Fs {
    /// Creates a device that shares `config.shared_dir`.
    ///
    /// # Errors
    /// See [`FsError`].
    pub fn new(config: &FsConfig) -> Result<Arc<Self>, FsError> {
        let regions = Arc::<AtomicUsize>::default();
        let inode_file_handles = inode_file_handles(config)?;
        let losses = Losses::default();
        let dax = make_dax(config, &regions, &losses)?;
        let descriptors = Descriptors::new(config, dax.clone(), regions.clone());
        let root = open_root(&config.shared_dir).map_err(FsError::Share)?;
        let mut passthrough = passthrough_config(config, &root);
        passthrough.inode_file_handles = inode_file_handles;
        if passthrough.killpriv_v2 && dax.is_some() {
            // A store through the window makes no request at which the daemon could clear the bits.
            warn!(
                "--killpriv-v2 has no effect for a share with a window: the guest clears the bits \
                 by requests"
            );
            passthrough.killpriv_v2 = false;
        }
        if passthrough.writeback && dax.is_some() {
            warn!(
                "--writeback has no effect for a guest that maps files: it would not see the times \
                 of its stores through the window"
            );
        }
        let flags =
            OpenFlags { direct_io: config.allow_direct_io, noatime: config.preserve_noatime };
        let server: Arc<dyn Serve> = if config.readonly {
            let fs = PassthroughFsRo::new(passthrough).map_err(FsError::Share)?;
            serve(fs, dax.clone(), WritebackErrors::new(losses), flags, descriptors)
        } else {
            let fs = PassthroughFs::new(passthrough).map_err(FsError::Share)?;
            serve(fs, dax.clone(), WritebackErrors::new(losses), flags, descriptors)
        };
        let queues = u32::from(config.request_queues);
        let mut space = config.tag.padded().to_vec();
        space.extend(queues.to_le_bytes());
        space.resize(CONFIG_BYTES, 0);
        Ok(Arc::new(Self {
            config: space,
            queues: 1 + usize::from(config.request_queues),
            mem_slots: config.mem_slots,
            window_bytes: if dax.is_some() { config.window.bytes() } else { WindowBytes(0) },
            dax,
            regions,
            server,
            pool: Arc::new(Pool::new(config.threads).map_err(FsError::Start)?),
            log_limit: RateLimit::default(),
            closing: AtomicBool::new(false),
            in_session: AtomicBool::new(false),
            _root: root,
        }))
    }
}

/// Returns how inodes are held: as configured, or by descriptors if `prefer` finds no file handles.
/// virtiofsd's code makes the same choice, but its log lines name no option.
fn inode_file_handles(config: &FsConfig) -> Result<InodeFileHandlesMode, FsError> {
    let asked = config.inode_file_handles;
    if asked == InodeFileHandlesMode::Never {
        return Ok(asked);
    }
    let Err(e) = descriptors::handles_work(&config.shared_dir) else { return Ok(asked) };
    if asked == InodeFileHandlesMode::Mandatory {
        return Err(FsError::NoHandles(e));
    }
    warn!(
        "--inode-file-handles=prefer: {}; each inode that the guest knows holds a descriptor, as \
         with --inode-file-handles=never",
        no_handles(&e)
    );
    Ok(InodeFileHandlesMode::Never)
}

/// Why inodes can't be held by file handles: part of an error text.
fn no_handles(e: &io::Error) -> String {
    match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => {
            format!("file handles can't be opened without CAP_DAC_READ_SEARCH ({e})")
        }
        Some(Errno::EOPNOTSUPP | Errno::EOVERFLOW) => {
            format!("the file system of the share has no file handles ({e})")
        }
        _ => format!("file handles can't be used ({e})"),
    }
}

/// Opens the shared directory. The descriptor stays valid when the path is renamed or removed.
fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

fn serve<F>(
    fs: F,
    dax: Option<Arc<Dax>>,
    opened: WritebackErrors,
    open_flags: OpenFlags,
    descriptors: Descriptors,
) -> Arc<dyn Serve>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync + 'static,
{
    Arc::new(Server {
        fs,
        dax,
        opened,
        open_flags,
        descriptors,
        inodes: Inodes::default(),
        options: Default::default(),
        lives: Lives::default(),
        metrics: Metrics::default(),
    })
}

/// Creates the window. Returns None, with a log line that names the reason, for a share that is
/// served without one.
fn make_dax(
    config: &FsConfig,
    regions: &Arc<AtomicUsize>,
    losses: &Losses,
) -> Result<Option<Arc<Dax>>, FsError> {
    let durability = Durability::choose(Backing::of_dir(&config.shared_dir), config.persist);
    let durability = durability.map_err(FsError::Persist)?;
    if config.window == WindowSize::NONE || config.dax == DaxPolicy::Never {
        info!("no window: every access is a request");
        return Ok(None);
    }
    if config.readonly {
        // Q7, Q8: a process that maps a file can write to it, whatever access the map has.
        warn!(
            "no window: the share is read-only, and a front-end enforces that on requests, but not \
             on a window"
        );
        return Ok(None);
    }
    if statvfs(&config.shared_dir).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY)) {
        // Q8: a file that can't be opened for writing can't be mapped.
        if config.dax == DaxPolicy::Always {
            return Err(FsError::ReadOnly);
        }
        warn!("no window: the share is mounted read-only: no file can be opened for writing");
        return Ok(None);
    }
    let mount = match PassthroughMount::by(config.mounter.clone()) {
        Ok(mount) => mount,
        Err(e) if config.dax == DaxPolicy::Always => return Err(FsError::NoWindow(e)),
        Err(e) => {
            warn!(
                "no window: the end of a file could not be mapped: {e}; {} to have one",
                e.advice()
            );
            return Ok(None);
        }
    };
    info!("the share is in {}", durability.promise());
    if let Some(warning) = durability.backing.warning() {
        warn!("the share {warning}");
    }
    info!("a window of {}; the ends of files are mapped by FUSE passthrough", config.window);
    let dax = Dax::new(
        config.window.bytes(),
        config.dax,
        mount,
        config.persist,
        regions.clone(),
        losses.clone(),
    );
    Ok(Some(Arc::new(dax.map_err(FsError::Start)?)))
}

fn passthrough_config(config: &FsConfig, root: &OwnedFd) -> passthrough::Config {
    // Time for which a guest may use cached names and attributes, in seconds; the values of
    // virtiofsd for each cache policy.
    let valid = Duration::from_secs(match config.cache {
        CachePolicy::Never => 0,
        CachePolicy::Auto => 1,
        CachePolicy::Metadata | CachePolicy::Always => 86_400,
    });
    let root_dir = match &config.chroot {
        // Opened at each INIT, and not as the link that it would be without the last part.
        None => format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        Some(_) => "/".into(),
    };
    let (proc_sfd_rawfd, proc_mountinfo_rawfd) = fd_table::kept().unwrap_or_default();
    let asked = |mode| mode != NegotiationMode::Never;
    let xattr = config.xattr
        || config.xattrmap.is_some()
        || asked(config.posix_acl)
        || asked(config.security_label);
    passthrough::Config {
        entry_timeout: valid,
        attr_timeout: valid,
        cache_policy: config.cache.clone(),
        writeback: config.writeback,
        root_dir,
        mountinfo_prefix: config.chroot.clone(),
        proc_sfd_rawfd,
        proc_mountinfo_rawfd,
        xattr,
        xattrmap: config.xattrmap.clone(),
        announce_submounts: config.announce_submounts,
        readdirplus: config.readdirplus && !matches!(config.cache, CachePolicy::Never),
        allow_direct_io: config.allow_direct_io,
        killpriv_v2: config.killpriv_v2,
        posix_acl: config.posix_acl,
        security_label: config.security_label,
        clean_noatime: !config.preserve_noatime,
        allow_mmap: config.allow_mmap,
        uid_map: Some(config.translate_uid.clone()),
        gid_map: Some(config.translate_gid.clone()),
        guest_fd_limit: config.guest_fds,
        ..passthrough::Config::default()
    }
}

impl Device for Fs {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        self.queues
    }

    /// A FUSE request may be done only once, so the stopped device keeps requests in flight.
    fn inflight_policy(&self) -> InflightPolicy {
        InflightPolicy::Retain
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn window_bytes(&self) -> WindowBytes {
        self.window_bytes
    }

    fn mem_slots(&self) -> bool {
        self.mem_slots
    }

    fn use_instead(&self) -> &str {
        "use QEMU 11.1 or newer with -device \
         vhost-user-test-device-pci,chardev=c0,virtio-id=26,num_vqs=2,vq_size=128,config_size=44"
    }

    fn open_window(&self) -> Arc<dyn SessionWindow> {
        self.in_session.store(true, Ordering::Relaxed);
        match &self.dax {
            Some(dax) => dax.open_window(),
            None => Arc::new(NoWindow(self.regions.clone())),
        }
    }

    fn serves_at_once(&self) -> bool {
        true
    }

    fn handle(&self, request: Request, drained: Drained) -> Option<InlineWork> {
        if self.closing.load(Ordering::Relaxed) {
            return None; // The request stays in flight, and is never answered.
        }
        match Message::read(&request, self.server.life()) {
            Ok(message) => {
                let here = match drained {
                    Drained::ByServer { more } => schedule::is_inline(&message, &request, more),
                    Drained::ByWatchdog => false,
                };
                if here {
                    return Some(schedule::inline(&self.pool, &self.server, request, message));
                }
                schedule::submit(&self.pool, &self.server, request, message);
            }
            Err(_) => {
                self.server.metrics().malformed.add(1);
                if let Some(held_back) = self.log_limit.admit(Instant::now()) {
                    warn!("the guest sent a chain that holds no FUSE message{held_back}");
                }
                self.pool
                    .submit(JobClass::Quick, move || request.complete_with(None, Vec::new(), 0));
            }
        }
        None
    }

    fn restarted(&self) {
        self.server.restarted();
    }

    fn session_ended(&self) {
        // Requests that still run belong to this session, and must not grant ranges in the next
        // one.
        self.pool.finish();
        self.server.ended();
    }

    fn report(&self) {
        if !self.in_session.swap(false, Ordering::Relaxed) {
            return;
        }
        let Metrics { requests, errors, malformed } = self.server.metrics();
        let (requests, errors, malformed) = (requests.get(), errors.get(), malformed.get());
        let window = self.dax.as_ref().map_or(String::from("none"), |dax| {
            let counters = dax.engine().counters().snapshot();
            format!(
                "grants={} refused={} removals={} 2M-entries={} 4K-entries={} \
                 file-ends=passthrough",
                counters.grants,
                counters.grants_failed,
                dax.removals.get(),
                counters.pmd,
                counters.pte
            )
        });
        info!(
            "session ended: requests={requests} errors={errors} malformed={malformed}; window: \
             {window}"
        );
    }

    /// Waits until each running request is answered, except those that wait for a paused VM.
    fn shutdown(&self) {
        self.closing.store(true, Ordering::Relaxed);
        if let Some(dax) = &self.dax {
            dax.close();
        }
        self.pool.finish();
        if let Some(dax) = &self.dax {
            dax.settle_all(Occasion::Look);
        }
    }
}

/// The session's window of a share that has none: only counts the VM's memory regions.
struct NoWindow(Arc<AtomicUsize>);

impl SessionWindow for NoWindow {
    fn set_channel(&self, _: ShmemMapper) {}

    fn table_came(&self, mem: &GuestMemoryMmap) {
        self.0.store(mem.num_regions(), Ordering::Relaxed);
    }

    fn started(&self, _: RingStart) -> bool {
        true
    }

    fn bring_up(&self) -> Result<(), MapError> {
        Ok(())
    }

    fn stopped(&self) {}

    fn ended(&self) {}
}
