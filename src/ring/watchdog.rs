// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: drains a ring while the thread that should do so is held up in a request. Knows no
//! device.
//!
//! A request that is expected to be quick is served by the thread that takes it out of its ring: to
//! wake another one costs more than most requests do. When it is not quick, because a disk or a
//! network lets it wait, the watchdog sees that no request has ended for a [`TICK`], and from then
//! on hands new requests to others.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle, current};
use std::time::Duration;

use super::wake::Wake;
use super::{Progress, Ring};

/// A request that takes longer has others served beside it: much longer than nearly all of them
/// take, much shorter than what a guest waits for a disk.
const TICK: Duration = Duration::from_millis(2);

/// After this many ticks in which nothing was served, the watchdog sleeps until something is.
const QUIET_TICKS: u32 = 50;

/// The thread. It ends when this is dropped.
pub(crate) struct Watchdog {
    wake: Arc<Wake>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches over `rings`, which were made with `wake`. `begin` starts a ring, if it can be and
    /// is not: one that was stopped meanwhile, and would not be seen to go on by the thread that is
    /// held up.
    ///
    /// # Errors
    /// The system's.
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
        // `begin` may have the last hold on the session, and so on this.
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
