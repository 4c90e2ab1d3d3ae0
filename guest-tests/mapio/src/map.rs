// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A mapping of a file. Other processes may change its bytes at any time.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::AtomicU64;

use crate::Result;

pub const PAGE: usize = 4096;

pub struct Mapping {
    start: *mut u8,
    bytes: usize,
}

impl Mapping {
    /// `flags` is MAP_SHARED or MAP_PRIVATE.
    pub fn new(file: &File, bytes: usize, write: bool, flags: libc::c_int) -> Result<Self> {
        let protection = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, flags, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap of {bytes} bytes: {}", std::io::Error::last_os_error()));
        }
        Ok(Self { start: start.cast(), bytes })
    }

    pub fn shared(file: &File, bytes: usize, write: bool) -> Result<Self> {
        Self::new(file, bytes, write, libc::MAP_SHARED)
    }

    pub fn pointer(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.bytes, "{offset} of {}", self.bytes);
        // SAFETY: inside the mapping, as just checked.
        unsafe { self.start.add(offset) }
    }

    /// Copies the bytes out, because other processes may store to the mapping at any time.
    pub fn load(&self, offset: usize, into: &mut [u8]) {
        assert!(offset + into.len() <= self.bytes, "{offset}+{} of {}", into.len(), self.bytes);
        // SAFETY: the source is inside the mapping; the target is an exclusive reference.
        unsafe { self.start.add(offset).copy_to_nonoverlapping(into.as_mut_ptr(), into.len()) };
    }

    pub fn store(&self, offset: usize, from: &[u8]) {
        assert!(offset + from.len() <= self.bytes, "{offset}+{} of {}", from.len(), self.bytes);
        // SAFETY: the target is inside the mapping, which its maker made writable.
        unsafe { self.start.add(offset).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
    }

    pub fn counter(&self, offset: usize) -> &AtomicU64 {
        assert!(offset + 8 <= self.bytes && offset.is_multiple_of(8));
        // SAFETY: inside the mapping, aligned, and accessed only as an atomic by both processes.
        unsafe { AtomicU64::from_ptr(self.start.add(offset).cast()) }
    }

    pub fn msync(&self) -> Result<()> {
        self.msync_range(0, self.bytes)
    }

    /// Calls msync(2) for the pages that contain a byte of the range.
    pub fn msync_range(&self, offset: usize, bytes: usize) -> Result<()> {
        assert!(bytes > 0 && offset + bytes <= self.bytes, "{offset}+{bytes} of {}", self.bytes);
        let skip = offset % PAGE;
        // SAFETY: pages of the mapping.
        match unsafe {
            libc::msync(self.start.add(offset - skip).cast(), skip + bytes, libc::MS_SYNC)
        } {
            0 => Ok(()),
            _ => Err(format!("msync: {}", std::io::Error::last_os_error())),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and no reference points into it.
        unsafe { libc::munmap(self.start.cast(), self.bytes) };
    }
}
