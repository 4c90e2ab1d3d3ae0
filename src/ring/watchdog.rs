// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains a ring while the ring's own thread is held up by a request. Knows no device.
//!
//! A request that is expected to be quick is served by the thread that takes it out of the ring: a
//! wakeup of another thread takes longer than most requests. When such a request waits for a disk
//! or a network, the watchdog finds that no request has ended for a [`TICK`], and from then on
//! hands new requests to the threads of the device's pool.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle, current};
use std::time::Duration;

use super::wake::Wake;
use super::{Progress, Ring};

/// Period of the watchdog. Requests behind one that takes longer are served by other threads. Much
/// longer than nearly all quick requests, and much shorter than a guest waits for a disk.
const TICK: Duration = Duration::from_millis(2);

/// Number of ticks without a served request after which the watchdog sleeps until a ring wakes it.
const QUIET_TICKS: u32 = 50;

/// The watchdog thread. Dropping this ends the thread.
pub(crate) struct Watchdog {
    wake: Arc<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches `rings`, which were created with `wake`. `begin` starts a ring if the library has
    /// set it up and it is stopped: a ring that the front-end has stopped and started again while
    /// its own thread was held up.
    ///
    /// # Errors
    /// The errno of clone(2) if the thread can't be started.
    pub(crate) fn start(
        wake: &Arc<Wake>,
        rings: Vec<Arc<Ring>>,
        begin: impl Fn(&Arc<Ring>) + Send + 'static,
    ) -> io::Result<Self> {
        let theirs = wake.clone();
        let run = move || run(&theirs, &rings, &begin);
        let thread = Builder::new().name("watchdog".into()).spawn(run)?;
        Ok(Self { wake: wake.clone(), thread: Some(thread) })
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.wake.end();
        // `begin` may hold the last reference to the session: then the watchdog thread itself runs
        // this.
        if let Some(thread) = self.thread.take().filter(|it| it.thread().id() != current().id()) {
            let _ = thread.join();
        }
    }
}

fn run(wake: &Wake, rings: &[Arc<Ring>], begin: &dyn Fn(&Arc<Ring>)) {
    let mut served = vec![0; rings.len()];
    let mut quiet = 0;
    while !wake.is_over() {
        if quiet < QUIET_TICKS {
            wake.tick(TICK);
        } else {
            wake.sleep(|| rings.iter().any(|ring| ring.is_serving()));
            quiet = 0;
        }
        quiet += 1;
        for (ring, served) in rings.iter().zip(&mut served) {
            let progress = ring.relieve(served);
            if progress == Progress::HeldUp {
                begin(ring);
            }
            if progress != Progress::Idle {
                quiet = 0;
            }
        }
    }
}
