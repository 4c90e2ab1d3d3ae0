// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Events in the life of a virtio-fs device (mounts, rebinds, pauses, reboots, kills), and devices
//! with other settings.

use std::fs::File;

use serde_json::json;
use tempfile::TempDir;

use crate::disk::{Disk, pattern};
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm, slot_of_share};

const LEN: usize = 3_000_000;

/// Writes a file in the guest and checks its bytes on the host.
fn write(vm: &mut Vm<'_>, share: &Share, name: &str) {
    let file = format!("/mnt/{name}");
    vm.run("sh", &["touch", &file]);
    vm.run("mapio", &["append", &LEN.to_string(), name, &file]);
    vm.run("mapio", &["store", "4000", "9000", "stored", "none", &file]);
    let mut expected = pattern(name, LEN);
    expected[4000..13_000].copy_from_slice(&pattern("stored", 9000));
    assert!(std::fs::read(share.path(name)).unwrap() == expected, "the bytes on the host differ");
}

/// A hundred mounts and twenty rebinds leak no descriptor and no map in the daemon.
#[test]
fn mounts_and_rebinds() {
    let Some(guest) = Guest::enter("mounts_and_rebinds") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "lives")];
    std::fs::write(shares[0].path("file"), pattern("file", LEN)).unwrap();
    let options = if shares[0].has_window() { "dax=always" } else { "rw" };
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.run("fs-mounts", &["lives", "/mnt", options, "3", "file"]);
    let began = vm.share(0).usage();
    vm.run("fs-mounts", &["lives", "/mnt", options, "100", "file"]);
    vm.share(0).usage().assert_like(began);
    vm.run("fs-rebind", &[&slot_of_share(0), "lives", "/mnt", options, "20"]);
    vm.run("fs-mounts", &["lives", "/mnt", options, "3", "file"]);
    vm.share(0).usage().assert_like(began);
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}

/// QMP `stop` and `cont` while a guest's program makes the guest map and unmap ranges.
#[test]
fn pauses_under_load() {
    let Some(guest) = Guest::enter("pauses_under_load") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "pauses").window("32M")];
    File::create(shares[0].path("touched")).unwrap().set_len(64 << 20).unwrap();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    vm.start("mapio", &["touch", "67108864", "60", "write", "/mnt/touched"]);
    for _ in 0..20 {
        vm.qmp("stop", json!({}));
        vm.qmp("cont", json!({}));
    }
    vm.finish("mapio");
    write(&mut vm, &shares[0], "after");
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}

/// With `-action reboot=shutdown` a hard reset under a live mount ends QEMU, and the daemon with
/// it. A new VM finds all files.
#[test]
fn a_reboot_that_ends_the_vm() {
    let Some(guest) = Guest::enter("a_reboot_that_ends_the_vm") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "reboot")];
    for name in ["first", "second"] {
        let mut vm = guest.boot_shares(&shares, &[], &Options::default());
        vm.mount(&shares[0], "/mnt", "dax=always");
        if name == "second" {
            vm.run("sh", &["cd", "/mnt", "&&", "ls", "first"]);
        }
        write(&mut vm, &shares[0], name);
        vm.reboot_ends();
    }
}

/// With `--mem-slots off` the guest may reboot under a live mount.
#[test]
fn a_reboot_inside_the_vm() {
    let Some(guest) = Guest::enter("a_reboot_inside_the_vm") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "reset").window("16M").our_args(&["--mem-slots", "off"])];
    if !shares[0].is_ours() {
        guest.images().log_case("skip", "a_reboot_inside_the_vm", "needs-mem-slots", 0);
        return;
    }
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    for boot in 0..3 {
        vm.mount(&shares[0], "/mnt", "dax=always");
        write(&mut vm, &shares[0], &format!("boot-{boot}"));
        if boot < 2 {
            vm.reboot();
        }
    }
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
}

/// QEMU is killed under load: the daemon ends with code 0.
#[test]
fn a_kill_of_qemu_with_a_share() {
    let Some(guest) = Guest::enter("a_kill_of_qemu_with_a_share") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "kill").window("16M")];
    File::create(shares[0].path("touched")).unwrap().set_len(64 << 20).unwrap();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    write(&mut vm, &shares[0], "before");
    vm.start("mapio", &["touch", "67108864", "100000", "write", "/mnt/touched"]);
    vm.kill_qemu();
    vm.wait_daemons();
}

/// A read-only share, which has no window: every change is refused, and files can be read, also by
/// mmap.
#[test]
fn a_read_only_share() {
    let Some(guest) = Guest::enter("a_read_only_share") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::plain(dir.path(), "ro").args(&["--readonly"])];
    let bytes = pattern("read-only", LEN);
    std::fs::write(shares[0].path("file"), &bytes).unwrap();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    vm.run("sh", &["!", "touch", "/mnt/new"]);
    vm.run("sh", &["!", "rm", "/mnt/file"]);
    vm.run("sh", &["!", "truncate", "-s", "0", "/mnt/file"]);
    vm.run("sh", &["!", "chmod", "600", "/mnt/file"]);
    vm.run("sh", &["!", "/tools/bin/mapio", "append", "5", "x", "/mnt/file"]);
    let report = vm.run("mapio", &["sums", "/mnt/file"]);
    let sum = crate::disk::xxh3(&bytes);
    assert_eq!(report.get("sum"), format!("file,{LEN},{sum},{sum}"));
    vm.poweroff();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert!(left.len() == 1 && std::fs::read(shares[0].path("file")).unwrap() == bytes);
}

/// Four request queues, used by four jobs at once, with a window and without. The driver uses one
/// queue per CPU, here two. Only QEMU's own device has one interrupt per queue, which shows the
/// queues in use.
#[test]
fn four_request_queues() {
    let Some(guest) = Guest::enter("four_request_queues") else { return };
    let dirs = ["dax", "plain"].map(|_| TempDir::new().unwrap());
    let shares = [
        Share::dax(dirs[0].path(), "dax").queues(4),
        Share::plain(dirs[1].path(), "plain").queues(4),
    ];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    for share in &shares {
        let dir = format!("/mnt/{}", share.tag());
        vm.mount(share, &dir, "dax=inode");
        let report = vm.run("fs-fio", &[&dir, "psync", "randwrite", "2M", "2M", "4"]);
        assert_eq!(report.values("sum").len(), 4);
        share.check_sums(&report);
    }
    if shares[1].is_ours() {
        let report = vm.run("sh", &["cat", "/proc/interrupts"]);
        let queues = report.lines.iter().filter(|line| line.contains("-requests")).count();
        assert!(queues > 1, "the driver uses only one queue: {report:#?}");
    }
    vm.poweroff();
}

/// A pmem device and a share in one VM: each keeps its own bytes.
#[test]
fn a_disk_beside_a_share() {
    let Some(guest) = Guest::enter("a_disk_beside_a_share") else { return };
    let (dir, disk) = (TempDir::new().unwrap(), Disk::new(128));
    let shares = [Share::dax(dir.path(), "beside")];
    let mut vm = guest.boot_shares(&shares, &[&disk], &Options::default());
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/disk"]);
    vm.mount(&shares[0], "/mnt", "dax=always");
    for round in ["one", "two"] {
        let report = vm.run("write", &[&format!("/disk/{round}"), &LEN.to_string(), round]);
        disk.check_is(&report, &pattern(round, LEN));
        write(&mut vm, &shares[0], round);
        vm.qmp("stop", json!({}));
        vm.qmp("cont", json!({}));
    }
    vm.run("sh", &["cmp", "/disk/one", "/disk/one"]);
    vm.run("umount", &["/disk"]);
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
}
