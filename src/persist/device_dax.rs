// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Device-DAX nodes (`/dev/dax0.0`), and the page size of a map of a file.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;
use std::sync::OnceLock;

use nix::sys::stat::{major, minor};
use nix::sys::statfs;

use crate::support::units::{PAGE_BYTES, PMD_BYTES};

/// The properties of a device-DAX node in sysfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DaxNode {
    /// Its length in bytes: a multiple of its alignment, so all of it can be mapped.
    pub bytes: u64,
    /// Its alignment in bytes: the smallest part that can be mapped or replaced in a map.
    pub align: u64,
}

impl DaxNode {
    /// The node that `file` has open. None if `file` is no device-DAX node.
    ///
    /// # Errors
    /// The error of fstat(2) or of reading `size` in sysfs; InvalidData if `size` is no number.
    pub fn of(file: &File) -> io::Result<Option<Self>> {
        let found = file.metadata()?;
        if !found.file_type().is_char_device() {
            return Ok(None);
        }
        let number = found.rdev();
        // A sandboxed process sees no /sys: the values of the daemon's node were read before it was
        // sandboxed. Without a lock: callers hold locks of the last rank.
        static KNOWN: OnceLock<(u64, DaxNode)> = OnceLock::new();
        if let Some((_, known)) = KNOWN.get().filter(|(known, _)| *known == number) {
            return Ok(Some(*known));
        }
        let node = PathBuf::from(format!("/sys/dev/char/{}:{}", major(number), minor(number)));
        let subsystem = fs::canonicalize(node.join("subsystem")).unwrap_or_default();
        if subsystem.file_name().is_none_or(|name| name != "dax") {
            return Ok(None);
        }
        let value = |name: &str| {
            let text = fs::read_to_string(node.join(name))?;
            text.trim().parse::<u64>().map_err(|_| io::Error::from(io::ErrorKind::InvalidData))
        };
        // Before Linux 5.10 only the region has an alignment. If neither can be read, 2 MiB is
        // assumed, the default of the kernel.
        let align = value("align").or_else(|_| value("../dax_region/align"));
        let align = align.ok().filter(|align| align.is_power_of_two()).unwrap_or(PMD_BYTES);
        let known = Self { bytes: value("size")?, align };
        let _ = KNOWN.set((number, known));
        Ok(Some(known))
    }
}

/// The page size of a map of the file, in bytes.
///
/// # Errors
/// See [`DaxNode::of`]; the error of fstat(2).
pub(crate) fn page_bytes(file: &File) -> io::Result<u64> {
    if let Some(node) = DaxNode::of(file)? {
        return Ok(node.align);
    }
    let is_huge =
        statfs::fstatfs(file).is_ok_and(|s| s.filesystem_type() == statfs::HUGETLBFS_MAGIC);
    // On hugetlbfs the block size of stat(2) is the page size. On other file systems it is not.
    let page = if is_huge { file.metadata()?.blksize() } else { rustix::param::page_size() as u64 };
    Ok(page.max(PAGE_BYTES))
}
