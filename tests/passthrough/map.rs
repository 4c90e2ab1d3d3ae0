// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A real mmap in the place of the front-end's, and the one place here that is opened for `unsafe`.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;

/// A shared, writable map of a part of a file. Nobody asks how long the file is.
pub struct Map {
    at: *mut u8,
    bytes: u64,
}

// SAFETY: it is read and written with volatile accesses only, and it is no one thread's.
unsafe impl Send for Map {}

impl Map {
    pub fn of(file: &File, bytes: u64) -> Self {
        Self::at(file, 0, bytes)
    }

    pub fn at(file: &File, offset: u64, bytes: u64) -> Self {
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let (fd, null) = (file.as_raw_fd(), std::ptr::null_mut());
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let at = unsafe { libc::mmap(null, bytes as usize, prot, flags, fd, offset as i64) };
        assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self { at: at.cast(), bytes }
    }

    pub fn load(&self, from: u64, bytes: usize) -> Vec<u8> {
        assert!(from + bytes as u64 <= self.bytes);
        // SAFETY: inside the mapping, as just checked; volatile, since others write to it.
        (0..bytes).map(|n| unsafe { self.at.add(from as usize + n).read_volatile() }).collect()
    }

    pub fn store(&self, from: u64, data: &[u8]) {
        assert!(from + data.len() as u64 <= self.bytes);
        for (n, byte) in data.iter().enumerate() {
            // SAFETY: as above.
            unsafe { self.at.add(from as usize + n).write_volatile(*byte) };
        }
    }

    /// What a store of one byte at `from` kills the process with, if with anything. The store is a
    /// child's, which shares the mapping.
    pub fn store_kills(&self, from: u64) -> Option<Signal> {
        assert!(from < self.bytes);
        // SAFETY: the child only stores a byte and ends, so it needs no lock that another thread
        // held.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: inside the mapping; and no destructor of the parent's runs in the child.
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
        // SAFETY: our own mapping, and nobody has a reference into it.
        unsafe { libc::munmap(self.at.cast(), self.bytes as usize) };
    }
}

/// A mount namespace for this thread alone.
pub fn own_mount_namespace() {
    // SAFETY: it touches no memory.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
}
