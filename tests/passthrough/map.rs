// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real mmap(2), as the front-end makes it; the only module here with `unsafe`.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// A shared, writable map of a part of a file. The part may lie beyond the end of the file.
pub struct Map {
    at: *mut u8,
    bytes: u64,
}

// SAFETY: the map is accessed by volatile loads and stores only, and belongs to no thread.
unsafe impl Send for Map {}

impl Map {
    pub fn of(file: &File, bytes: u64) -> Self {
        Self::at(file, 0, bytes)
    }

    pub fn at(file: &File, offset: u64, bytes: u64) -> Self {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (fd, null) = (file.as_raw_fd(), std::ptr::null_mut());
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at = unsafe { libc::mmap(null, bytes as usize, prot, flags, fd, offset as i64) };
        assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self { at: at.cast(), bytes }
    }

    pub fn load(&self, from: u64, bytes: usize) -> Vec<u8> {
        assert!(from + bytes as u64 <= self.bytes);
        // SAFETY: inside the mapping, as just checked; volatile, since other processes store to it.
        (0..bytes).map(|n| unsafe { self.at.add(from as usize + n).read_volatile() }).collect()
    }

    pub fn store(&self, from: u64, data: &[u8]) {
        assert!(from + data.len() as u64 <= self.bytes);
        for (n, byte) in data.iter().enumerate() {
            // SAFETY: as in `load`.
            unsafe { self.at.add(from as usize + n).write_volatile(*byte) };
        }
    }

    /// The signal by which a store of one byte at `from` kills a process, if it does. A forked
    /// child, which shares the mapping, makes the store.
    pub fn store_kills(&self, from: u64) -> Option<Signal> {
        assert!(from < self.bytes);
        // SAFETY: the child only stores a byte and ends, so it takes no lock that another thread
        // could hold.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: inside the mapping; `_exit` runs no destructor of the parent in the
                // child.
                unsafe {
                    self.at.add(from as usize).write_volatile(1);
                    libc::_exit(0)
                }
            }
            child => match waitpid(Pid::from_raw(child), None).unwrap() {
                WaitStatus::Exited(_, 0) => None,
                WaitStatus::Signaled(_, signal, _) => Some(signal),
                other => panic!("{other:?}"),
            },
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and no reference points into it.
        unsafe { libc::munmap(self.at.cast(), self.bytes as usize) };
    }
}

/// Moves this thread to a new mount namespace.
pub fn own_mount_namespace() {
    // SAFETY: unshare(2) accesses no memory.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
}
