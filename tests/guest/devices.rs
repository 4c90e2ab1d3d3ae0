// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several pmem devices in a VM, resets, and a rebind of the driver. Afterwards the window must
//! show the same file again.

use crate::disk::{Disk, pattern};
use crate::vm::{Guest, Vm, slot_of};

const LEN: usize = 300_000;

fn write(vm: &mut Vm<'_>, disk: &Disk, file: &str, seed: &str) -> String {
    let report = vm.run("write", &[file, &LEN.to_string(), seed]);
    disk.check_is(&report, &pattern(seed, LEN));
    report.get("sha256").to_owned()
}

/// Two devices in one VM: each has its own file, and bytes written to one device do not reach the
/// other file.
#[test]
fn two_devices() {
    let Some(guest) = Guest::enter("two_devices") else { return };
    let disks = [Disk::new(128), Disk::new(130)];
    let mut vm = guest.boot(&[&disks[0], &disks[1]]);
    for (index, disk) in disks.iter().enumerate() {
        let (dev, bytes) = vm.ready(index);
        assert_eq!(bytes, disk.bytes(), "{dev} is not disk {index}");
        vm.run("mkfs", &["ext4", &dev]);
        vm.run("mount", &["ext4", &dev, &format!("/mnt/{index}")]);
    }
    for (index, disk) in disks.iter().enumerate() {
        write(&mut vm, disk, &format!("/mnt/{index}/file"), &format!("disk-{index}"));
    }
    for (index, disk) in disks.iter().enumerate() {
        vm.run("umount", &[&format!("/mnt/{index}")]);
        // A file's first block begins with its pattern.
        let all = disk.read(0, disk.bytes());
        let has = |seed: usize| {
            let start = format!("disk-{seed}\n").into_bytes();
            all.chunks(4096).any(|block| block.starts_with(&start))
        };
        assert!(
            has(index) && !has(1 - index),
            "disk {index} lacks its own bytes, or has the other disk's"
        );
    }
    vm.poweroff();
}

/// A reset with the file system mounted: the window is mapped again, the fsynced bytes are there,
/// and newly written bytes reach the host.
#[test]
fn reboot_inside_the_guest() {
    let Some(guest) = Guest::enter("reboot_inside_the_guest") else { return };
    let disk = Disk::new(130);
    let mut vm = guest.boot(&[&disk]);
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    let mut sha256 = write(&mut vm, &disk, "/mnt/file-0", "boot-0");
    for boot in 1..=2 {
        vm.reboot();
        let (dev, bytes) = vm.ready(0);
        assert_eq!(bytes, disk.bytes());
        vm.run("mount", &["ext4", &dev, "/mnt"]);
        vm.run("verify", &[&format!("/mnt/file-{}", boot - 1), &sha256]);
        sha256 = write(&mut vm, &disk, &format!("/mnt/file-{boot}"), &format!("boot-{boot}"));
    }
    vm.run("umount", &["/mnt"]);
    vm.run("fsck", &["ext4", &dev]);
    vm.poweroff();
}

/// The driver is unbound and bound again, twice.
#[test]
fn driver_unbind_and_bind() {
    let Some(guest) = Guest::enter("driver_unbind_and_bind") else { return };
    let disk = Disk::new(128);
    let mut vm = guest.boot(&[&disk]);
    let (mut dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    let mut sha256 = write(&mut vm, &disk, "/mnt/file-0", "bind-0");
    for bind in 1..=2 {
        vm.run("umount", &["/mnt"]);
        dev = vm.run("rebind", &[&slot_of(0)]).get("dev").to_owned();
        vm.run("mount", &["ext4", &dev, "/mnt"]);
        vm.run("verify", &[&format!("/mnt/file-{}", bind - 1), &sha256]);
        sha256 = write(&mut vm, &disk, &format!("/mnt/file-{bind}"), &format!("bind-{bind}"));
    }
    vm.run("umount", &["/mnt"]);
    vm.run("fsck", &["ext4", &dev]);
    vm.poweroff();
}
