// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: the daemon's life: socket, sessions, signals, and the order in which it stops.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::thread::Builder;

use log::{error, info};
use nix::sys::signal::{SigSet, Signal};
use thiserror::Error;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::backend::Session;
use crate::config::{ConfigError, FsRunConfig, PmemConfig};
use crate::device::Device;
use crate::fs::{Fs, user_namespace};
use crate::persist::{Backing, Durability, FilePersist};
use crate::pmem::{Pmem, PmemFile, file_bytes};
use crate::socket::{self, BoundSocket};
use crate::stderr;

/// How a session ended that did not end well.
#[derive(Debug, Error)]
pub enum SessionError {
    /// This front-end can't be served; the line says what to use.
    #[error("refused: {0}")]
    Refused(String),
    /// The front-end broke the protocol, or the system ran out of something.
    #[error("the session broke: {0}")]
    Broken(BackendError),
    /// The system refused a thread.
    #[error("the session can't start: {0}")]
    Start(#[from] io::Error),
}

impl From<BackendError> for SessionError {
    fn from(e: BackendError) -> Self {
        Self::Broken(e) // The library's type is no std::error::Error, so #[from] can't do this.
    }
}

/// Why the daemon ended.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// A setting can't be used: exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The system refused a thread or a descriptor: exit code 1.
    #[error("can't start: {0}")]
    Start(#[from] io::Error),
    /// The session failed: exit code 1.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Runs `vhost-user-dax pmem` until the VM has gone (or, with `keep_listening`, for ever).
/// SIGTERM and SIGINT end the process with exit code 0 from a thread of their own.
///
/// # Errors
/// [`DaemonError::Config`] comes before anything was created or changed.
pub fn run_pmem(config: &PmemConfig) -> Result<(), DaemonError> {
    // Before any thread starts: all of them must leave the signals to the one that waits.
    let signals = block_signals()?;
    let checked = socket::check(&config.socket)?;
    let path = &config.file.path;
    let chosen = Durability::choose(config.file.backing(), config.persist)
        .map_err(|error| ConfigError::Persist { path: path.clone(), error })?;
    let file = PmemFile::open(&config.file)?;
    let FilePersist { persist, direct } = chosen.persist(file.file(), file_bytes(file.file())?)?;
    if let Some(direct) = direct.filter(|_| chosen.backing == Backing::DaxFile) {
        file.settle_blocks(path, &direct)?;
    }
    let listening = checked.listen()?;
    let file = file.keep(chosen);
    let pmem = Pmem::with_mem_slots(file, persist, config.mem_slots)?;
    let what = format!("{}: {}", config.file.path.display(), pmem.size());
    run(signals, listening, pmem, &what, config.keep_listening)
}

/// Runs `vhost-user-dax fs`, as [`run_pmem`] does the other.
///
/// # Errors
/// [`DaemonError::Config`] comes before anything was created or changed.
pub fn run_fs(config: &FsRunConfig) -> Result<(), DaemonError> {
    let signals = block_signals()?;
    let checked = socket::check(&config.socket)?;
    check_shared_dir(&config.fs.shared_dir)?;
    if !config.fs.uid_map.is_empty() || !config.fs.gid_map.is_empty() {
        // Before any thread starts: the kernel moves only a process that has none.
        let (uids, gids) = (&config.fs.uid_map, &config.fs.gid_map);
        user_namespace::enter(uids, gids).map_err(|e| ConfigError::Fs(e.into()))?;
    }
    let fs = Fs::new(&config.fs).map_err(ConfigError::Fs)?;
    let listening = checked.listen()?;
    let what = format!("{}: tag {}", config.fs.shared_dir.display(), config.fs.tag);
    run(signals, listening, fs, &what, config.keep_listening)
}

fn check_shared_dir(path: &Path) -> Result<(), ConfigError> {
    let found = std::fs::read_dir(path).map(drop);
    found.map_err(|error| ConfigError::SharedDir { path: path.to_owned(), error })
}

fn run(
    signals: SigSet,
    (listener, bound): (UnixListener, BoundSocket),
    device: Arc<dyn Device>,
    what: &str,
    keep_listening: bool,
) -> Result<(), DaemonError> {
    let bound = Arc::new(bound);
    stderr::detach()?;
    stop_on_signal(signals, device.clone(), bound.clone())?;
    info!("{what}, waiting for a front-end");
    let ended = serve(Listener::from(listener), device.clone(), keep_listening);
    device.shutdown();
    bound.remove();
    Ok(ended?)
}

fn serve(
    listener: Listener,
    device: Arc<dyn Device>,
    keep_listening: bool,
) -> Result<(), SessionError> {
    let mut listener = Some(listener);
    while let Some(mut open) = listener.take() {
        let session = Running::accept(&mut open, &device)?;
        if keep_listening {
            listener = Some(open);
        } else {
            // A second front-end is turned away, not left waiting.
            drop(open);
        }
        match session.wait() {
            Err(e) if keep_listening => error!("{e}"),
            ended => ended?,
        }
    }
    Ok(())
}

/// Accepts one front-end and serves it until it goes.
///
/// # Errors
/// See [`SessionError`]; a front-end that just goes is no error.
pub fn serve_one(listener: &mut Listener, device: &Arc<dyn Device>) -> Result<(), SessionError> {
    Running::accept(listener, device)?.wait()
}

/// One session that has its front-end.
struct Running {
    daemon: VhostUserDaemon<Session>,
    session: Session,
}

impl Running {
    fn accept(listener: &mut Listener, device: &Arc<dyn Device>) -> Result<Self, SessionError> {
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let session = Session::new(device.clone(), mem.clone())?;
        let mut daemon = VhostUserDaemon::new("front-end".into(), session.clone(), mem)?;
        daemon.start(listener)?;
        info!("a front-end has connected");
        if let Some(handle) = daemon.shutdown_handle() {
            session.connected(handle);
        }
        Ok(Self { daemon, session })
    }

    fn wait(mut self) -> Result<(), SessionError> {
        let ended = self.daemon.wait();
        let refusal = self.session.end();
        drop(self.daemon);
        self.session.close_exit_events();
        if let Some(line) = refusal {
            return Err(SessionError::Refused(line));
        }
        match ended {
            // How a front-end's going looks depends on what it was doing.
            Err(BackendError::HandleRequest(
                VhostUserError::Disconnected
                | VhostUserError::PartialMessage
                | VhostUserError::SocketBroken(_),
            )) => Ok(()),
            other => Ok(other?),
        }
    }
}

fn block_signals() -> io::Result<SigSet> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    Ok(signals)
}

/// The stop order: finish the running sync and answer it, remove the socket, exit.
fn stop_on_signal(
    signals: SigSet,
    device: Arc<dyn Device>,
    bound: Arc<BoundSocket>,
) -> io::Result<()> {
    Builder::new().name("signals".into()).spawn(move || {
        if let Ok(signal) = signals.wait() {
            info!("{signal}: finishing what runs");
            device.shutdown();
            device.report();
            bound.remove();
            log::logger().flush();
            process::exit(0);
        }
    })?;
    Ok(())
}
