// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The FUSE protocol, written for the tests alone (Linux's include/uapi/linux/fuse.h, version 7.38
//! and later): opcodes, encoders of requests, and decoders of replies.

/// Opcodes.
pub mod op {
    #![allow(missing_docs)]
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const ACCESS: u32 = 34;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SETUPMAPPING: u32 = 48;
    pub const REMOVEMAPPING: u32 = 49;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Node id of the share's root.
pub const ROOT: u64 = 1;
/// The file handle that Linux sends in SETUPMAPPING: no handle.
pub const NO_HANDLE: u64 = u64::MAX;
/// FUSE_SETUPMAPPING_FLAG_WRITE.
pub const MAP_WRITE: u64 = 1;
/// FUSE_SETUPMAPPING_FLAG_READ.
pub const MAP_READ: u64 = 2;
/// Length of struct fuse_in_header, in bytes.
pub const IN_HEADER: usize = 40;
/// Length of struct fuse_out_header, in bytes.
pub const OUT_HEADER: usize = 16;
/// Length of struct fuse_entry_out, in bytes.
pub const ENTRY_OUT: usize = 128;
/// Length of struct fuse_attr_out, in bytes.
pub const ATTR_OUT: usize = 104;
/// Length of struct fuse_open_out, in bytes.
pub const OPEN_OUT: usize = 16;
/// Length of struct fuse_init_out, in bytes.
pub const INIT_OUT: usize = 64;
/// FATTR_SIZE.
const FATTR_SIZE: u32 = 1 << 3;
/// FATTR_MODE.
const FATTR_MODE: u32 = 1 << 0;
/// FATTR_MTIME.
const FATTR_MTIME: u32 = 1 << 5;
/// FUSE_MAP_ALIGNMENT.
pub const MAP_ALIGNMENT: u64 = 1 << 26;
/// FUSE_INIT_EXT.
const INIT_EXT: u64 = 1 << 30;
/// FUSE_HAS_INODE_DAX.
pub const HAS_INODE_DAX: u64 = 1 << 33;
/// FUSE_ASYNC_READ, BIG_WRITES, DO_READDIRPLUS, PARALLEL_DIROPS, MAX_PAGES: flags of Linux's INIT.
const USUAL: u64 = 1 | 1 << 5 | 1 << 13 | 1 << 18 | 1 << 22;

/// A request's argument, built word by word.
#[derive(Debug, Clone, Default)]
pub struct Arg(pub Vec<u8>);

impl Arg {
    /// An empty argument.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends le32 words.
    pub fn u32s(mut self, words: &[u32]) -> Self {
        words.iter().for_each(|word| self.0.extend_from_slice(&word.to_le_bytes()));
        self
    }

    /// Appends le64 words.
    pub fn u64s(mut self, words: &[u64]) -> Self {
        words.iter().for_each(|word| self.0.extend_from_slice(&word.to_le_bytes()));
        self
    }

    /// Appends bytes.
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a name with its NUL.
    pub fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(&[0])
    }
}

/// struct fuse_in_header.
pub fn in_header(len: u32, opcode: u32, unique: u64, nodeid: u64) -> Vec<u8> {
    let head = Arg::new().u32s(&[len, opcode]).u64s(&[unique, nodeid]);
    head.u32s(&[0, 0, 4711, 0]).0
}

/// The le32 at offset `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The le64 at offset `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// struct fuse_init_in, as Linux with DAX sends it.
pub fn init() -> Arg {
    init_with(MAP_ALIGNMENT | HAS_INODE_DAX)
}

/// struct fuse_init_in with the flags `more` beside the usual ones.
pub fn init_with(more: u64) -> Arg {
    let flags = USUAL | INIT_EXT | more;
    let arg = Arg::new().u32s(&[7, 41, 1 << 17, flags as u32, (flags >> 32) as u32]);
    arg.u32s(&[0; 11])
}

/// struct fuse_open_in.
pub fn open(flags: i32) -> Arg {
    Arg::new().u32s(&[flags as u32, 0])
}

/// struct fuse_create_in and the name.
pub fn create(name: &str, flags: i32, mode: u32) -> Arg {
    Arg::new().u32s(&[flags as u32, libc::S_IFREG | mode, 0o022, 0]).name(name)
}

/// struct fuse_read_in.
pub fn read(fh: u64, offset: u64, size: u32) -> Arg {
    Arg::new().u64s(&[fh, offset]).u32s(&[size, 0]).u64s(&[0]).u32s(&[0, 0])
}

/// struct fuse_write_in, without the data.
pub fn write(fh: u64, offset: u64, size: u32) -> Arg {
    read(fh, offset, size)
}

/// struct fuse_getattr_in.
pub fn getattr() -> Arg {
    Arg::new().u32s(&[0, 0]).u64s(&[0])
}

/// struct fuse_setattr_in that sets the size.
pub fn set_size(size: u64) -> Arg {
    let arg = Arg::new().u32s(&[FATTR_SIZE, 0]).u64s(&[0, size, 0, 0, 0, 0]);
    arg.u32s(&[0; 8])
}

/// struct fuse_setattr_in that sets mtime, in whole seconds.
pub fn set_mtime(seconds: u64) -> Arg {
    let arg = Arg::new().u32s(&[FATTR_MTIME, 0]).u64s(&[0, 0, 0, 0, seconds, 0]);
    arg.u32s(&[0; 8])
}

/// struct fuse_setattr_in that sets the permissions.
pub fn set_mode(mode: u32) -> Arg {
    let arg = Arg::new().u32s(&[FATTR_MODE, 0]).u64s(&[0; 6]);
    arg.u32s(&[0, 0, 0, libc::S_IFREG | mode, 0, 0, 0, 0])
}

/// struct fuse_fallocate_in.
pub fn fallocate(fh: u64, offset: u64, length: u64, mode: i32) -> Arg {
    Arg::new().u64s(&[fh, offset, length]).u32s(&[mode as u32, 0])
}

/// struct fuse_fsync_in.
pub fn fsync(fh: u64, datasync: bool) -> Arg {
    Arg::new().u64s(&[fh]).u32s(&[u32::from(datasync), 0])
}

/// struct fuse_flush_in.
pub fn flush(fh: u64) -> Arg {
    Arg::new().u64s(&[fh]).u32s(&[0, 0]).u64s(&[0])
}

/// struct fuse_release_in.
pub fn release(fh: u64) -> Arg {
    Arg::new().u64s(&[fh]).u32s(&[0, 0]).u64s(&[0])
}

/// struct fuse_rename_in and both names.
pub fn rename(old: &str, newdir: u64, new: &str) -> Arg {
    Arg::new().u64s(&[newdir]).name(old).name(new)
}

/// struct fuse_copy_file_range_in.
pub fn copy_file_range(from: (u64, u64), to: (u64, u64, u64), len: u64) -> Arg {
    Arg::new().u64s(&[from.0, from.1, to.0, to.1, to.2, len, 0])
}

/// struct fuse_setupmapping_in.
pub fn setupmapping(foffset: u64, len: u64, flags: u64, moffset: u64) -> Arg {
    Arg::new().u64s(&[NO_HANDLE, foffset, len, flags, moffset])
}

/// struct fuse_removemapping_in and its ranges (moffset, len), in bytes.
pub fn removemapping(ranges: &[(u64, u64)]) -> Arg {
    let head = Arg::new().u32s(&[ranges.len() as u32]);
    ranges.iter().fold(head, |arg, &(moffset, len)| arg.u64s(&[moffset, len]))
}

/// The fields of struct fuse_entry_out that tests read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The node id.
    pub nodeid: u64,
    /// The attributes.
    pub attr: Attr,
}

/// The fields of struct fuse_attr that tests read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// The file's length in bytes.
    pub size: u64,
    /// File type and permissions.
    pub mode: u32,
    /// Flags, for example FUSE_ATTR_DAX.
    pub flags: u32,
}

impl Attr {
    /// Decodes struct fuse_attr.
    pub fn parse(attr: &[u8]) -> Self {
        Self { size: u64_at(attr, 8), mode: u32_at(attr, 60), flags: u32_at(attr, 84) }
    }
}

impl Entry {
    /// Decodes struct fuse_entry_out.
    pub fn parse(entry: &[u8]) -> Self {
        Self { nodeid: u64_at(entry, 0), attr: Attr::parse(&entry[40..]) }
    }
}

/// The names and node ids in a READDIRPLUS reply.
pub fn direntplus_names(mut bytes: &[u8]) -> Vec<(String, u64)> {
    let mut names = Vec::new();
    while bytes.len() >= ENTRY_OUT + 24 {
        let nodeid = u64_at(bytes, 0);
        let len = u32_at(bytes, ENTRY_OUT + 16) as usize;
        let name = &bytes[ENTRY_OUT + 24..ENTRY_OUT + 24 + len];
        names.push((String::from_utf8(name.to_vec()).unwrap(), nodeid));
        bytes = &bytes[(ENTRY_OUT + 24 + len).next_multiple_of(8).min(bytes.len())..];
    }
    names
}
