// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of a driver: which life a request belongs to, and whether the driver has mounted in it.
//! A late request of an ended life must neither mount nor unmount in a later one.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::support::lock::{Mutex, Rank, lock};

/// Number of one life. A life ends at a reset of the device, at DESTROY, and at an INIT of a driver
/// that has mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Life(u64);

/// Bit of `Lives::state`.
const MOUNTED: u64 = 1;

/// The lives of one device.
pub(crate) struct Lives {
    /// Twice the number of the current life; bit 0 is [`MOUNTED`].
    state: AtomicU64,
    /// Held while the state of the current life is dropped, which closes files.
    turn: Mutex<()>,
}

impl Default for Lives {
    fn default() -> Self {
        Self { state: AtomicU64::new(0), turn: Mutex::ranked(Rank::Lives, ()) }
    }
}

impl Lives {
    /// The current life.
    pub(crate) fn current(&self) -> Life {
        Life(self.state.load(SeqCst) & !MOUNTED)
    }

    /// Whether `life` is the current life.
    pub(crate) fn is_current(&self, life: Life) -> bool {
        self.current() == life
    }

    /// Whether `life` is the current life and the driver has mounted in it.
    pub(crate) fn is_mounted(&self, life: Life) -> bool {
        self.state.load(SeqCst) == life.0 | MOUNTED
    }

    /// The driver has mounted in `life`. Does nothing if `life` has ended.
    pub(crate) fn mount(&self, life: Life) {
        let _ = self.state.compare_exchange(life.0, life.0 | MOUNTED, SeqCst, SeqCst);
    }

    /// Ends the current life at a reset. On return no [`while_current`](Self::while_current) of it
    /// still runs.
    pub(crate) fn begin(&self) {
        let next = |state: u64| Some((state & !MOUNTED).wrapping_add(2));
        let _ = self.state.fetch_update(SeqCst, SeqCst, next);
        drop(lock(&self.turn));
    }

    /// Ends `life` at an INIT or DESTROY: no later request of `life` changes anything. Returns the
    /// life that follows. None if `life` had ended before.
    pub(crate) fn unmount(&self, life: Life) -> Option<Life> {
        let next = Life(life.0.wrapping_add(2));
        let end = |state: u64| (state & !MOUNTED == life.0).then_some(next.0);
        self.state.fetch_update(SeqCst, SeqCst, end).ok().map(|_| next)
    }

    /// Runs `work` while no life begins and no other thread drops a life's state. None if `life`
    /// has ended; `work` does not run then.
    pub(crate) fn while_current<T>(&self, life: Life, work: impl FnOnce() -> T) -> Option<T> {
        let _turn = lock(&self.turn);
        self.is_current(life).then(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: a request of an ended life neither mounts, nor unmounts, nor drops any state.
    #[test]
    fn a_life_that_is_over_changes_nothing() {
        let lives = Lives::default();
        let first = lives.current();
        assert!(!lives.is_mounted(first));
        lives.mount(first);
        assert!(lives.is_mounted(first));
        lives.begin();
        let second = lives.current();
        assert!(!lives.is_current(first) && !lives.is_mounted(first));
        lives.mount(first);
        assert!(!lives.is_mounted(second), "mounted by an ended life");
        lives.mount(second);
        assert_eq!(lives.unmount(first), None, "unmounted by an ended life");
        assert!(lives.is_mounted(second));
        let third = lives.unmount(second).unwrap();
        assert!(lives.is_current(third) && !lives.is_mounted(second) && !lives.is_mounted(third));
        assert_eq!(lives.while_current(second, || unreachable!("it is over")), None::<()>);
        let mut cleared = 0;
        assert!(lives.while_current(third, || cleared += 1).is_some());
        let fourth = lives.unmount(third).unwrap();
        assert_eq!(cleared, 1);
        lives.mount(third);
        assert!(!lives.is_mounted(fourth), "INIT ends a life, too");
    }
}
