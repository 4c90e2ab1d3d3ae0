// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opens `/dev/fuse` and makes the detached mount, in two steps: the first looks names up, the
//! second does not. Knows no requests.

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

/// A step of the creation of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Step {
    Device,
    FsOpen,
    FsConfig,
    Create,
    FsMount,
    /// The broker has no further /dev/fuse descriptor.
    Spare,
    /// The broker has ended.
    Broker,
}

impl Step {
    const ALL: [Self; 7] = [
        Self::Device,
        Self::FsOpen,
        Self::FsConfig,
        Self::Create,
        Self::FsMount,
        Self::Spare,
        Self::Broker,
    ];

    /// The step with this number in a message.
    pub(super) fn numbered(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u32 == number)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Device => "/dev/fuse",
            Self::FsOpen => "fsopen",
            Self::FsConfig => "fsconfig",
            Self::Create => "fsconfig create",
            Self::FsMount => "fsmount",
            Self::Spare => "the broker's last spare mount is used up",
            Self::Broker => "the broker process has ended",
        }
    }
}

/// The step that failed, and its error.
#[derive(Debug)]
pub(super) struct Failed {
    pub(super) step: Step,
    pub(super) cause: io::Error,
}

impl Failed {
    pub(super) fn at<E: Into<io::Error>>(step: Step) -> impl Fn(E) -> Self {
        move |cause| Self { step, cause: cause.into() }
    }
}

impl From<Failed> for Unavailable {
    fn from(failed: Failed) -> Self {
        match failed.step {
            Step::Device => Self::Device(failed.cause),
            step => Self::at(step.name())(failed.cause),
        }
    }
}

/// A mount whose last step, fsconfig create and fsmount, is left to do.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) device: File,
    context: OwnedFd,
}

/// Opens `/dev/fuse`, and configures the mount.
pub(super) fn prepare() -> Result<Prepared, Failed> {
    let device = open_device().map_err(Failed::at(Step::Device))?;
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(Failed::at(Step::FsOpen))?;
    let options = [
        ("source", "vhost-user-dax".to_owned()),
        ("fd", device.as_raw_fd().to_string()),
        ("rootmode", "40000".to_owned()), // S_IFDIR, in octal
        ("user_id", geteuid().to_string()),
        ("group_id", getegid().to_string()),
    ];
    for (key, value) in options {
        fsconfig_set_string(&context, key, value).map_err(Failed::at(Step::FsConfig))?;
    }
    // Without allow_other, a front-end with another uid could not get the length of a file whose
    // descriptor it received. Only this process can open files of the mount, since only it has a
    // descriptor of the root.
    fsconfig_set_flag(&context, "allow_other").map_err(Failed::at(Step::FsConfig))?;
    Ok(Prepared { device, context })
}

/// Opens `/dev/fuse`, the server's end of the connection. Reads and writes on it do not block: the
/// server thread waits in poll(2).
fn open_device() -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK.bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/fuse")
}

impl Prepared {
    /// The root of a mount that is in no mount table. It is removed with the last descriptor or map of
    /// its files.
    pub(super) fn mount(&self) -> Result<OwnedFd, Failed> {
        fsconfig_create(&self.context).map_err(Failed::at(Step::Create))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(Failed::at(Step::FsMount))
    }
}
