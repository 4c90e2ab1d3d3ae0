// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mapper of the current session, for a device that outlives its sessions.

use std::fs::File;
use std::sync::Arc;

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};
use crate::support::lock::{Mutex, lock};

/// A mapper that passes each call to that of the current session. Without a session each call
/// succeeds and sends nothing: no front-end has a map, and the engine sends its maps to the next
/// front-end.
pub(crate) struct Current<M: ?Sized>(Mutex<Option<Arc<M>>>);

/// The front-end of the current session.
pub(crate) type FrontEnd = Current<dyn Mapper>;

impl<M: ?Sized> Default for Current<M> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<M: ?Sized> Current<M> {
    /// Sets the mapper of the current session, or None after its end.
    pub(crate) fn set(&self, mapper: Option<Arc<M>>) {
        let old = std::mem::replace(&mut *lock(&self.0), mapper);
        drop(old); // Not under the lock: the drop of a `ShmemMapper` takes a lock.
    }

    /// The mapper of the current session.
    pub(crate) fn get(&self) -> Option<Arc<M>> {
        lock(&self.0).clone()
    }
}

impl<M: Mapper + ?Sized> Mapper for Current<M> {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        self.get().map_or(Ok(()), |mapper| mapper.map(at, file, from, bytes))
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.get().map_or(Ok(()), |mapper| mapper.unmap(at, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mapper whose drop takes a lock, as that of `ShmemMapper` does.
    struct LocksOnDrop(Mutex<()>);

    impl Mapper for LocksOnDrop {
        fn map(
            &self,
            _: WindowOffset,
            _: &File,
            _: FileOffset,
            _: WindowBytes,
        ) -> Result<(), MapError> {
            Ok(())
        }

        fn unmap(&self, _: WindowOffset, _: WindowBytes) -> Result<(), MapError> {
            Ok(())
        }
    }

    impl Drop for LocksOnDrop {
        fn drop(&mut self) {
            drop(lock(&self.0));
        }
    }

    /// Shows: the mapper of the last session is dropped without a lock held. (A debug build panics
    /// if a lock of rank `Rank::Leaf` is taken under another one.)
    #[test]
    fn the_old_mapper_is_dropped_without_a_lock() {
        let front_end = FrontEnd::default();
        front_end.set(Some(Arc::new(LocksOnDrop(Mutex::default()))));
        front_end.set(None);
    }
}
