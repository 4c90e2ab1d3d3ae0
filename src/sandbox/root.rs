// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a process sees of the file tree: a root in memory that is read-only, and in it the share
//! and the process's own descriptors; or nothing at all.

#![allow(unsafe_code)] // mount_setattr(2) has no safe form; unshare(2) has one thread.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Where the share is in the new root.
pub const SHARE: &str = "/share";

/// Files and directories of the new root: the share, proc/self/fd, mountinfo, and the root itself.
const ROOT_OPTIONS: &CStr = c"size=64k,nr_inodes=16,mode=755";

/// The share's root, opened before anything else was done: it is what is shown, whatever its path
/// leads to later.
#[derive(Debug)]
pub struct Share {
    path: PathBuf,
    root: File,
}

impl Share {
    /// # Errors
    /// The system's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        Ok(Self { path: fs::canonicalize(path)?, root })
    }

    /// The path without links.
    pub fn path_text(&self) -> String {
        self.path.to_string_lossy().into_owned()
    }

    /// Its root.
    pub(super) fn root(&self) -> &File {
        &self.root
    }

    /// A copy of the mount, with all that is mounted below it, that belongs to the current
    /// namespace.
    fn clone_mount(&self, readonly: bool) -> io::Result<OwnedFd> {
        let id = |file: &dyn Fn() -> rustix::io::Result<rustix::fs::Stat>| {
            file().map(|found| (found.st_dev, found.st_ino))
        };
        let tree = open_tree(CWD, &self.path, tree_flags() | OpenTreeFlags::AT_RECURSIVE)?;
        let same = id(&|| rustix::fs::fstat(&self.root))? == id(&|| rustix::fs::fstat(&tree))?;
        if !same {
            return Err(io::Error::other("its path leads to another directory by now"));
        }
        // No file there is a program, a device or a way to another user for this process.
        let attributes = libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC
            | if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
        match set_attributes(&tree, attributes) {
            // Before Linux 5.12.
            Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => {}
            done => done?,
        }
        Ok(tree)
    }
}

fn tree_flags() -> OpenTreeFlags {
    OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC
}

fn set_attributes(tree: &OwnedFd, attributes: u64) -> io::Result<()> {
    let change =
        libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    // SAFETY: the descriptor is open, the path is a string, and `change` is as long as it is said
    // to be; all three outlive the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of_val(&change),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Leaves the host's mount, IPC and UTS namespaces, and those in `more`.
///
/// # Errors
/// The system's: EPERM without CAP_SYS_ADMIN in the current user namespace.
pub fn leave_namespaces(more: UnshareFlags) -> io::Result<()> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | more;
    // SAFETY: no descriptors are unshared, so none that another thread uses is closed.
    unsafe { unshare_unsafe(flags) }.map_err(at("unshare"))?;
    // What the host mounts in the share later is shown, with the host's options of that mount
    // (SECURITY.md, "What is not defended"); what the host unmounts is not kept mounted. What this
    // process mounts is not shown.
    let slave = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
    mount_change("/", slave).map_err(at("making the mounts private"))
}

/// Says which step failed.
pub(super) fn at(step: &'static str) -> impl Fn(rustix::io::Errno) -> io::Error {
    move |e| {
        let e = io::Error::from(e);
        io::Error::new(e.kind(), format!("{step}: {e}"))
    }
}

/// What of /proc/self a root has.
struct Proc {
    /// This process's descriptors.
    fds: OwnedFd,
    mountinfo: OwnedFd,
}

impl Proc {
    fn clone_mounts() -> io::Result<Self> {
        let clone = |path: &str| open_tree(CWD, path, tree_flags()).map_err(at("open_tree"));
        Ok(Self { fds: clone("/proc/self/fd")?, mountinfo: clone("/proc/self/mountinfo")? })
    }
}

/// Has this process see `share` in [`SHARE`], its own descriptors in /proc/self/fd, and nothing
/// else. In namespaces of its own.
///
/// # Errors
/// The system's.
pub fn enter(share: Option<&Share>, readonly: bool) -> io::Result<()> {
    let tree = share.map(|share| share.clone_mount(readonly)).transpose()?;
    let proc = Proc::clone_mounts()?;
    new_root(|| {
        let attach = |tree: &OwnedFd, to: &str| {
            move_mount(tree, "", CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                .map_err(at("move_mount"))
        };
        if let Some(tree) = &tree {
            fs::create_dir("share")?;
            attach(tree, "share")?;
        }
        fs::create_dir_all("proc/self/fd")?;
        attach(&proc.fds, "proc/self/fd")?;
        File::create("proc/self/mountinfo")?;
        attach(&proc.mountinfo, "proc/self/mountinfo")
    })
}

/// Has this process see nothing. In namespaces of its own.
///
/// # Errors
/// The system's.
pub fn enter_empty() -> io::Result<()> {
    new_root(|| Ok(()))
}

/// Makes a root in memory, has `fill` fill it (the working directory), and leaves the old one.
fn new_root(fill: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    // Any directory will do for the moment until it is the root.
    const PLACE: &str = "/proc";
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tmpfs", PLACE, "tmpfs", flags, Some(ROOT_OPTIONS)).map_err(at("mount tmpfs"))?;
    chdir(PLACE).map_err(at("chdir"))?;
    fill()?;
    pivot_root(".", ".").map_err(at("pivot_root"))?;
    // The old root lies on top of the new one.
    unmount(".", UnmountFlags::DETACH).map_err(at("umount"))?;
    chdir("/").map_err(at("chdir"))?;
    let readonly = MountFlags::BIND | MountFlags::RDONLY | flags;
    mount_remount("/", readonly, c"").map_err(at("remount"))
}

/// chroot(2) into the share; without one, into a directory that is empty and removed.
///
/// # Errors
/// The system's: EPERM without CAP_SYS_CHROOT.
pub fn change(share: Option<&Share>) -> io::Result<()> {
    match share {
        Some(share) => fchdir(share.root.as_fd())?,
        None => {
            // By a name that no other user can have taken before.
            let dir = nix::unistd::mkdtemp(&std::env::temp_dir().join("vhost-user-dax-XXXXXX"))?;
            let opened = File::open(&dir);
            fs::remove_dir(&dir)?;
            fchdir(opened?)?;
        }
    }
    chroot(".").map_err(at("chroot"))?;
    Ok(chdir("/")?)
}
