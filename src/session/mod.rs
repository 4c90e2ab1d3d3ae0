// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: from the start of the daemon to its end: socket, sessions, signals, stop order.

mod backend;
mod closing;
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
use crate::session::closing::Closing;
use crate::session::config::{ConfigError, FsRunConfig, PmemConfig};
use crate::session::listener::accept::{Retries, Waiting, room_for_a_session, wait_for_front_end};
use crate::session::listener::{BoundSocket, SocketError};
use crate::session::signals::{Blocked, Stop};
use crate::support::size::Size;
use crate::support::stderr;

/// Why a session failed.
#[derive(Debug, Error)]
pub enum SessionError {
    /// The front-end lacks a feature; the text names a front-end that has it.
    #[error("refused: {0}")]
    Refused(String),
    /// The front-end violated the protocol, or a resource ran out.
    #[error("the session failed: {0}")]
    Broken(BackendError),
    /// A thread or a descriptor could not be created.
    #[error("the session can't start: {0}")]
    Start(#[from] io::Error),
}

impl From<BackendError> for SessionError {
    fn from(e: BackendError) -> Self {
        // Not by #[from]: the library's type does not implement std::error::Error.
        Self::Broken(e)
    }
}

/// Why the daemon ended.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// A setting can't be used. Exit code 2.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A thread or a descriptor could not be created. Exit code 1.
    #[error("can't start: {0}")]
    Start(#[from] io::Error),
    /// The session failed. Exit code 1.
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

/// Runs `vhost-user-dax pmem` until the front-end has disconnected; with `keep_listening`, until a
/// signal ends it. SIGTERM and SIGINT end the process, or this function, without an error at any
/// time.
///
/// # Errors
/// [`DaemonError`]. With [`DaemonError::Config`] every file that was created has been removed, and
/// nothing was changed.
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
    let plan = Plan::choose(&config.sandbox, None, false).map_err(ConfigError::from)?;
    // Before the first thread starts: all threads inherit the mask of blocked signals.
    let signals = signals::block()?;
    // All checks that only look are done. The socket is bound before the file is created: so no
    // slow step, and no step that two daemons must not both do, lies between the check of the path
    // and its bind.
    let listening = checked.listen(&|| signals.must_end())?;
    let Some((listener, bound)) = listening else { return Ok(()) };
    let made = make_file(found, chosen, &|| signals.must_end());
    if let Some(signal) = signals.ending() {
        info!("{signal}: removing the incomplete file");
        return Ok(());
    }
    let (file, FilePersist { persist, .. }) = made?;
    // What the device is asked of the file's own host is asked before the root changes.
    let what = format!("{}: {}", path.display(), Size(file_bytes(file.file())?));
    let file = file.keep(chosen);
    shut_in::pmem(&plan, config.sandbox.modcaps, &bound)?;
    let stop = begin(signals, bound)?;
    let pmem = Pmem::with_mem_slots(file, persist, config.mem_slots)?;
    run(stop, listener, pmem, &what, config.keep_listening)
}

/// Creates the pmem file if it is missing, and chooses the sync for it.
fn make_file(
    found: FoundFile<'_>,
    chosen: Durability,
    must_end: &dyn Fn() -> bool,
) -> Result<(PmemFile, FilePersist), DaemonError> {
    let file = found.make(must_end)?;
    let persist = chosen.persist(file.file(), file_bytes(file.file())?)?;
    if let Some(direct) = persist.direct.as_ref().filter(|_| chosen.populates_blocks()) {
        file.populate_blocks(direct, must_end)?;
    }
    Ok((file, persist))
}

/// Runs `vhost-user-dax fs`; ends as [`run_pmem`] does.
///
/// # Errors
/// [`DaemonError`]. With [`DaemonError::Config`] every file that was created has been removed, and
/// nothing was changed.
pub fn run_fs(config: &FsRunConfig) -> Result<(), DaemonError> {
    shut_in::close_inherited(&config.socket);
    let checked = listener::check(&config.socket)?;
    let share = open_shared_dir(&config.fs.shared_dir)?;
    let capabilities = shut_in::share_capabilities(config).map_err(ConfigError::from)?;
    let is_mapped = !config.fs.uid_map.is_empty() || !config.fs.gid_map.is_empty();
    if is_mapped {
        user_namespace::check().map_err(ConfigError::from)?;
    }
    let plan = Plan::choose(&config.sandbox, Some(&share), is_mapped).map_err(ConfigError::from)?;
    let signals = signals::block()?;
    // Binds the socket first: the code of the share clears the umask, and the owner of the socket
    // is looked up outside the user namespace.
    let listening = checked.listen(&|| signals.must_end())?;
    let Some((listener, bound)) = listening else { return Ok(()) };
    let fs = shut_in::share(&plan, config, share, capabilities, &bound)?;
    let stop = begin(signals, bound)?;
    let fs = Fs::new(&fs)?;
    let what = format!("{}: tag {}", config.fs.shared_dir.display(), config.fs.tag);
    run(stop, listener, fs, &what, config.keep_listening)
}

/// From here on a signal ends the daemon, and only the thread `stderr` waits for the reader of
/// stderr.
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
    let closing = Closing::default();
    stop.serving(device.clone(), closing.clone());
    info!("{what}, waiting for a front-end");
    let ended = if keep_listening {
        serve_all(&listener, &device, &closing)
    } else {
        serve_first(listener, &device, &closing)
    };
    device.shutdown();
    drop(stop);
    Ok(ended?)
}

fn serve_first(
    listener: UnixListener,
    device: &Arc<dyn Device>,
    closing: &Closing,
) -> Result<(), SessionError> {
    wait_for_front_end(&listener)?;
    let mut listener = Listener::from(listener);
    let session = Running::accept(&mut listener, device, closing)?;
    // Closes the listener: the connection of a second front-end is refused.
    drop(listener);
    session.wait()
}

/// Serves front-ends one after another. A failure ends one session, not the daemon.
fn serve_all(
    listener: &UnixListener,
    device: &Arc<dyn Device>,
    closing: &Closing,
) -> Result<(), SessionError> {
    let mut accepting = Listener::from(listener.try_clone()?);
    let retries = Retries::default();
    loop {
        wait_for_front_end(listener)?;
        let session = room_for_a_session(listener, device.queues())
            .map_err(SessionError::from)
            .and_then(|()| Running::accept(&mut accepting, device, closing));
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

/// Accepts one front-end and serves it until it disconnects.
///
/// # Errors
/// [`SessionError`]. A disconnection is no error.
pub fn serve_one(listener: &mut Listener, device: &Arc<dyn Device>) -> Result<(), SessionError> {
    Running::accept(listener, device, &Closing::default())?.wait()
}

/// A session whose front-end has connected.
struct Running {
    daemon: VhostUserDaemon<Session>,
    session: Session,
}

impl Running {
    fn accept(
        listener: &mut Listener,
        device: &Arc<dyn Device>,
        closing: &Closing,
    ) -> Result<Self, SessionError> {
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let session = Session::new(device.clone(), mem.clone(), closing)?;
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
            // A disconnection: the variant depends on the message that was under way.
            Err(BackendError::HandleRequest(
                VhostUserError::Disconnected
                | VhostUserError::PartialMessage
                | VhostUserError::SocketBroken(_),
            )) => Ok(()),
            other => Ok(other?),
        }
    }
}
