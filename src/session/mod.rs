// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: the daemon's life: socket, sessions, signals, and the order in which it stops.

mod backend;
pub mod config;
mod lifecycle;
pub mod listener;
mod restart;
mod shut_in;
mod signals;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use log::{error, info};
use thiserror::Error;
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::{Error as BackendError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::device::Device;
use crate::fs::{Fs, FsError};
use crate::persist::{Durability, FilePersist};
use crate::pmem::{FoundFile, Pmem, PmemFile, PmemFileError, file_bytes};
use crate::sandbox::root::Share;
use crate::sandbox::{Plan, SandboxError, user_namespace};
use crate::session::backend::Session;
use crate::session::config::{ConfigError, FsRunConfig, PmemConfig};
use crate::session::listener::accept::{Retries, Waiting, room_for_a_session, wait_for_front_end};
use crate::session::listener::{BoundSocket, SocketError};
use crate::session::signals::{Blocked, Stop};
use crate::support::size::Size;
use crate::support::stderr;

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

impl From<PmemFileError> for DaemonError {
    fn from(e: PmemFileError) -> Self {
        Self::Config(e.into())
    }
}

impl From<SocketError> for DaemonError {
    fn from(e: SocketError) -> Self {
        Self::Config(e.into())
    }
}

impl From<SandboxError> for DaemonError {
    fn from(e: SandboxError) -> Self {
        Self::Config(e.into())
    }
}

impl From<FsError> for DaemonError {
    fn from(e: FsError) -> Self {
        match e {
            FsError::Start(e) => Self::Start(e),
            e => Self::Config(e.into()),
        }
    }
}

/// Runs `vhost-user-dax pmem` until the VM has gone (or, with `keep_listening`, for ever).
/// SIGTERM and SIGINT end the process, or this function, without an error at any time.
///
/// # Errors
/// With [`DaemonError::Config`] nothing is left that was created, and nothing was changed.
pub fn run_pmem(config: &PmemConfig) -> Result<(), DaemonError> {
    shut_in::close_inherited(&config.socket);
    config.check_paths()?;
    let checked = listener::check(&config.socket)?;
    let path = &config.file.path;
    let found = FoundFile::look(&config.file)?;
    let chosen = Durability::choose(found.backing(), config.persist)
        .map_err(|error| PmemFileError::Persist { path: path.clone(), error })?;
    if config.file.sparse && chosen.populates_blocks() {
        return Err(PmemFileError::SparseLines(path.clone()).into());
    }
    found.claim()?;
    let plan = Plan::choose(&config.sandbox, false).map_err(ConfigError::from)?;
    // Before any thread starts: all of them must leave the signals to the one that waits.
    let signals = signals::block()?;
    // All that can be refused by looking has been. The socket comes first: nothing that takes long,
    // or that two daemons must not both make, lies between the look and it.
    let listening = checked.listen(&|| signals.is_asked())?;
    let Some((listener, bound)) = listening else { return Ok(()) };
    let made = make_file(found, chosen, &|| signals.is_asked());
    if let Some(signal) = signals.asked() {
        info!("{signal}: taking back what is unfinished");
        return Ok(());
    }
    let (file, FilePersist { persist, .. }) = made?;
    // What the device is asked of the file's own host is asked before the root changes.
    let what = format!("{}: {}", path.display(), Size(file_bytes(file.file())?));
    let file = file.keep(chosen);
    plan.enter_user_namespace(&[], &[]).map_err(ConfigError::from)?;
    shut_in::pmem(&plan, config.sandbox.modcaps, &bound)?;
    let stop = begin(signals, bound)?;
    let pmem = Pmem::with_mem_slots(file, persist, config.mem_slots)?;
    run(stop, listener, pmem, &what, config.keep_listening)
}

/// The file as the guest will meet it, and what makes it durable.
fn make_file(
    found: FoundFile<'_>,
    chosen: Durability,
    is_asked: &dyn Fn() -> bool,
) -> Result<(PmemFile, FilePersist), DaemonError> {
    let file = found.make(is_asked)?;
    let persist = chosen.persist(file.file(), file_bytes(file.file())?)?;
    if let Some(direct) = persist.direct.as_ref().filter(|_| chosen.populates_blocks()) {
        file.populate_blocks(direct, is_asked)?;
    }
    Ok((file, persist))
}

/// Runs `vhost-user-dax fs`, as [`run_pmem`] does the other.
///
/// # Errors
/// With [`DaemonError::Config`] nothing is left that was created, and nothing was changed.
pub fn run_fs(config: &FsRunConfig) -> Result<(), DaemonError> {
    shut_in::close_inherited(&config.socket);
    let checked = listener::check(&config.socket)?;
    let share = open_shared_dir(&config.fs.shared_dir)?;
    let capabilities = shut_in::share_capabilities(config).map_err(ConfigError::from)?;
    let is_mapped = !config.fs.uid_map.is_empty() || !config.fs.gid_map.is_empty();
    if is_mapped {
        user_namespace::check().map_err(ConfigError::from)?;
    }
    let plan = Plan::choose(&config.sandbox, is_mapped).map_err(ConfigError::from)?;
    let signals = signals::block()?;
    // First of all: the share's code clears the umask, and whom the socket belongs to is told from
    // outside the user namespace.
    let listening = checked.listen(&|| signals.is_asked())?;
    let Some((listener, bound)) = listening else { return Ok(()) };
    let fs = shut_in::share(&plan, config, &share, capabilities, &bound)?;
    drop(share);
    let stop = begin(signals, bound)?;
    let fs = Fs::new(&fs)?;
    let what = format!("{}: tag {}", config.fs.shared_dir.display(), config.fs.tag);
    run(stop, listener, fs, &what, config.keep_listening)
}

/// From here on a signal ends the daemon, and only the stderr thread waits for stderr's reader.
fn begin(signals: Blocked, bound: BoundSocket) -> io::Result<Stop> {
    let stop = Stop::start(signals, bound)?;
    stderr::detach()?;
    Ok(stop)
}

fn open_shared_dir(path: &Path) -> Result<Share, FsError> {
    let found = std::fs::read_dir(path).and_then(|_| Share::open(path));
    found.map_err(|error| FsError::SharedDir { path: path.to_owned(), error })
}

fn run(
    stop: Stop,
    listener: UnixListener,
    device: Arc<dyn Device>,
    what: &str,
    keep_listening: bool,
) -> Result<(), DaemonError> {
    stop.serving(device.clone());
    info!("{what}, waiting for a front-end");
    let ended =
        if keep_listening { serve_all(&listener, &device) } else { serve_first(listener, &device) };
    device.shutdown();
    drop(stop);
    Ok(ended?)
}

fn serve_first(listener: UnixListener, device: &Arc<dyn Device>) -> Result<(), SessionError> {
    wait_for_front_end(&listener)?;
    let mut listener = Listener::from(listener);
    let session = Running::accept(&mut listener, device)?;
    // A second front-end is turned away, not left waiting.
    drop(listener);
    session.wait()
}

/// Serves one front-end after another. What one of them, or a lack of something, brings about ends
/// no more than its own session.
fn serve_all(listener: &UnixListener, device: &Arc<dyn Device>) -> Result<(), SessionError> {
    let mut accepting = Listener::from(listener.try_clone()?);
    let retries = Retries::default();
    loop {
        wait_for_front_end(listener)?;
        let session = room_for_a_session(listener, device.queues())
            .map_err(SessionError::from)
            .and_then(|()| Running::accept(&mut accepting, device));
        let session = match session {
            Ok(session) => session,
            Err(e) => {
                retries.after(&e);
                continue;
            }
        };
        let waiting = Waiting::watch(listener);
        let ended = session.wait();
        drop(waiting);
        if let Err(e) = ended {
            error!("{e}");
        }
    }
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
        let made = VhostUserDaemon::new("front-end".into(), session.clone(), mem);
        let mut daemon = made.inspect_err(|_| session.close_exit_events())?;
        if let Err(e) = daemon.start(listener) {
            session.end();
            drop(daemon);
            session.close_exit_events();
            return Err(e.into());
        }
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
