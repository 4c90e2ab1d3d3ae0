// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: makes the rings stop waiting when the process is about to end. Knows no signal and
//! no device.
//!
//! A request may wait for its stopped ring as long as the VM is paused. At SIGTERM the thread
//! `signals` wakes it, so that the device can finish its requests.

use std::sync::{Arc, Weak};

use crate::ring::Ring;
use crate::support::lock::{Mutex, lock};

#[derive(Default)]
struct State {
    closing: bool,
    /// The rings of the newest session: the daemon serves one session at a time.
    rings: Vec<Weak<Ring>>,
}

/// Shared by the thread `signals` and the sessions.
#[derive(Clone, Default)]
pub(crate) struct Closing(Arc<Mutex<State>>);

impl Closing {
    /// Records the rings of a session that begins. The main thread calls this, and the thread
    /// `signals` may call [`close`](Self::close) at the same time. Under the lock either `close`
    /// finds the rings, or this call finds `closing` set and closes them.
    pub(crate) fn watch(&self, rings: &[Arc<Ring>]) {
        let closing = {
            let mut state = lock(&self.0);
            state.rings = rings.iter().map(Arc::downgrade).collect();
            state.closing
        };
        if closing {
            rings.iter().for_each(|ring| ring.close());
        }
    }

    /// The process is about to end: from now on no request waits for its ring.
    pub(crate) fn close(&self) {
        let rings = {
            let mut state = lock(&self.0);
            state.closing = true;
            std::mem::take(&mut state.rings)
        };
        rings.iter().filter_map(Weak::upgrade).for_each(|ring| ring.close());
    }
}
