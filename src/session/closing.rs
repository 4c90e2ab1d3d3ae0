// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: the end of the process, as the rings learn of it. Knows no signal and no device.
//!
//! A request may wait for its ring to go on: as long as the VM is paused. At SIGTERM the signals
//! thread wakes it, so that the device can end its work.

use std::sync::{Arc, Weak};

use crate::ring::Ring;
use crate::support::lock::{Mutex, lock};

#[derive(Default)]
struct State {
    closing: bool,
    /// Those of the session that began last: a daemon serves one at a time.
    rings: Vec<Weak<Ring>>,
}

/// Shared by the signals thread and the sessions.
#[derive(Clone, Default)]
pub(crate) struct Closing(Arc<Mutex<State>>);

impl Closing {
    /// A session with these rings begins. The main thread calls this, and the signals thread may
    /// call [`close`](Self::close) at the same time: under the lock either `close` finds the rings,
    /// or the main thread finds that they are to be closed.
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

    /// The process is about to end: no request waits for its ring from now on.
    pub(crate) fn close(&self) {
        let rings = {
            let mut state = lock(&self.0);
            state.closing = true;
            std::mem::take(&mut state.rings)
        };
        rings.iter().filter_map(Weak::upgrade).for_each(|ring| ring.close());
    }
}
