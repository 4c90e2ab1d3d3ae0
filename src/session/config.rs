// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Validated settings: what is refused is refused before anything is created or changed.

use std::fmt;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

use crate::fs::{FsConfig, FsError};
use crate::persist::{PersistError, PersistMode};
use crate::pmem::PmemFileSpec;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// The unit of a region that Linux's nvdimm layer accepts, and of a huge page: 2 MiB.
pub const PMEM_ALIGN_BYTES: u64 = 2 * MIB;

/// Bytes that a Unix socket path can have: sun_path less the final zero (unix(7)).
pub const SOCKET_PATH_MAX_BYTES: usize = 107;

/// The settings of `vhost-user-dax pmem`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PmemConfig {
    /// Where the front-end finds the daemon.
    pub socket: SocketSpec,
    /// The file and what to do if it is missing.
    pub file: PmemFileSpec,
    /// What makes its bytes durable.
    pub persist: PersistMode,
    /// Offer CONFIGURE_MEM_SLOTS.
    pub mem_slots: bool,
    /// Wait for the next front-end when one has gone.
    pub keep_listening: bool,
}

/// The settings of `vhost-user-dax fs`.
#[derive(Debug, Clone)]
pub struct FsRunConfig {
    /// Where the front-end finds the daemon.
    pub socket: SocketSpec,
    /// What is served, and how.
    pub fs: FsConfig,
    /// Wait for the next front-end when one has gone.
    pub keep_listening: bool,
}

/// Where the front-end finds the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SocketSpec {
    /// A path to bind.
    Path {
        /// It.
        path: PathBuf,
        /// Who may connect beside the daemon's own user.
        group: Option<String>,
    },
    /// A listening Unix socket that was inherited.
    Fd(RawFd),
}

/// A length that virtio-pmem can have: a multiple of 2 MiB, not 0, and no more than a file can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PmemSize(u64);

impl PmemSize {
    /// Checks a length in bytes.
    ///
    /// # Errors
    /// [`SizeError::Unaligned`] names the two nearest lengths that would do.
    pub fn new(bytes: u64) -> Result<Self, SizeError> {
        if bytes > i64::MAX as u64 {
            return Err(SizeError::TooLarge);
        }
        if bytes == 0 || !bytes.is_multiple_of(PMEM_ALIGN_BYTES) {
            let below = (bytes - bytes % PMEM_ALIGN_BYTES).max(PMEM_ALIGN_BYTES);
            let above = below + PMEM_ALIGN_BYTES;
            return Err(SizeError::Unaligned { bytes, below: Size(below), above: Size(above) });
        }
        Ok(Self(bytes))
    }

    /// The length in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for PmemSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Size(self.0).fmt(f)
    }
}

impl FromStr for PmemSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        Self::new(text.parse::<Size>()?.0)
    }
}

/// A number of bytes as people write it: `4096`, `512M`, `1G`, `1GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let unit = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            _ => return Err(SizeError::Syntax),
        };
        if number.is_empty() {
            return Err(SizeError::Syntax);
        }
        let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
        number.checked_mul(unit).map(Size).ok_or(SizeError::TooLarge)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, letter) in [(TIB, "T"), (GIB, "G"), (MIB, "M"), (KIB, "K")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{}{letter}", self.0 / unit);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Why a length was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SizeError {
    /// Not a number with a unit.
    #[error("write a size as a number and a unit, for example 512M or 1G")]
    Syntax,
    /// More than a file can hold.
    #[error("the size is larger than any file can be")]
    TooLarge,
    /// Not a multiple of 2 MiB.
    #[error("{bytes} bytes is no multiple of 2 MiB; {below} or {above} would do")]
    Unaligned {
        /// What was asked for.
        bytes: u64,
        /// The nearest that would do, from below (or the smallest).
        below: Size,
        /// The next one.
        above: Size,
    },
}

/// A setting that can't be used. Each is one line that says what to do; the exit code is 2,
/// and nothing has been created or changed.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The texts say it better.
pub enum ConfigError {
    #[error("--file {path}: no such file; create it by adding --size, for example --size 1G", path = .0.display())]
    MissingFile(PathBuf),
    #[error("--file {path}: no such directory; create {dir} first", path = .path.display(), dir = .dir.display())]
    MissingDirectory { path: PathBuf, dir: PathBuf },
    #[error("--file {path} is a directory; name a file in it, for example --file {example}", path = .0.display(), example = .0.join("pmem.img").display())]
    Directory(PathBuf),
    #[error("--file {path} is neither a regular file nor a device-DAX node; name one, or a new file with --size", path = .0.display())]
    NotRegular(PathBuf),
    #[error("--file {path}: {error}; the daemon (uid {uid}) must be able to read and write it", path = .path.display())]
    NoAccess { path: PathBuf, uid: u32, error: io::Error },
    #[error("--file {path}: {error}; grow it with 'truncate -s SIZE FILE'", path = .path.display())]
    FileSize { path: PathBuf, error: SizeError },
    #[error("--file {path}: {error}; make its namespace anew with 'ndctl create-namespace --align 2M --size SIZE'", path = .path.display())]
    NodeSize { path: PathBuf, error: SizeError },
    #[error("--persist=cacheline: {path}: not each page can have a block ({error}); free some space, or take --persist=sync", path = .path.display())]
    Blocks { path: PathBuf, error: io::Error },
    #[error("{path}: {error}", path = .path.display())]
    Persist { path: PathBuf, error: PersistError },
    #[error("--file {path} lacks one byte: a daemon that was killed while it created it leaves it so; remove it, if so, and start again", path = .0.display())]
    Unfinished(PathBuf),
    #[error("--sparse and --persist=cacheline: {path} lies on a DAX file system, where each page must have its block before its lines can be made durable; leave one out", path = .0.display())]
    SparseLines(PathBuf),
    #[error("--file {path} is {actual}, not {wanted}; give --size {actual} or leave --size out", path = .path.display())]
    SizeDiffers { path: PathBuf, actual: PmemSize, wanted: PmemSize },
    #[error("--file {path}: no room for {size} ({error}); free some space, take a smaller --size, or add --sparse and never let the disk fill up", path = .path.display())]
    NoSpace { path: PathBuf, size: PmemSize, error: io::Error },
    #[error("--file {path}: this file system can't allocate ahead ({error}); add --sparse and never let the disk fill up", path = .path.display())]
    NoAllocate { path: PathBuf, error: io::Error },
    #[error("--file {path} is in use by another process (a daemon, or a VM that still maps it); stop that first", path = .0.display())]
    Locked(PathBuf),
    #[error("--file {path}: {error}", path = .path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("--shared-dir {path}: {error}; name a directory that the daemon can read", path = .path.display())]
    SharedDir { path: PathBuf, error: io::Error },
    #[error(transparent)]
    Fs(#[from] FsError),
    #[error("{0}")]
    Option(String),
    #[error(
        "--socket-path has {0} bytes; the system allows {SOCKET_PATH_MAX_BYTES}, so take a shorter one"
    )]
    SocketPathLength(usize),
    #[error("--socket-path {path} exists and is no socket; remove it or take another path", path = .0.display())]
    NotASocket(PathBuf),
    #[error("--socket-path {path}: another process listens there; stop it or take another path", path = .0.display())]
    SocketInUse(PathBuf),
    #[error("--socket-group {0}: there is no such group; name one that 'getent group' lists")]
    SocketGroup(String),
    #[error("--socket-group: {path} can't be given to that group ({error}); run the daemon as root or as a member of it", path = .path.display())]
    SocketGroupOwner { path: PathBuf, error: io::Error },
    #[error("--socket-path {path}: {error}; the directory must exist and be writable", path = .path.display())]
    Socket { path: PathBuf, error: io::Error },
    #[error(
        "--fd {fd} {why}; pass a listening Unix stream socket, as systemd's socket activation does"
    )]
    Fd { fd: RawFd, why: &'static str },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("4096", 4096), ("512M", 512 * MIB), ("1g", GIB), ("3GiB", 3 * GIB), ("2T", 2 * TIB)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "1X", "1 G", "0x10", "1GB"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Syntax), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615K"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn sizes_are_written_in_the_largest_unit_that_fits() {
        for (bytes, text) in [
            (0, "0"),
            (1000, "1000"),
            (2 * MIB, "2M"),
            (1536 * MIB, "1536M"),
            (GIB, "1G"),
            (TIB, "1T"),
        ] {
            assert_eq!(Size(bytes).to_string(), text);
        }
    }

    #[test]
    fn a_size_that_will_not_do_names_two_that_would() {
        for (bytes, below, above) in
            [(3 * MIB, "2M", "4M"), (GIB + 1, "1G", "1026M"), (0, "2M", "4M")]
        {
            let line = PmemSize::new(bytes).unwrap_err().to_string();
            assert!(line.ends_with(&format!("{below} or {above} would do")), "{line}");
        }
        assert_eq!(PmemSize::new(u64::MAX), Err(SizeError::TooLarge));
        assert!(PmemSize::new(i64::MAX as u64).unwrap_err().to_string().contains("would do"));
        assert_eq!(PmemSize::new(2 * MIB).map(PmemSize::bytes), Ok(2 * MIB));
    }
}
