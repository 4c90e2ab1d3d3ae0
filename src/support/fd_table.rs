// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! /proc/self/fd: which descriptors this process has. A process whose root has no /proc keeps the
//! directory open from before.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::OnceLock;

use rustix::fs::{CWD, Dir, Mode, OFlags, openat};
use rustix::mount::{OpenTreeFlags, open_tree};

/// What [`keep`] has opened.
struct Kept {
    table: File,
    mountinfo: Option<File>,
}

static KEPT: OnceLock<Kept> = OnceLock::new();

/// Keeps /proc/self/fd within reach, of this process, and of no child; and /proc/self/mountinfo, if
/// `mountinfo`.
///
/// # Errors
/// The system's.
pub(crate) fn keep(mountinfo: bool) -> io::Result<()> {
    if KEPT.get().is_some() {
        return Ok(()); // There may be no /proc any more.
    }
    let mountinfo = mountinfo.then(|| File::open("/proc/self/mountinfo")).transpose()?;
    let kept = Kept { table: detached()?, mountinfo };
    let _ = KEPT.set(kept);
    Ok(())
}

/// The directory, in a mount of its own where that is permitted (CAP_SYS_ADMIN): from there `..`
/// leads nowhere. Without, `..` leads to the rest of /proc and from there to the host's root, also
/// out of a chroot(2).
fn detached() -> io::Result<File> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, "/proc/self/fd", flags) {
        Ok(tree) => Ok(tree.into()),
        Err(_) => File::open("/proc/self/fd"),
    }
}

/// The directory, open for reading.
///
/// # Errors
/// The system's.
pub(crate) fn open() -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = match KEPT.get() {
        Some(kept) => openat(&kept.table, ".", flags, Mode::empty()),
        None => openat(CWD, "/proc/self/fd", flags, Mode::empty()),
    };
    Ok(File::from(opened?))
}

/// What [`keep`] keeps: /proc/self/fd and /proc/self/mountinfo.
///
/// # Errors
/// The system's.
pub(crate) fn kept() -> io::Result<(Option<File>, Option<File>)> {
    let Some(kept) = KEPT.get() else { return Ok((None, None)) };
    let mountinfo = kept.mountinfo.as_ref().map(File::try_clone).transpose()?;
    Ok((Some(kept.table.try_clone()?), mountinfo))
}

/// The numbers of all descriptors.
///
/// # Errors
/// The system's.
pub(crate) fn numbers() -> io::Result<Vec<RawFd>> {
    let dir = Dir::new(open()?)?;
    let names = dir.filter_map(Result::ok);
    Ok(names.filter_map(|name| name.file_name().to_str().ok()?.parse().ok()).collect())
}
