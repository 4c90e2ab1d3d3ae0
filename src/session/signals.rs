// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: what a signal does from the moment on in which the daemon may create something.
//! Knows no session.
//!
//! SIGTERM and SIGINT end the daemon with exit code 0, whatever it does: see [`Stop`]. SIGHUP does
//! nothing: a VM must not lose its device with a terminal. SIGXFSZ does nothing either: a file that
//! would grow past RLIMIT_FSIZE is EFBIG for who asked for it.

use std::cell::Cell;
use std::convert::Infallible;
use std::io;
use std::process;
use std::sync::{Arc, Mutex};
use std::thread::{self, Builder};

use log::info;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::device::Device;
use crate::session::listener::BoundSocket;
use crate::support::lock::lock;

/// Signals that a thread waits for.
#[derive(Debug)]
pub(crate) struct Blocked {
    signals: SigSet,
    /// Reads those that end the daemon.
    ends: SignalFd,
    /// The one that has come.
    asked: Cell<Option<Signal>>,
}

impl Blocked {
    /// Takes a signal that ends the daemon, if one has come: the caller must end it. Only before
    /// [`Stop::start`], whose thread takes all signals.
    pub(crate) fn asked(&self) -> Option<Signal> {
        if self.asked.get().is_none()
            && let Ok(Some(came)) = self.ends.read_signal()
        {
            self.asked.set(Signal::try_from(came.ssi_signo.cast_signed()).ok());
        }
        self.asked.get()
    }

    /// Whether one has come.
    pub(crate) fn is_asked(&self) -> bool {
        self.asked().is_some()
    }
}

/// Leaves all signals named above to the thread of [`Stop::start`]. To be called before any thread
/// is started: those inherit it. (Programs that are run do not: the standard library sees to that.)
/// To be called right before something is created: until then the default action of a signal ends
/// the process, also one that waits for a file system or a name service.
///
/// # Errors
/// The system's.
pub(crate) fn block() -> io::Result<Blocked> {
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    let mut waited_for = ending;
    waited_for.add(Signal::SIGHUP);
    waited_for.thread_block()?;
    // Nobody waits for it. A write past the limit sends it, and fails with EFBIG if it is not
    // taken.
    let mut pending = SigSet::empty();
    pending.add(Signal::SIGXFSZ);
    pending.thread_block()?;
    let ends = SignalFd::with_flags(&ending, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
    Ok(Blocked { signals: waited_for, ends, asked: Cell::new(None) })
}

enum Phase {
    /// Nothing is unfinished.
    Starting,
    /// The device has its guest, or waits for one.
    Serving(Arc<dyn Device>),
}

struct State {
    phase: Phase,
    /// The daemon is to end.
    asked: bool,
}

struct Inner {
    state: Mutex<State>,
    bound: BoundSocket,
}

/// What ends the daemon when it is told to: at once, with nothing left that is unfinished. Removes
/// the socket when it is dropped.
pub(crate) struct Stop(Arc<Inner>);

impl Stop {
    /// Starts the thread that waits for signals. `bound` is removed when one comes.
    ///
    /// # Errors
    /// The system's: no thread can be started.
    pub(crate) fn start(signals: Blocked, bound: BoundSocket) -> io::Result<Self> {
        let state = Mutex::new(State { phase: Phase::Starting, asked: false });
        let stop = Self(Arc::new(Inner { state, bound }));
        let theirs = stop.0.clone();
        Builder::new().name("signals".into()).spawn(move || {
            loop {
                match signals.signals.wait() {
                    Ok(Signal::SIGHUP) => info!("SIGHUP: there is nothing to do"),
                    Ok(signal) => theirs.end(signal),
                    Err(_) => {}
                }
            }
        })?;
        Ok(stop)
    }

    /// From here on a signal ends the device in order.
    pub(crate) fn serving(&self, device: Arc<dyn Device>) {
        let mut state = lock(&self.0.state);
        if state.asked {
            drop(state);
            wait_for_the_end();
        }
        state.phase = Phase::Serving(device);
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
        state.asked = true;
        let device = match &state.phase {
            Phase::Starting => None,
            Phase::Serving(device) => Some(device.clone()),
        };
        drop(state);
        if let Some(device) = device {
            info!("{signal}: finishing what runs");
            device.shutdown();
            device.report();
        }
        self.bound.remove();
        log::logger().flush();
        process::exit(0);
    }
}

/// The thread that waits for signals is about to end the process.
fn wait_for_the_end() -> Infallible {
    loop {
        thread::park();
    }
}
