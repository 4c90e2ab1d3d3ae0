// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The settings of `vhost-user-dax fs`. Their types hold checked values only.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;
use virtiofsd::idmap::{GidMap, UidMap};
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, InodeFileHandlesMode, NegotiationMode};
use virtiofsd::soft_idmap::cmdline::IdMap;

use crate::passthrough::Mounter;
use crate::persist::PersistMode;
use crate::support::size::{Size, SizeError, whole_pmds};
use crate::support::units::PMD_BYTES;
use crate::window::WindowBytes;

/// Bytes of the tag in the config space (virtio 1.4 section 5.11.4).
pub const TAG_BYTES: usize = 36;

/// Largest number of 2 MiB slots in a window. QEMU 11.1 aborts at the 513th map or memory region of
/// a VM (Q2), and from about 384 on each further map takes tens of milliseconds.
pub const MAX_SLOTS: u64 = 384;

/// Default of `--dax-threshold`, in bytes. A file of at most this length is read by one READ, which
/// takes the front-end less time than a map.
pub const DEFAULT_DAX_THRESHOLD: Size = Size(1 << 20);

/// The name by which a guest mounts the share: 1 to [`TAG_BYTES`] bytes, none of them 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl Tag {
    /// The tag as in the config space: padded with zeros; a tag of 36 bytes has no final zero.
    pub(crate) fn padded(&self) -> [u8; TAG_BYTES] {
        let mut padded = [0; TAG_BYTES];
        for (to, from) in padded.iter_mut().zip(self.0.bytes()) {
            *to = from;
        }
        padded
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The text is no valid tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a tag has 1 to {TAG_BYTES} bytes, none of them 0")]
pub struct BadTag;

impl FromStr for Tag {
    type Err = BadTag;

    fn from_str(text: &str) -> Result<Self, BadTag> {
        let good = (1..=TAG_BYTES).contains(&text.len()) && !text.contains('\0');
        if good { Ok(Self(text.to_owned())) } else { Err(BadTag) }
    }
}

/// Length of a DAX window: 0, or a multiple of 2 MiB up to [`MAX_SLOTS`] slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize(u64);

impl WindowSize {
    /// No window.
    pub const NONE: Self = Self(0);

    /// The length, in bytes.
    pub fn bytes(self) -> WindowBytes {
        WindowBytes(self.0)
    }
}

/// Why a window can't have this length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WindowSizeError {
    /// The text is no size, or the size is no multiple of 2 MiB.
    #[error(transparent)]
    Size(#[from] SizeError),
    /// More than [`MAX_SLOTS`] slots.
    #[error(
        "{asked} is more than {MAX_SLOTS} slots of 2 MiB, and QEMU aborts at too many maps; {most} \
         would do"
    )]
    TooLarge {
        /// The requested length.
        asked: Size,
        /// The largest length that is accepted.
        most: Size,
    },
}

impl FromStr for WindowSize {
    type Err = WindowSizeError;

    fn from_str(text: &str) -> Result<Self, WindowSizeError> {
        let asked: Size = text.parse()?;
        let most = Size(MAX_SLOTS * PMD_BYTES);
        if asked.0 > most.0 {
            return Err(WindowSizeError::TooLarge { asked, most });
        }
        if asked.0 != 0 {
            whole_pmds(asked.0)?;
        }
        Ok(Self(asked.0))
    }
}

impl fmt::Display for WindowSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

/// Which files are mapped if the guest leaves the choice to the daemon (a mount with `-o
/// dax=inode`, or without a dax option).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaxPolicy {
    /// None: the share has no window.
    Never,
    /// Files longer than this number of bytes.
    Inode(u64),
    /// All files.
    Always,
}

impl DaxPolicy {
    pub(crate) fn pays(self, file_bytes: u64) -> bool {
        match self {
            Self::Never => false,
            Self::Inode(threshold) => file_bytes > threshold,
            Self::Always => true,
        }
    }
}

/// Settings of one share. Where an option has virtiofsd's meaning, it has virtiofsd's name.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // See the help text of the option of each field (`cli/fs.rs`).
pub struct FsConfig {
    pub shared_dir: PathBuf,
    pub tag: Tag,
    pub window: WindowSize,
    pub dax: DaxPolicy,
    pub persist: PersistMode,
    pub mem_slots: bool,
    pub request_queues: u16,
    pub threads: usize,
    pub readonly: bool,
    pub cache: CachePolicy,
    pub writeback: bool,
    pub allow_direct_io: bool,
    pub allow_mmap: bool,
    pub readdirplus: bool,
    pub xattr: bool,
    pub xattrmap: Option<XattrMap>,
    pub posix_acl: NegotiationMode,
    pub security_label: NegotiationMode,
    pub killpriv_v2: bool,
    pub announce_submounts: bool,
    pub inode_file_handles: InodeFileHandlesMode,
    pub preserve_noatime: bool,
    /// With a map here or in `gid_map` the daemon enters a user namespace.
    pub uid_map: Vec<UidMap>,
    pub gid_map: Vec<GidMap>,
    pub translate_uid: Vec<IdMap>,
    pub translate_gid: Vec<IdMap>,
    /// Largest number of descriptors that the daemon opens for the guest.
    pub guest_fds: u64,
    /// What makes the window's private mount.
    pub mounter: Mounter,
    /// The process's root is the share, which had this path.
    pub chroot: Option<String>,
}

impl FsConfig {
    /// Whether the settings ask for a window.
    pub fn wants_window(&self) -> bool {
        self.window != WindowSize::NONE && self.dax != DaxPolicy::Never && !self.readonly
    }

    /// The settings of a command line that has only these three options.
    pub fn new(shared_dir: PathBuf, tag: Tag, window: WindowSize) -> Self {
        Self {
            shared_dir,
            tag,
            window,
            dax: DaxPolicy::Inode(DEFAULT_DAX_THRESHOLD.0),
            persist: PersistMode::Auto,
            mem_slots: true,
            request_queues: 1,
            threads: DEFAULT_THREADS,
            readonly: false,
            cache: CachePolicy::Auto,
            writeback: false,
            allow_direct_io: false,
            allow_mmap: false,
            readdirplus: true,
            xattr: false,
            xattrmap: None,
            posix_acl: NegotiationMode::Never,
            security_label: NegotiationMode::Never,
            killpriv_v2: false,
            announce_submounts: true,
            inode_file_handles: InodeFileHandlesMode::Prefer,
            preserve_noatime: false,
            uid_map: Vec::new(),
            gid_map: Vec::new(),
            translate_uid: Vec::new(),
            translate_gid: Vec::new(),
            guest_fds: u64::MAX,
            mounter: Mounter::default(),
            chroot: None,
        }
    }
}

/// Default of `--thread-pool-size`: number of threads in the pool. A ring of QEMU's default length
/// holds 128 requests.
pub const DEFAULT_THREADS: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags() {
        assert_eq!("share".parse::<Tag>().unwrap().padded()[..6], *b"share\0");
        assert_eq!("x".repeat(TAG_BYTES).parse::<Tag>().unwrap().padded(), [b'x'; TAG_BYTES]);
        for bad in ["", "a\0b", &"x".repeat(TAG_BYTES + 1)] {
            assert_eq!(bad.parse::<Tag>(), Err(BadTag), "{bad:?}");
        }
    }

    /// Shows: a window that is too large for QEMU is refused, and the error names a size that fits.
    #[test]
    fn window_sizes() {
        assert_eq!("0".parse(), Ok(WindowSize::NONE));
        assert_eq!("768M".parse(), Ok(WindowSize(MAX_SLOTS * PMD_BYTES)));
        let line = |text: &str| text.parse::<WindowSize>().unwrap_err().to_string();
        assert!(line("1G").ends_with("; 768M would do"), "{}", line("1G"));
        assert!(line("3M").ends_with("; 2M or 4M would do"), "{}", line("3M"));
        assert!(line("1").ends_with("; 2M or 4M would do"));
        assert!(line("big").starts_with("write a size"));
    }
}
