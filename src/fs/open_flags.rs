// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The flags of OPEN, OPENDIR and CREATE: what may be asked of the host, and the same for all
//! three. (virtiofsd's file system looks at some of them in OPEN, and at none when CREATE makes a
//! file.) Knows no file.

use std::io;

use super::message::invalid;

/// What has a meaning for a file that somebody reads and writes through us. Others are the guest
/// kernel's own business (O_CREAT, O_NOCTTY, FMODE_EXEC), or nobody's (O_ASYNC would signal us),
/// and are left out.
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

/// What makes another thing of an open: a file without a name, a descriptor that can't be read.
/// Linux sends neither; TMPFILE is a request of its own.
const OTHER: i32 = libc::O_PATH | (libc::O_TMPFILE & !libc::O_DIRECTORY);

/// What this daemon was told.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct OpenFlags {
    /// `--allow-direct-io`
    pub(crate) direct_io: bool,
    /// `--preserve-noatime`
    pub(crate) noatime: bool,
}

impl OpenFlags {
    /// What the host is asked for. `writeback`: the guest's cache may read where it only writes.
    ///
    /// # Errors
    /// EINVAL for what is no open of a file.
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

    /// Shows: what the options leave out is left out, what is not an open is refused, the rest
    /// stays.
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
