// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opens `/dev/fuse` and makes the detached mount. Knows no requests.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::unistd::{getegid, geteuid};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::Unavailable;

/// Opens `/dev/fuse`, the server's end of the connection. Reads and writes on it do not block: the
/// server thread waits in poll(2).
pub(super) fn open_device() -> Result<File, Unavailable> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open("/dev/fuse")
        .map_err(Unavailable::Device)
}

/// A mount that is in no mount table. It is removed with the last descriptor or map of its files.
pub(super) fn detached(device: &File) -> Result<OwnedFd, Unavailable> {
    let at = |step| move |e: rustix::io::Errno| Unavailable::at(step)(io::Error::from(e));
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(at("fsopen"))?;
    let options = [
        ("source", "vhost-user-dax".to_owned()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()), // S_IFDIR, in octal
        ("user_id", geteuid().to_string()),
        ("group_id", getegid().to_string()),
    ];
    for (key, value) in options {
        fsconfig_set_string(&context, key, value).map_err(at("fsconfig"))?;
    }
    // Without allow_other, a front-end with another uid could not get the length of a file whose
    // descriptor it received. Only this process can open files of the mount, since only it has a
    // descriptor of the root.
    fsconfig_set_flag(&context, "allow_other").map_err(at("fsconfig"))?;
    fsconfig_create(&context).map_err(at("fsconfig create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(at("fsmount"))
}
