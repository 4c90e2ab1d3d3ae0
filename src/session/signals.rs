// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: what a signal does once the daemon may have created a file or a socket. Knows no
//! session.
//!
//! SIGTERM and SIGINT end the daemon with exit code 0 at any time: see [`Stop`]. SIGHUP does
//! nothing: a VM must keep its device when a terminal is closed. SIGXFSZ does nothing either: a
//! write past RLIMIT_FSIZE fails with EFBIG for the request that caused it.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::process;
use std::sync::Arc;
use std::thread::{self, Builder};

use log::info;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::device::Device;
use crate::session::closing::Closing;
use crate::session::listener::BoundSocket;
use crate::support::lock::{Mutex, lock};

/// The signals that are blocked in every thread; the thread `signals` waits for them.
#[derive(Debug)]
pub(crate) struct Blocked {
    signals: SigSet,
    /// A signalfd for SIGTERM and SIGINT.
    ends: SignalFd,
    /// The one that has come.
    came: Cell<Option<Signal>>,
}

impl Blocked {
    /// Takes a pending SIGTERM or SIGINT; if there was one, the caller must end the daemon. Called
    /// only before [`Stop::start`], whose thread takes all signals.
    pub(crate) fn ending(&self) -> Option<Signal> {
        if self.came.get().is_none()
            && let Ok(Some(came)) = self.ends.read_signal()
        {
            self.came.set(Signal::try_from(came.ssi_signo.cast_signed()).ok());
        }
        self.came.get()
    }

    /// Whether SIGTERM or SIGINT has come.
    pub(crate) fn must_end(&self) -> bool {
        self.ending().is_some()
    }
}

/// Blocks the signals, so that only the thread of [`Stop::start`] takes them. Called before any
/// thread is started, because threads inherit the mask. (Child processes do not: the standard
/// library resets their mask.) Called immediately before the daemon creates the socket: until then
/// the default action of a signal ends the process, even while it waits for a file system or a name
/// service.
///
/// # Errors
/// The errno of pthread_sigmask(3) or signalfd(2), for example EMFILE.
pub(crate) fn block() -> io::Result<Blocked> {
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    let mut waited_for = ending;
    waited_for.add(Signal::SIGHUP);
    waited_for.thread_block()?;
    // No thread waits for SIGXFSZ. The kernel sends it for a write past RLIMIT_FSIZE; while it is
    // blocked, that write fails with EFBIG.
    let mut pending = SigSet::empty();
    pending.add(Signal::SIGXFSZ);
    pending.thread_block()?;
    let ends = SignalFd::with_flags(&ending, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    Ok(Blocked { signals: waited_for, ends, came: Cell::new(None) })
}

enum Phase {
    /// No file is incomplete.
    Starting,
    /// The device serves a front-end, or waits for one.
    Serving(Arc<dyn Device>, Closing),
}

struct State {
    phase: Phase,
    /// SIGTERM or SIGINT has come.
    must_end: bool,
}

struct Inner {
    state: Mutex<State>,
    bound: BoundSocket,
}

/// Ends the daemon at SIGTERM or SIGINT, and leaves no incomplete file. Removes the socket when it
/// is dropped.
pub(crate) struct Stop(Arc<Inner>);

impl Stop {
    /// Starts the thread that waits for signals. It removes `bound` at SIGTERM or SIGINT.
    ///
    /// # Errors
    /// The errno of clone(2) if the thread can't be started.
    pub(crate) fn start(signals: Blocked, bound: BoundSocket) -> io::Result<Self> {
        let state = Mutex::new(State { phase: Phase::Starting, must_end: false });
        let stop = Self(Arc::new(Inner { state, bound }));
        let theirs = stop.0.clone();
        Builder::new().name("signals".into()).spawn(move || {
            loop {
                match signals.signals.wait() {
                    Ok(Signal::SIGHUP) => info!("SIGHUP is ignored"),
                    Ok(signal) => theirs.end(signal),
                    Err(_) => {}
                }
            }
        })?;
        Ok(stop)
    }

    /// From now on a signal shuts `device` down before it ends the process, and `closing` wakes
    /// requests that wait for a ring.
    pub(crate) fn serving(&self, device: Arc<dyn Device>, closing: Closing) {
        let mut state = lock(&self.0.state);
        if state.must_end {
            drop(state);
            wait_for_the_end();
        }
        state.phase = Phase::Serving(device, closing);
    }
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.bound.remove();
    }
}

impl Inner {
    fn end(&self, signal: Signal) {
        let mut state = lock(&self.state);
        state.must_end = true;
        let served = match &state.phase {
            Phase::Starting => None,
            Phase::Serving(device, closing) => Some((device.clone(), closing.clone())),
        };
        drop(state);
        if let Some((device, closing)) = served {
            info!("{signal}: waiting for running requests, then ending");
            // Before shutdown(): the device waits for its requests, and some of them may wait for a
            // stopped ring.
            closing.close();
            device.shutdown();
            device.report();
        }
        self.bound.remove();
        log::logger().flush();
        process::exit(0);
    }
}

/// Waits for the thread `signals`, which is about to end the process.
fn wait_for_the_end() -> Infallible {
    loop {
        thread::park();
    }
}
