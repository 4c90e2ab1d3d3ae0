// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The part of the FUSE protocol (linux/fuse.h, 7.40) that the private mount needs: parses requests
//! and encodes replies. Knows no files.

use nix::errno::Errno;
use nix::unistd::{getegid, geteuid};

use super::CLAIMED_BYTES;

/// Size of the read buffer in bytes: the smallest that the kernel accepts (FUSE_MIN_READ_BUFFER).
pub const READ_BUFFER_BYTES: usize = 8192;

/// The inode number of the root (FUSE_ROOT_ID).
pub const ROOT: u64 = 1;

/// The major version of the protocol (FUSE_KERNEL_VERSION).
const MAJOR: u32 = 7;
/// The minor version of the protocol: the first with passthrough.
const MINOR: u32 = 40;

/// Flag of INIT: FUSE_PARALLEL_DIROPS.
const PARALLEL_DIROPS: u32 = 1 << 18;
/// Flag of INIT: FUSE_INIT_EXT, the second word of flags is valid.
const INIT_EXT: u32 = 1 << 30;
/// Flag of INIT: FUSE_PASSTHROUGH is bit 37, so bit 5 of the second word.
const PASSTHROUGH_2: u32 = 1 << (37 - 32);

/// The mount's maximum stack depth: the kernel's largest value (FILESYSTEM_MAX_STACK_DEPTH), which
/// backing files on overlayfs need. With it no file system can be stacked on the mount; none is,
/// since no other process can reach it.
const MAX_STACK_DEPTH: u32 = 2;

/// Flag of OPEN: the close of a descriptor sends no FLUSH, so it does not wait for the server
/// thread.
const FOPEN_NOFLUSH: u32 = 1 << 5;
/// Flag of OPEN: the inode passes through to the backing id of the reply.
const FOPEN_PASSTHROUGH: u32 = 1 << 7;

/// Validity of attributes in seconds: in effect forever, since they never change. The largest value
/// that does not become negative in the kernel's conversion.
const FOR_EVER: u64 = u32::MAX as u64;

/// Size of `struct fuse_in_header` in bytes.
const IN_HEADER_BYTES: usize = 40;
/// Size of `struct fuse_out_header` in bytes.
const OUT_HEADER_BYTES: u32 = 16;

/// The opcode of a request, with the fields that the server needs.
#[derive(Debug, PartialEq, Eq)]
pub enum Ask<'a> {
    Init {
        major: u32,
        minor: u32,
        passthrough: bool,
    },
    Lookup {
        name: &'a [u8],
    },
    GetAttr {
        node: u64,
    },
    Open {
        node: u64,
    },
    Release,
    StatFs,
    /// A change of attributes or of the length, which is refused.
    SetAttr,
    /// Must not be answered with ENOSYS: the kernel then returns success from each later fsync.
    Fsync,
    /// FORGET, BATCH_FORGET or INTERRUPT, which get no reply.
    Forget,
    /// An opcode that is not served.
    Other(u32),
    /// The body is shorter than the opcode demands.
    Malformed,
}

/// A parsed request.
#[derive(Debug, PartialEq, Eq)]
pub struct Request<'a> {
    pub unique: u64,
    pub ask: Ask<'a>,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

impl<'a> Request<'a> {
    /// Parses a request. None if `bytes` is shorter than the header.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (opcode, unique, node) = (u32_at(bytes, 4)?, u64_at(bytes, 8)?, u64_at(bytes, 16)?);
        let body = bytes.get(IN_HEADER_BYTES..)?;
        Some(Self { unique, ask: Ask::parse(opcode, node, body).unwrap_or(Ask::Malformed) })
    }
}

impl<'a> Ask<'a> {
    fn parse(opcode: u32, node: u64, body: &'a [u8]) -> Option<Self> {
        Some(match opcode {
            1 => Ask::Lookup { name: body.strip_suffix(&[0])? },
            3 => Ask::GetAttr { node },
            4 => Ask::SetAttr,
            14 => Ask::Open { node },
            17 => Ask::StatFs,
            18 => Ask::Release,
            20 => Ask::Fsync,
            26 => {
                let extended = u32_at(body, 12)? & INIT_EXT != 0;
                let flags2 = if extended { u32_at(body, 16)? } else { 0 };
                Ask::Init {
                    major: u32_at(body, 0)?,
                    minor: u32_at(body, 4)?,
                    passthrough: flags2 & PASSTHROUGH_2 != 0,
                }
            }
            // FORGET, INTERRUPT (each request is answered at once, so it needs no action) and
            // BATCH_FORGET.
            2 | 36 | 42 => Ask::Forget,
            other => Ask::Other(other),
        })
    }
}

/// An encoded reply, which must be written by one write(2).
#[derive(Debug)]
pub struct Reply(Vec<u8>);

impl Reply {
    fn new(unique: u64, error: i32) -> Self {
        let mut reply = Self(Vec::with_capacity(160));
        reply.u32(OUT_HEADER_BYTES).u32(error.cast_unsigned()).u64(unique);
        reply
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    /// `struct fuse_attr`: a directory with mode 0700, and files with mode 0600, owned by the
    /// daemon's user.
    fn attr(&mut self, node: u64) -> &mut Self {
        let (mode, bytes, links) = match node {
            ROOT => (0o040_700, 0, 2),
            _ => (0o100_600, CLAIMED_BYTES, 1),
        };
        self.u64(node).u64(bytes).u64(0); // ino, size, blocks
        self.u64(0).u64(0).u64(0).u32(0).u32(0).u32(0); // times
        self.u32(mode).u32(links).u32(geteuid().as_raw()).u32(getegid().as_raw());
        self.u32(0).u32(4096).u32(0) // rdev, blksize, flags
    }

    /// The bytes to write. Sets the first word to the reply's length.
    pub fn bytes(&mut self) -> &[u8] {
        let length = (self.0.len() as u32).to_ne_bytes();
        for (to, from) in self.0.iter_mut().zip(length) {
            *to = from;
        }
        &self.0
    }

    /// A success without a body.
    pub fn done(unique: u64) -> Self {
        Self::new(unique, 0)
    }

    /// An error.
    pub fn error(unique: u64, errno: Errno) -> Self {
        Self::new(unique, -(errno as i32))
    }

    /// `struct fuse_init_out`.
    pub fn init(unique: u64, max_readahead: u32) -> Self {
        let mut reply = Self::new(unique, 0);
        reply.u32(MAJOR).u32(MINOR).u32(max_readahead);
        reply.u32(INIT_EXT | PARALLEL_DIROPS);
        reply.u32(0); // max_background, congestion_threshold: the kernel's own
        reply.u32(4096).u32(1); // max_write: the kernel's minimum; time_gran: 1 ns
        reply.u32(0); // max_pages, map_alignment
        reply.u32(PASSTHROUGH_2).u32(MAX_STACK_DEPTH);
        for _ in 0..6 {
            reply.u32(0);
        }
        reply
    }

    /// `struct fuse_entry_out`: the name has no validity, the attributes are valid forever.
    pub fn entry(unique: u64, node: u64) -> Self {
        let mut reply = Self::new(unique, 0);
        reply.u64(node).u64(0).u64(0).u64(FOR_EVER).u32(0).u32(0).attr(node);
        reply
    }

    /// `struct fuse_attr_out`.
    pub fn attributes(unique: u64, node: u64) -> Self {
        let mut reply = Self::new(unique, 0);
        reply.u64(FOR_EVER).u32(0).u32(0).attr(node);
        reply
    }

    /// `struct fuse_open_out`.
    pub fn opened(unique: u64, backing_id: u32) -> Self {
        let mut reply = Self::new(unique, 0);
        reply.u64(0).u32(FOPEN_PASSTHROUGH | FOPEN_NOFLUSH).u32(backing_id);
        reply
    }

    /// A notification (FUSE_NOTIFY_INVAL_ENTRY): the kernel must drop a name of the root directory.
    pub fn name_is_gone(name: &str) -> Self {
        const NOTIFY_INVAL_ENTRY: i32 = 3;
        let mut notice = Self::new(0, NOTIFY_INVAL_ENTRY);
        notice.u64(ROOT).u32(name.len() as u32).u32(0);
        notice.0.extend(name.bytes());
        notice.0.push(0);
        notice
    }

    /// `struct fuse_statfs_out`: no blocks and no files; block size 4096, names of up to 255 bytes.
    pub fn statfs(unique: u64) -> Self {
        let mut reply = Self::new(unique, 0);
        reply.u64(0).u64(0).u64(0).u64(0).u64(0).u32(4096).u32(255).u32(4096);
        for _ in 0..7 {
            reply.u32(0);
        }
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((IN_HEADER_BYTES as u32 + body.len() as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(77_u64.to_ne_bytes());
        bytes.extend(node.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        bytes
    }

    /// Shows: parsing a request that is cut at any length does not panic, and a cut header is
    /// refused.
    #[test]
    fn a_short_request_is_none() {
        for (opcode, body) in [(1, &b"12\0"[..]), (14, &[0; 8]), (26, &[0xff; 64])] {
            let whole = request(opcode, 5, body);
            assert!(Request::parse(&whole).is_some());
            for short in 0..IN_HEADER_BYTES {
                assert_eq!(Request::parse(&whole[..short]), None);
            }
            for short in IN_HEADER_BYTES..whole.len() {
                let _ = Request::parse(&whole[..short]);
            }
        }
    }

    /// Shows: passthrough is recognized only if INIT has FUSE_INIT_EXT, which makes the second word
    /// of flags valid.
    #[test]
    fn an_old_kernel_has_no_passthrough() {
        let init = |flags: u32, flags2: u32| {
            let words = [7, 45, 0, flags, flags2].map(u32::to_ne_bytes);
            let bytes = request(26, 0, words.as_flattened());
            Request::parse(&bytes)
                .map(|r| r.ask == Ask::Init { major: 7, minor: 45, passthrough: true })
        };
        assert_eq!(init(INIT_EXT, PASSTHROUGH_2), Some(true));
        assert_eq!(init(0, PASSTHROUGH_2), Some(false));
        assert_eq!(init(INIT_EXT, 0), Some(false));
        let before_flags2 = request(26, 0, &[0; 16]);
        assert!(matches!(Request::parse(&before_flags2).unwrap().ask, Ask::Init { .. }));
    }

    /// Shows: each reply has the size of its structure in linux/fuse.h, also in its header.
    #[test]
    fn replies_have_the_sizes_of_the_header_file() {
        let replies = [
            (Reply::done(1), 0),
            (Reply::error(1, Errno::ENOENT), 0),
            (Reply::init(1, 0), 64),
            (Reply::entry(1, 2), 128),
            (Reply::attributes(1, 2), 104),
            (Reply::opened(1, 3), 16),
            (Reply::statfs(1), 80),
            (Reply::name_is_gone("234"), 16 + 4),
        ];
        for (mut reply, body) in replies {
            let bytes = reply.bytes();
            assert_eq!(bytes.len(), 16 + body);
            assert_eq!(u32_at(bytes, 0), Some(16 + body as u32));
        }
    }
}
