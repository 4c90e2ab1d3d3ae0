// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The flags of OPEN, OPENDIR and CREATE that are passed on to the host: the same for all three.
//! (virtiofsd's file system checks some of them in OPEN, and none when CREATE makes a file.) Knows
//! no file.

use std::io;

use super::message::invalid;

/// Flags that affect reads and writes by the daemon. Other flags are removed: O_CREAT, O_NOCTTY and
/// FMODE_EXEC concern the guest's kernel only, and O_ASYNC would send signals to the daemon.
const KNOWN: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_EXCL
    | libc::O_NONBLOCK
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME;

/// Flags that change the kind of the open: to an unnamed file, or to a descriptor that can't be
/// read. Linux does not send them in these requests; TMPFILE is a request of its own.
const OTHER: i32 = libc::O_PATH | (libc::O_TMPFILE & !libc::O_DIRECTORY);

/// Options of the daemon that permit flags.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct OpenFlags {
    /// `--allow-direct-io`
    pub(crate) direct_io: bool,
    /// `--preserve-noatime`
    pub(crate) noatime: bool,
}

impl OpenFlags {
    /// The flags for the host. `writeback`: the guest has a writeback cache, which also reads a
    /// file that the guest's program opened only for writing.
    ///
    /// # Errors
    /// EINVAL for a flag of [`OTHER`].
    pub(crate) fn of(self, asked: u32, writeback: bool) -> io::Result<u32> {
        let asked = asked.cast_signed();
        if asked & OTHER != 0 {
            return Err(invalid());
        }
        let mut flags = asked & KNOWN;
        if !self.direct_io {
            flags &= !libc::O_DIRECT;
        }
        if !self.noatime {
            flags &= !libc::O_NOATIME;
        }
        if writeback && flags & libc::O_ACCMODE == libc::O_WRONLY {
            flags = flags & !libc::O_ACCMODE | libc::O_RDWR;
        }
        Ok(flags.cast_unsigned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(flags: OpenFlags, asked: i32, writeback: bool) -> Option<i32> {
        flags.of(asked.cast_unsigned(), writeback).ok().map(u32::cast_signed)
    }

    /// Shows: flags that the options do not permit are removed, flags of [`OTHER`] are refused, and
    /// the others stay.
    #[test]
    fn flags() {
        let none = OpenFlags::default();
        let all = OpenFlags { direct_io: true, noatime: true };
        let both = libc::O_DIRECT | libc::O_NOATIME | libc::O_RDWR;
        assert_eq!(of(none, both, false), Some(libc::O_RDWR));
        assert_eq!(of(all, both, false), Some(both));
        let usual = libc::O_WRONLY | libc::O_APPEND | libc::O_TRUNC | libc::O_DSYNC;
        assert_eq!(of(none, usual, false), Some(usual));
        assert_eq!(of(none, libc::O_WRONLY, true), Some(libc::O_RDWR));
        let kernels = libc::O_CREAT | libc::O_NOCTTY | libc::O_ASYNC | 0x20;
        assert_eq!(of(none, kernels | libc::O_EXCL, false), Some(libc::O_EXCL));
        for other in [libc::O_PATH, libc::O_TMPFILE | libc::O_RDWR, -1] {
            assert_eq!(of(all, other, false), None, "{other:#o}");
        }
    }
}
