// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mapper that a front-end carries out: SHMEM_MAP and SHMEM_UNMAP on the back-end channel.

use std::fs::File;
use std::io;

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};

/// The region's id; both virtio-pmem and virtio-fs have only region 0.
const SHMID: u8 = 0;

/// Sends SHMEM_MAP (back-end message 9) and SHMEM_UNMAP (10), and waits for the acks.
pub struct ShmemMapper(pub Backend);

fn message(at: WindowOffset, from: FileOffset, bytes: WindowBytes) -> VhostUserMMap {
    VhostUserMMap {
        shmid: SHMID,
        padding: [0; 7],
        fd_offset: from.0,
        shm_offset: at.0,
        len: bytes.0,
        flags: VhostUserMMapFlags::WRITABLE.bits(),
    }
}

/// The library hides its error in an `io::Error`; one without it is its own "not negotiated".
fn sort(result: io::Result<u64>) -> Result<(), MapError> {
    let Err(e) = result else { return Ok(()) };
    Err(match e.get_ref().map(|inner| inner.downcast_ref::<Error>()) {
        Some(Some(Error::FrontendInternalError)) => MapError::Refused,
        Some(None) => MapError::NotNegotiated,
        _ => MapError::Broken(e),
    })
}

impl Mapper for ShmemMapper {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        sort(self.0.shmem_map(&message(at, from, bytes), file))
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        sort(self.0.shmem_unmap(&message(at, FileOffset(0), bytes)))
    }
}
