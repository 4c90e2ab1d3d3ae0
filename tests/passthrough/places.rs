// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One instance of each file system. They are detached mounts, so they vanish with their
//! descriptors.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Output};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};
use tempfile::{NamedTempFile, TempDir};

use crate::skipped;

/// A file system to test on.
pub struct Place {
    pub name: &'static str,
    dir: PathBuf,
    /// The image behind the loop device, for file systems that have one.
    pub disk: Option<File>,
    _mount: Option<OwnedFd>,
    _temp: Option<TempDir>,
}

impl Place {
    pub fn create(&self, name: &str) -> File {
        let path = self.dir.join(name);
        OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap()
    }

    pub fn open(&self, name: &str) -> File {
        OpenOptions::new().read(true).write(true).open(self.dir.join(name)).unwrap()
    }

    pub fn remove(&self, name: &str) {
        std::fs::remove_file(self.dir.join(name)).unwrap();
    }

    fn mounted(name: &'static str, mount: OwnedFd) -> Self {
        let dir = format!("/proc/self/fd/{}", mount.as_raw_fd()).into();
        Self { name, dir, disk: None, _mount: Some(mount), _temp: None }
    }

    fn temporary(name: &'static str, within: &str) -> Self {
        let temp = TempDir::new_in(within).unwrap();
        Self { name, dir: temp.path().into(), disk: None, _mount: None, _temp: Some(temp) }
    }
}

/// All file systems that the host can mount; a SKIPPED line for each other one.
pub fn all() -> Vec<Place> {
    let mut all = vec![Place::temporary("here", "."), Place::temporary("tmpfs", "/dev/shm")];
    let tried = [
        ("ext4", ext4()),
        ("xfs", disk("xfs", "320M", &["mkfs.xfs", "-q"])),
        ("btrfs", disk("btrfs", "128M", &["mkfs.btrfs", "-q"])),
        ("overlayfs", overlay()),
    ];
    for (name, made) in tried {
        match made {
            Ok(place) => all.push(place),
            Err(e) => skipped(&format!("{name}: {e}")),
        }
    }
    all
}

fn mount(kind: &str, options: &[(&str, &str)]) -> Result<OwnedFd, String> {
    let at = |step: &'static str| move |e| format!("{step}: {e}");
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(at("fsopen"))?;
    for (key, value) in options {
        fsconfig_set_string(&context, *key, *value).map_err(at("fsconfig"))?;
    }
    fsconfig_create(&context).map_err(at("fsconfig create"))?;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).map_err(at("fsmount"))
}

fn run(program: &str, arguments: &[&str]) -> Result<Output, String> {
    match Command::new(program).args(arguments).output() {
        Ok(output) if output.status.success() => Ok(output),
        Ok(output) => Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(e) => Err(format!("{program}: {e}")),
    }
}

/// A file system on a loop device. Both vanish with the mount.
fn disk(kind: &'static str, size: &str, mkfs: &[&str]) -> Result<Place, String> {
    let image = NamedTempFile::new_in(".").unwrap();
    let path = image.path().to_str().unwrap();
    run("truncate", &["-s", size, path])?;
    run(mkfs[0], &[&mkfs[1..], &[path]].concat())?;
    let found = run("losetup", &["--find", "--show", path])?;
    let device = String::from_utf8(found.stdout).unwrap();
    let mounted = mount(kind, &[("source", device.trim())]);
    // `losetup -d` detaches the device as soon as the mount no longer uses it.
    run("losetup", &["-d", device.trim()])?;
    let mut place = Place::mounted(kind, mounted?);
    place.disk = Some(image.reopen().unwrap());
    Ok(place)
}

/// ext4 with blocks of 4 KiB; mkfs would choose 1 KiB for so small a device.
pub fn ext4() -> Result<Place, String> {
    disk("ext4", "16M", &["mkfs.ext4", "-q", "-F", "-b", "4096"])
}

/// A tmpfs with a size limit.
pub fn memory(size: &str) -> Result<Place, String> {
    Ok(Place::mounted("tmpfs", mount("tmpfs", &[("size", size)])?))
}

/// overlayfs over a directory on the current file system.
pub fn overlay() -> Result<Place, String> {
    let temp = TempDir::new_in(".").unwrap();
    let path = |name| temp.path().join(name).to_str().unwrap().to_owned();
    let [lower, upper, work] = ["lower", "upper", "work"].map(path);
    for dir in [&lower, &upper, &work] {
        std::fs::create_dir(dir).unwrap();
    }
    std::fs::write(format!("{lower}/from-below"), [7; 5000]).unwrap();
    let options = [("lowerdir", &*lower), ("upperdir", &*upper), ("workdir", &*work)];
    let mut place = Place::mounted("overlayfs", mount("overlay", &options)?);
    place._temp = Some(temp);
    Ok(place)
}

/// overlayfs over an overlayfs. The lower one can be used read-only: overlayfs refuses it as an
/// upper layer.
pub fn overlay_over(below: &Place) -> Result<Place, String> {
    let temp = TempDir::new_in(".").unwrap();
    let path = |name| temp.path().join(name).to_str().unwrap().to_owned();
    let [upper, work] = ["upper", "work"].map(path);
    for dir in [&upper, &work] {
        std::fs::create_dir(dir).unwrap();
    }
    let lower = below.dir.to_str().unwrap();
    let options = [("lowerdir", lower), ("upperdir", &*upper), ("workdir", &*work)];
    let mut place = Place::mounted("overlayfs over overlayfs", mount("overlay", &options)?);
    place._temp = Some(temp);
    Ok(place)
}

/// The kernel's list of FUSE connections: a directory with a subdirectory for each.
pub fn connections() -> PathBuf {
    let mount = mount("fusectl", &[]).unwrap();
    let dir = format!("/proc/self/fd/{}", mount.as_raw_fd()).into();
    // Leaks one descriptor until the test process ends.
    std::mem::forget(mount);
    dir
}
