// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The mapper that a front-end carries out: SHMEM_MAP and SHMEM_UNMAP on the back-end channel.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserSharedMsg};
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};
use vm_memory::ByteValued;

use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};

/// The region's id; both virtio-pmem and virtio-fs have only region 0.
const SHMID: u8 = 0;

/// No descriptor: the kernel refuses to send it, and with it the message.
const NO_FD: RawFd = -1;

/// The UUID of a shared object that nobody adds.
const UNKNOWN_OBJECT: &[u8; 16] = b"vhost-user-dax\0?";

/// Sends SHMEM_MAP (back-end message 9) and SHMEM_UNMAP (10), and waits for the acks.
pub struct ShmemMapper {
    channel: Backend,
    started: Box<dyn Fn() -> bool + Send + Sync>,
}

/// Whether an ack from this front-end is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// It answers (REPLY_ACK).
    Real,
    /// It does not, and the library takes each message for done as soon as it is sent.
    Missing,
    /// It can't be asked.
    Unknown,
}

impl ShmemMapper {
    /// A mapper over the back-end channel. `started` says whether the device is started now.
    pub fn new(channel: Backend, started: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        Self { channel, started: Box::new(started) }
    }

    /// Finds out whether the front-end answers: the library does not tell. It is asked to forget a
    /// shared object that never was, which it must refuse; QEMU does so silently, and at any time.
    /// Blocks like a map.
    pub fn probe_acks(&self) -> Acks {
        let mut unknown_object = VhostUserSharedMsg::default();
        unknown_object.as_mut_slice().copy_from_slice(UNKNOWN_OBJECT);
        match sort(self.channel.shared_object_remove(&unknown_object)) {
            Ok(()) => Acks::Missing,
            Err(MapError::Refused) => Acks::Real,
            Err(_) => Acks::Unknown,
        }
    }
}

/// The library asks for the descriptor at the last moment, with its channel locked and nothing but
/// the system call to come. That is when to look whether the device is still started: a map must
/// not reach a stopped one (Q1), and another map may have kept this one waiting for long.
struct AtLastMoment<'a> {
    file: &'a File,
    mapper: &'a ShmemMapper,
    held_back: AtomicBool,
}

impl AsRawFd for AtLastMoment<'_> {
    fn as_raw_fd(&self) -> RawFd {
        if (self.mapper.started)() {
            return self.file.as_raw_fd();
        }
        self.held_back.store(true, Ordering::Relaxed);
        NO_FD
    }
}

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
        Some(None) => MapError::Unsupported("protocol feature SHMEM"),
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
        let file = AtLastMoment { file, mapper: self, held_back: AtomicBool::new(false) };
        let sent = sort(self.channel.shmem_map(&message(at, from, bytes), &file));
        if file.held_back.load(Ordering::Relaxed) { Err(MapError::Stopped) } else { sent }
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        if !(self.started)() {
            return Err(MapError::Stopped);
        }
        sort(self.channel.shmem_unmap(&message(at, FileOffset(0), bytes)))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn mapper(started: bool) -> (ShmemMapper, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Backend::from_stream(ours);
        channel.set_shmem_flag(true);
        (ShmemMapper::new(channel, move || started), theirs)
    }

    /// Shows: not one byte goes to the front-end of a stopped device (Q1), also from within the library.
    #[test]
    fn nothing_is_sent_to_a_stopped_device() {
        let file = tempfile::tempfile().unwrap();
        let map = |mapper: &ShmemMapper| {
            mapper.map(WindowOffset(0), &file, FileOffset(0), WindowBytes(4096))
        };
        let (stopped, mut theirs) = mapper(false);
        assert!(matches!(map(&stopped), Err(MapError::Stopped)));
        assert!(matches!(
            stopped.unmap(WindowOffset(0), WindowBytes(4096)),
            Err(MapError::Stopped)
        ));
        drop(stopped);
        assert_eq!(theirs.read_to_end(&mut Vec::new()).unwrap(), 0);

        let (started, mut theirs) = mapper(true);
        assert!(map(&started).is_ok());
        drop(started);
        assert!(theirs.read_to_end(&mut Vec::new()).unwrap() > 0);
    }
}
