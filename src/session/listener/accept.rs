// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: front-ends that connect while none is served, and while one is served. Knows no
//! session.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::thread::{self, Builder, JoinHandle};
use std::time::{Duration, Instant};

use log::{debug, error, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::support::log_limit::RateLimit;

/// Time between two attempts to serve a front-end after a failure. No event announces that the
/// missing resource (descriptors, memory, threads) is available again.
const RETRY: Duration = Duration::from_millis(500);

/// Number of descriptors that the library takes for each ring, at most (vhost-user-backend 0.24).
const FDS_OF_A_RING: usize = 5;
/// Number of descriptors that a session takes beside its rings: the connection, the back-end
/// channel, the event descriptors of the window and the threads, and a reserve.
const FDS_OF_A_SESSION: usize = 16;

/// Waits until a front-end has connected. Does not accept it.
///
/// # Errors
/// The errno of poll(2), except EINTR.
pub(crate) fn wait_for_front_end(listener: &UnixListener) -> io::Result<()> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Checks that a session of `rings` rings could get its descriptors. Without this check the library
/// would leave threads behind when it runs out of descriptors in the middle of its set-up.
///
/// # Errors
/// The errno of fcntl(2) F_DUPFD_CLOEXEC: EMFILE or ENFILE.
pub(crate) fn room_for_a_session(listener: &UnixListener, rings: usize) -> io::Result<()> {
    let wanted = FDS_OF_A_SESSION + FDS_OF_A_RING * rings;
    let spare: io::Result<Vec<OwnedFd>> =
        (0..wanted).map(|_| listener.as_fd().try_clone_to_owned()).collect();
    spare.map(drop)
}

/// Delays and logs the attempts to serve a front-end with `--keep-listening`.
#[derive(Default)]
pub(crate) struct Retries(RateLimit);

impl Retries {
    /// Logs `cause` and sleeps for [`RETRY`]. A front-end that was not accepted stays in the
    /// listener's queue.
    pub(crate) fn after(&self, cause: &dyn std::fmt::Display) {
        if let Some(held_back) = self.0.admit(Instant::now()) {
            error!(
                "a front-end can't be served yet: {cause}; the daemon tries again every {} ms\
                 {held_back}",
                RETRY.as_millis()
            );
        }
        thread::sleep(RETRY);
    }
}

/// Logs each front-end that connects while another one is served. Dropping it ends the thread
/// `waiting`.
pub(crate) struct Waiting(Option<(EventFd, JoinHandle<()>)>);

impl Waiting {
    /// Starts the thread that watches the listener. It accepts no front-end.
    pub(crate) fn watch(listener: &UnixListener) -> Self {
        Self(watch(listener).inspect_err(|e| debug!("waiting front-ends are not logged: {e}")).ok())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some((stop, thread)) = self.0.take()
            && stop.write(1).is_ok()
        {
            let _ = thread.join();
        }
    }
}

/// Epoll data of the event descriptor that ends the thread.
const STOP: u64 = 0;
/// Epoll data of the listener.
const CAME: u64 = 1;

fn watch(listener: &UnixListener) -> io::Result<(EventFd, JoinHandle<()>)> {
    let stop = EventFd::new(EFD_CLOEXEC)?;
    let epoll = Epoll::new()?;
    let add =
        |fd, events, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data));
    add(stop.as_raw_fd(), EventSet::IN, STOP)?;
    // Edge-triggered: the listener stays readable while a front-end waits, and each new front-end
    // is one event.
    add(listener.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, CAME)?;
    // The thread keeps both open: closing a descriptor removes it from the epoll set.
    let held = (stop.try_clone()?, listener.try_clone()?);
    let thread = Builder::new().name("waiting".into()).spawn(move || {
        let limit = RateLimit::default();
        while came(&epoll) {
            if let Some(held_back) = limit.admit(Instant::now()) {
                warn!(
                    "another front-end has connected, and waits until the current one disconnects: \
                     the daemon serves one front-end at a time{held_back}"
                );
            }
        }
        drop(held);
    })?;
    Ok((stop, thread))
}

/// Waits for the next front-end. False at the end.
fn came(epoll: &Epoll) -> bool {
    let mut events = [EpollEvent::default(); 2];
    loop {
        match epoll.wait(-1, &mut events) {
            Ok(count) => {
                let mut ready = events.iter().take(count);
                return count > 0 && ready.all(|event| event.data() != STOP);
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}
