// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: the library's vring with two changes: a missing kick is no error, and a used ring
//! that is not in memory is no error.
//!
//! The ring's thread gets the kick's event from epoll and then reads the event descriptor. In
//! between the front-end may have stopped and started the ring with a new descriptor that the
//! driver has not kicked: the read fails with EAGAIN. The library (vhost-user-backend 0.24) then
//! ends the ring's thread without a log line, and the ring is dead.
//!
//! At SET_VRING_ADDR the library loads the used index. A driver may have put the ring into a
//! window, beyond the end of a file: the load is SIGBUS there, and an error would end the whole
//! session. The daemon does not access such a ring afterwards, because it is not in RAM
//! (`device/memory.rs`).

use std::fs::File;
use std::io::{self, IoSliceMut};

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryBackend};

use crate::device::memory::GuestMemory;
use crate::support::lock::{MutexGuard, Rank};

/// Offset of the index in a used ring, in bytes (virtio 1.4 section 2.7.8: struct virtq_used).
const USED_IDX: u64 = 2;

/// [`VringMutex`], whose [`read_kick`](VringT::read_kick) accepts EAGAIN and whose
/// [`queue_used_idx`](VringT::queue_used_idx) reads by a system call.
#[derive(Clone)]
pub struct Vring(VringMutex<GuestMemory>, GuestMemory);

impl Vring {
    /// The used index, read by process_vm_readv(2); none if its address is not readable memory.
    fn used_idx(&self) -> Option<u16> {
        let at = GuestAddress(self.get_ref().get_queue().used_ring().checked_add(USED_IDX)?);
        let mem = self.1.memory();
        let base = mem.get_slice(at, size_of::<u16>()).ok()?.ptr_guard().as_ptr().addr();
        let mut index = [0; size_of::<u16>()];
        let remote = RemoteIoVec { base, len: index.len() };
        let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut index)], &[remote]);
        (read == Ok(index.len())).then(|| u16::from_le_bytes(index))
    }
}

impl<'a> VringStateGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl<'a> VringStateMutGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

/// Implements methods by calls of the library's vring.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self $(, $arg: $type)*) $(-> $result)? {
            self.0.$name($($arg),*)
        })*
    };
}

impl VringT<GuestMemory> for Vring {
    fn new(mem: GuestMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        Ok(Self(VringMutex::new(mem.clone(), max_queue_size)?, mem))
    }

    fn get_ref(&self) -> MutexGuard<'_, VringState<GuestMemory>> {
        MutexGuard::of(Rank::Vring, || self.0.get_ref())
    }

    fn get_mut(&self) -> MutexGuard<'_, VringState<GuestMemory>> {
        MutexGuard::of(Rank::Vring, || self.0.get_mut())
    }

    /// Whether the ring was kicked and is enabled. False, not an error, if the descriptor has no
    /// event.
    fn read_kick(&self) -> io::Result<bool> {
        match self.0.read_kick() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other,
        }
    }

    /// The used index, 0 where it can't be read.
    fn queue_used_idx(&self) -> Result<u16, QueueError> {
        Ok(self.used_idx().unwrap_or_default())
    }

    forward! {
        fn add_used(&self, desc_index: u16, len: u32) -> Result<(), QueueError>;
        fn signal_used_queue(&self) -> io::Result<()>;
        fn enable_notification(&self) -> Result<bool, QueueError>;
        fn disable_notification(&self) -> Result<(), QueueError>;
        fn needs_notification(&self) -> Result<bool, QueueError>;
        fn set_enabled(&self, enabled: bool);
        fn set_queue_info(&self, desc: u64, avail: u64, used: u64) -> Result<(), QueueError>;
        fn queue_next_avail(&self) -> u16;
        fn set_queue_next_avail(&self, base: u16);
        fn set_queue_next_used(&self, idx: u16);
        fn set_queue_size(&self, num: u16);
        fn set_queue_event_idx(&self, enabled: bool);
        fn set_queue_ready(&self, ready: bool);
        fn set_kick(&self, file: Option<File>);
        fn set_call(&self, file: Option<File>);
        fn set_err(&self, file: Option<File>);
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{FromRawFd, IntoRawFd};

    use vm_memory::{Bytes, FileOffset, GuestMemoryAtomic, GuestMemoryMmap};
    use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

    use super::*;

    /// Shows: reading a new descriptor that was not kicked is no error, which would end the ring's
    /// thread.
    #[test]
    #[allow(unsafe_code)] // The library takes the descriptor as a File.
    fn a_missing_kick_is_no_error() {
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let vring = Vring::new(mem, 16).unwrap();
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        // SAFETY: into_raw_fd() has just returned the descriptor, and no other owner exists.
        vring.set_kick(Some(unsafe { File::from_raw_fd(consumer.into_raw_fd()) }));
        vring.set_enabled(true);
        assert!(!vring.read_kick().unwrap());
        notifier.notify().unwrap();
        assert!(vring.read_kick().unwrap());
        assert!(!vring.read_kick().unwrap());
    }

    /// Shows: the used index of a ring beyond the end of a file, or outside all memory, is read as
    /// 0 without a SIGBUS; that of a ring in RAM is read from there.
    #[test]
    fn a_used_ring_outside_memory_has_index_0() {
        const BYTES: usize = 1 << 20;
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES as u64).unwrap();
        let backing = Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let regions =
            [(GuestAddress(0), BYTES, None), (GuestAddress(BYTES as u64), BYTES, backing)];
        let mem = GuestMemoryMmap::from_ranges_with_files(&regions).unwrap();
        mem.write_obj(7u16, GuestAddress(0x2002)).unwrap();
        file.set_len(0).unwrap();
        let vring = Vring::new(GuestMemoryAtomic::new(mem), 16).unwrap();
        for (used, index) in [(0x2000, 7), (BYTES as u64 + 0x2000, 0), (1 << 40, 0)] {
            vring.set_queue_info(0, 0x1000, used).unwrap();
            assert_eq!(vring.queue_used_idx().unwrap(), index, "{used:#x}");
        }
    }
}
