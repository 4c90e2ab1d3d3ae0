// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which driver a request is of, and whether that one has mounted. What is left of an earlier one
//! must not unmount, nor mount, what a later one has.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::support::lock::{Mutex, Rank, lock};

/// What one driver has mounted, or is about to: a life ends with a reset of the device, with
/// DESTROY, and with an INIT that finds something mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Life(u64);

const MOUNTED: u64 = 1;

/// The device's.
pub(crate) struct Lives {
    /// The current life, times two, and whether it has mounted.
    state: AtomicU64,
    /// Held while what belongs to the current life is thrown away: files are closed under it.
    turn: Mutex<()>,
}

impl Default for Lives {
    fn default() -> Self {
        Self { state: AtomicU64::new(0), turn: Mutex::ranked(Rank::Lives, ()) }
    }
}

impl Lives {
    /// The current one.
    pub(crate) fn current(&self) -> Life {
        Life(self.state.load(SeqCst) & !MOUNTED)
    }

    /// Whether it is still the current one.
    pub(crate) fn is_current(&self, life: Life) -> bool {
        self.current() == life
    }

    /// Whether it is, and has mounted.
    pub(crate) fn is_mounted(&self, life: Life) -> bool {
        self.state.load(SeqCst) == life.0 | MOUNTED
    }

    /// It has mounted. Nothing happens if it is over.
    pub(crate) fn mount(&self, life: Life) {
        let _ = self.state.compare_exchange(life.0, life.0 | MOUNTED, SeqCst, SeqCst);
    }

    /// The last one is over: what it still does alone has ended when this returns.
    pub(crate) fn begin(&self) {
        let next = |state: u64| Some((state & !MOUNTED).wrapping_add(2));
        let _ = self.state.fetch_update(SeqCst, SeqCst, next);
        drop(lock(&self.turn));
    }

    /// What was mounted is over: no request of `life` changes anything from now on. Returns the
    /// life that follows; none if `life` was over already.
    pub(crate) fn unmount(&self, life: Life) -> Option<Life> {
        let next = Life(life.0.wrapping_add(2));
        let end = |state: u64| (state & !MOUNTED == life.0).then_some(next.0);
        self.state.fetch_update(SeqCst, SeqCst, end).ok().map(|_| next)
    }

    /// Does `work` with no other life beginning or being thrown away meanwhile. None, and nothing is
    /// done, if `life` is over.
    pub(crate) fn while_current<T>(&self, life: Life, work: impl FnOnce() -> T) -> Option<T> {
        let _turn = lock(&self.turn);
        self.is_current(life).then(work)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: a life that is over neither mounts nor unmounts, nor throws anything away.
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
        assert!(!lives.is_mounted(second), "mounted by another driver");
        lives.mount(second);
        assert_eq!(lives.unmount(first), None, "another driver's");
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
