// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: front-ends that come while none is served, and while one is. Knows no session.

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

/// A front-end that could not be served waits for the next try. What was missing (descriptors,
/// memory, threads) tells nobody when it is there.
const RETRY: Duration = Duration::from_millis(500);

/// Descriptors that a session takes: at most 5 for each ring (vhost-user-backend 0.24), the
/// connection, the back-end channel, what the window and the threads are told by, and some to
/// spare.
const FDS_OF_A_RING: usize = 5;
const FDS_OF_A_SESSION: usize = 16;

/// Waits until a front-end has connected, and leaves it to be accepted.
///
/// # Errors
/// The system's.
pub(crate) fn wait_for_front_end(listener: &UnixListener) -> io::Result<()> {
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            other => return Ok(other.map(drop)?),
        }
    }
}

/// Whether a session of `rings` could have its descriptors. The library leaves threads behind where
/// it finds none half-way.
///
/// # Errors
/// EMFILE or ENFILE, most likely.
pub(crate) fn room_for_a_session(listener: &UnixListener, rings: usize) -> io::Result<()> {
    let wanted = FDS_OF_A_SESSION + FDS_OF_A_RING * rings;
    let spare: io::Result<Vec<OwnedFd>> =
        (0..wanted).map(|_| listener.as_fd().try_clone_to_owned()).collect();
    spare.map(drop)
}

/// What happens when a front-end can't be served and the daemon goes on.
#[derive(Default)]
pub(crate) struct Retries(RateLimit);

impl Retries {
    /// Says why, and waits a moment, in which the front-end waits in the listener's queue.
    pub(crate) fn after(&self, cause: &dyn std::fmt::Display) {
        if let Some(held_back) = self.0.admit(Instant::now()) {
            error!(
                "a front-end can't be served yet: {cause}; it is tried again every {} ms\
                 {held_back}",
                RETRY.as_millis()
            );
        }
        thread::sleep(RETRY);
    }
}

/// Says of each front-end that comes while one is served that it waits, for as long as this lives.
pub(crate) struct Waiting(Option<(EventFd, JoinHandle<()>)>);

impl Waiting {
    /// Watches the listener, and accepts nobody.
    pub(crate) fn watch(listener: &UnixListener) -> Self {
        Self(watch(listener).inspect_err(|e| debug!("who waits is not told: {e}")).ok())
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

const STOP: u64 = 0;
const CAME: u64 = 1;

fn watch(listener: &UnixListener) -> io::Result<(EventFd, JoinHandle<()>)> {
    let stop = EventFd::new(EFD_CLOEXEC)?;
    let epoll = Epoll::new()?;
    let add =
        |fd, events, data| epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, data));
    add(stop.as_raw_fd(), EventSet::IN, STOP)?;
    // Edges: the queue stays readable, and each one that comes is told of once.
    add(listener.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED, CAME)?;
    // The thread holds both, since an epoll forgets what is closed.
    let held = (stop.try_clone()?, listener.try_clone()?);
    let thread = Builder::new().name("waiting".into()).spawn(move || {
        let limit = RateLimit::default();
        while came(&epoll) {
            if let Some(held_back) = limit.admit(Instant::now()) {
                warn!(
                    "another front-end has connected, and waits until the one that is served has gone: \
                     a daemon serves one at a time{held_back}"
                );
            }
        }
        drop(held);
    })?;
    Ok((stop, thread))
}

/// Waits for the next one. False at the end.
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
