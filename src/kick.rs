// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 2 of 6: the library's vring, but for one thing: a kick that is not there is no error.
//!
//! The ring's thread learns of a kick from epoll and then reads the event descriptor. In between the
//! front-end may have stopped and started the ring, and the descriptor is a new one that nobody has
//! kicked: the read says EAGAIN. The library (vhost-user-backend 0.24) ends the thread for that, and
//! the device is dead without a word.

use std::fs::File;
use std::io;
use std::sync::MutexGuard;

use vhost_user_backend::{VringMutex, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error as QueueError;

use crate::vring::GuestMemory;

/// [`VringMutex`], with a patient [`read_kick`](VringT::read_kick).
#[derive(Clone)]
pub struct Vring(VringMutex<GuestMemory>);

impl<'a> VringStateGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

impl<'a> VringStateMutGuard<'a, GuestMemory> for Vring {
    type G = MutexGuard<'a, VringState<GuestMemory>>;
}

/// Hands calls on to the library's vring.
macro_rules! forward {
    ($(fn $name:ident(&self $(, $arg:ident: $type:ty)*) $(-> $result:ty)?;)*) => {
        $(fn $name(&self $(, $arg: $type)*) $(-> $result)? {
            self.0.$name($($arg),*)
        })*
    };
}

impl VringT<GuestMemory> for Vring {
    fn new(mem: GuestMemory, max_queue_size: u16) -> Result<Self, QueueError> {
        VringMutex::new(mem, max_queue_size).map(Self)
    }

    /// Whether there is something to do: a kick, and an enabled ring.
    fn read_kick(&self) -> io::Result<bool> {
        match self.0.read_kick() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other,
        }
    }

    forward! {
        fn get_ref(&self) -> MutexGuard<'_, VringState<GuestMemory>>;
        fn get_mut(&self) -> MutexGuard<'_, VringState<GuestMemory>>;
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
        fn queue_used_idx(&self) -> Result<u16, QueueError>;
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

    use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
    use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

    use super::*;

    /// Shows: a new, unkicked descriptor is "nothing to do", not the end of the ring's thread.
    #[test]
    #[allow(unsafe_code)] // The library wants the descriptor as a File.
    fn a_kick_that_is_not_there_is_no_error() {
        let mem = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let vring = Vring::new(mem, 16).unwrap();
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::NONBLOCK).unwrap();
        // SAFETY: into_raw_fd() has just given the descriptor up.
        vring.set_kick(Some(unsafe { File::from_raw_fd(consumer.into_raw_fd()) }));
        vring.set_enabled(true);
        assert!(!vring.read_kick().unwrap());
        notifier.notify().unwrap();
        assert!(vring.read_kick().unwrap());
        assert!(!vring.read_kick().unwrap());
    }
}
