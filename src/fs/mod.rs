// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 3 of 6: virtio-fs (virtio 1.4 section 5.11) with a DAX window. Knows no ring and no message
//! of vhost-user.
//!
//! The files are the business of virtiofsd's passthrough file system. Ours are the FUSE messages
//! (`message`, `server`, `ops`), the way between guest memory and files (`buffers`), the threads
//! (`pool`), [`descriptors`], and the window: `dax` joins the guest's requests to the engine,
//! `dax::nodes` knows which file has an address space there (`host_file`: which file that is),
//! `dax::times` sees to it that stores move a file's times, `dax::window` is what a front-end
//! shows, and [`passthrough`](crate::passthrough) lets it show the end of a file.

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

/// Bytes of the config space: tag, num_request_queues, and notify_buf_size (which only a device
/// with a notification queue has; QEMU's config_size=44 asks for it all the same).
const CONFIG_BYTES: usize = 44;

/// Why a device can't be made.
#[derive(Debug, Error)]
pub enum FsError {
    /// The shared directory can't be read.
    #[error("--shared-dir {path}: {error}; name a directory that the daemon can read", path = .path.display())]
    SharedDir {
        /// It.
        path: PathBuf,
        /// The system's.
        error: io::Error,
    },
    /// `--dax=always` where no window can be had.
    #[error(
        "--dax=always: {0}; {advice}, or take --dax=inode, which goes without a window where it \
         must",
        advice = .0.advice()
    )]
    NoWindow(Unavailable),
    /// `--dax=always` on a share that is mounted read-only.
    #[error(
        "--dax=always: the share is mounted read-only, and a window shows only files that can be \
         written; take --dax=inode, which goes without a window where it must"
    )]
    ReadOnly,
    /// The shared directory can't be served.
    #[error("--shared-dir: {0}")]
    Share(io::Error),
    /// `--inode-file-handles=mandatory` where there are none.
    #[error(
        "--inode-file-handles=mandatory: {}; take prefer, which holds inodes by descriptors where \
         it must",
        no_handles(.0)
    )]
    NoHandles(io::Error),
    /// `--persist` where that can't be.
    #[error("--shared-dir: {0}")]
    Persist(PersistError),
    /// No threads.
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
    /// How many memory regions the VM has: each holds a descriptor.
    regions: Arc<AtomicUsize>,
    server: Arc<dyn Serve>,
    pool: Arc<Pool>,
    log_limit: RateLimit,
    closing: AtomicBool,
    /// There is a session of which nothing was reported yet.
    in_session: AtomicBool,
    /// What the passthrough file system opens at each INIT.
    _root: OwnedFd,
}

impl Fs {
    /// A device that shares `config.shared_dir`.
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
            // A store through the window makes no request that we could clear the bits at.
            warn!(
                "--killpriv-v2 has no effect beside a window: the guest clears the bits by requests"
            );
            passthrough.killpriv_v2 = false;
        }
        if passthrough.writeback && dax.is_some() {
            warn!(
                "--writeback has no effect for a guest that maps files: it would not see their times move"
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

/// How inodes are held, by what is asked for and what can be had. virtiofsd's code finds out the
/// same, with lines that name no option.
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

/// Why inodes can't be held by file handles.
fn no_handles(e: &io::Error) -> String {
    match e.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM) => {
            format!("file handles can't be opened without CAP_DAC_READ_SEARCH ({e})")
        }
        Some(Errno::EOPNOTSUPP | Errno::EOVERFLOW) => {
            format!("the file system of the share has no file handles ({e})")
        }
        _ => format!("file handles can't be had ({e})"),
    }
}

/// The share, whatever becomes of its path.
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

/// The window, or a line that says why there is none.
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
        // Q7, Q8: whoever can map can write, whatever the map says.
        warn!(
            "no window: the share is read-only, and a front-end enforces that on requests, not on a window"
        );
        return Ok(None);
    }
    if statvfs(&config.shared_dir).is_ok_and(|fs| fs.flags().contains(FsFlags::ST_RDONLY)) {
        // Q8: a file that can't be opened for writing can't be mapped.
        if config.dax == DaxPolicy::Always {
            return Err(FsError::ReadOnly);
        }
        warn!("no window: the share is mounted read-only; --readonly says so, too");
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
    // How long a guest may believe what it knows, by the cache policy: virtiofsd's numbers.
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

    /// Most requests must not be done twice.
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
            return None; // It stays open, and is never answered.
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
        // What still runs belongs to this session, and must not grant anything in the next one.
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
                "grants={} refused={} removals={} 2M-entries={} 4K-entries={} file-ends=passthrough",
                counters.grants,
                counters.grants_failed,
                dax.removals.get(),
                counters.pmd,
                counters.pte
            )
        });
        info!(
            "session ended: requests={requests} errors={errors} malformed={malformed}; window: {window}"
        );
    }

    /// What runs is finished and answered, but for what waits for a VM that is paused.
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

/// A device without a window: it counts the VM's memory regions.
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
