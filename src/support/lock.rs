// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Beside all steps: how every mutex of ours is locked. (The engine's, which the model checker also
//! has to see, are in `dax/sync.rs`.)

use std::sync::{Mutex, MutexGuard};

/// Locks, also after a panic elsewhere: what our mutexes guard is consistent at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
