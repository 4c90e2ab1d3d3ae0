// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front-end of the current session, for a device that outlives its sessions.

use std::fs::File;
use std::sync::Arc;

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};
use crate::support::lock::{Mutex, lock};

/// A mapper that passes each call to the front-end of the current session. Without a session each
/// call succeeds and sends nothing: the engine keeps its maps, and sends them to the next
/// front-end.
#[derive(Default)]
pub(crate) struct FrontEnd(Mutex<Option<Arc<dyn Mapper>>>);

impl FrontEnd {
    pub(crate) fn set(&self, mapper: Option<Arc<dyn Mapper>>) {
        *lock(&self.0) = mapper;
    }

    fn get(&self) -> Option<Arc<dyn Mapper>> {
        lock(&self.0).clone()
    }
}

impl Mapper for FrontEnd {
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
