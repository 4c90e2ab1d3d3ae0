// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device and the mount, in two steps: what is looked up by a name, and what is not. Knows
//! nothing of what is served there.

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

/// A step on the way to a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Step {
    Device,
    FsOpen,
    FsConfig,
    Create,
    FsMount,
    /// No step of the kernel's: the broker has no further device.
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

    /// The step of a number that came in a message.
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

/// Where it failed.
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

/// A mount that lacks the last step.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) device: File,
    context: OwnedFd,
}

/// Opens the device, and says what is to be mounted.
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
    // Else a front-end with another uid would not even get the length of what it was handed. Who
    // may open is settled by who has a descriptor of the mount, and that is nobody but us.
    fsconfig_set_flag(&context, "allow_other").map_err(Failed::at(Step::FsConfig))?;
    Ok(Prepared { device, context })
}

/// The server's end. It never blocks: the server waits in poll.
fn open_device() -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK.bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/fuse")
}

impl Prepared {
    /// The root of a mount that is in no mount table. It goes away with the last descriptor into
    /// it.
    pub(super) fn mount(&self) -> Result<OwnedFd, Failed> {
        fsconfig_create(&self.context).map_err(Failed::at(Step::Create))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        fsmount(&self.context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(Failed::at(Step::FsMount))
    }
}
