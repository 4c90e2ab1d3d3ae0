// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host file system on a [`LossyDisk`], in a mount namespace of the calling thread.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use fuser::BackgroundSession;
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::lossy::{LossyDisk, NAME, Survivors};

/// mkfs.xfs refuses a device below 300 MiB.
const DISK_BYTES: u64 = 320 << 20;

/// The type of the host's file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ext4,
    Xfs,
    Btrfs,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Xfs, Self::Btrfs];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
        }
    }

    /// The file-system check with its option for "report only, repair nothing".
    pub fn fsck(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Ext4 => ("e2fsck", &["-fn"]),
            Self::Xfs => ("xfs_repair", &["-n"]),
            Self::Btrfs => ("btrfs", &["check", "--readonly"]),
        }
    }

    /// The mkfs program, with options against discards: the disk does not support them.
    fn mkfs(self) -> (&'static str, &'static [&'static str]) {
        match self {
            Self::Ext4 => ("mkfs.ext4", &["-q", "-F", "-E", "nodiscard,lazy_itable_init=0"]),
            Self::Xfs => ("mkfs.xfs", &["-q", "-f", "-K"]),
            Self::Btrfs => ("mkfs.btrfs", &["-q", "-f", "-K"]),
        }
    }
}

/// Runs a program. The error contains its stderr.
pub fn run(program: &str, args: &[&str]) -> Result<(), String> {
    let done = Command::new(program).args(args).output().map_err(|e| format!("{program}: {e}"))?;
    if done.status.success() {
        return Ok(());
    }
    Err(format!("{program} {args:?}: {}", String::from_utf8_lossy(&done.stderr)))
}

/// Moves the calling thread and its children to a new mount namespace, so that no mount outlives
/// them.
pub fn own_namespace() -> Result<(), String> {
    unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("unshare: {e}"))?;
    run("mount", &["--make-rprivate", "/"])
}

/// A mounted file system, unmounted at drop.
pub struct Mounted {
    folder: TempDir,
}

impl Mounted {
    /// Mounts an image, through a loop device, on a new temporary folder.
    pub fn new(image: &Path) -> Result<Self, String> {
        let folder = TempDir::new().map_err(|e| e.to_string())?;
        let place = folder.path().display().to_string();
        run("mount", &["-o", "loop", &image.display().to_string(), &place])?;
        Ok(Self { folder })
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Mounted {
    /// Unmounts, and runs a file-system check that does not change the image.
    pub fn fsck(self, image: &Path, fsck: (&str, &[&str])) -> Result<(), String> {
        run("umount", &[&self.folder.path().display().to_string()])?;
        let image = image.display().to_string();
        run(fsck.0, &[fsck.1, &[image.as_str()]].concat()).map_err(|why| format!("LOST: {why}"))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: after the power failure writeback fails, so an ordinary umount may fail, too.
        let _ = run("umount", &["-l", &self.folder.path().display().to_string()]);
    }
}

/// The lossy disk, with a mounted file system on it.
pub struct HostDisk {
    // The fields are dropped in this order.
    mounted: Mounted,
    _session: BackgroundSession,
    _folder: TempDir,
    disk: LossyDisk,
}

impl HostDisk {
    pub fn new(kind: Kind) -> Result<Self, String> {
        let text = |e: std::io::Error| e.to_string();
        let folder = TempDir::new().map_err(text)?;
        let disk = LossyDisk::new(DISK_BYTES);
        let session = disk.mount(folder.path()).map_err(text)?;
        let image = folder.path().join(NAME);
        let (mkfs, options) = kind.mkfs();
        run(mkfs, &[options, &[image.to_str().expect("a path in ASCII")]].concat())?;
        let mounted = Mounted::new(&image)?;
        Ok(Self { mounted, _session: session, _folder: folder, disk })
    }

    pub fn path(&self) -> &Path {
        self.mounted.path()
    }

    pub fn disk(&self) -> &LossyDisk {
        &self.disk
    }

    /// Cuts the power and unmounts the file system.
    pub fn off(self) -> LossyDisk {
        self.disk.lose_power();
        self.disk.clone()
    }
}

/// The file system as it is found after the power failure.
pub struct Recovered {
    mounted: Mounted,
    folder: TempDir,
}

impl Recovered {
    /// Recovers the disk's image and mounts it, which replays the journal.
    pub fn of(disk: &LossyDisk, survivors: Survivors) -> Result<Self, String> {
        let folder = TempDir::new_in("/dev/shm").map_err(|e| e.to_string())?;
        let image = folder.path().join("image");
        File::create(&image)
            .and_then(|file| disk.recover(&file, survivors))
            .map_err(|e| e.to_string())?;
        Ok(Self { mounted: Mounted::new(&image)?, folder })
    }

    /// Unmounts and runs the file-system check.
    pub fn fsck(self, kind: Kind) -> Result<(), String> {
        self.mounted.fsck(&self.folder.path().join("image"), kind.fsck())
    }

    pub fn path(&self) -> PathBuf {
        self.mounted.path().to_owned()
    }
}
