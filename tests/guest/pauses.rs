// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QMP `stop` and `cont`: the device works afterwards and shows the right bytes.

use serde_json::json;

use crate::disk::{Disk, pattern};
use crate::vm::{Guest, Vm};

const LEN: usize = 300_000;

fn pause(vm: &mut Vm<'_>) {
    vm.qmp("stop", json!({}));
    vm.qmp("cont", json!({}));
}

fn check_device(vm: &mut Vm<'_>, disk: &Disk, seed: &str) {
    let report = vm.run("write", &[&format!("/mnt/{seed}"), &LEN.to_string(), seed]);
    disk.check_is(&report, &pattern(seed, LEN));
    vm.run("verify", &[&format!("/mnt/{seed}"), report.get("sha256")]);
}

#[test]
fn stop_and_cont() {
    let Some(guest) = Guest::enter("stop_and_cont") else { return };
    let disk = Disk::new(128);
    let mut vm = guest.boot(&[&disk]);
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    check_device(&mut vm, &disk, "before");

    pause(&mut vm);
    check_device(&mut vm, &disk, "once");

    // Without a wait in between: a start may come while the daemon still handles the previous stop.
    for _ in 0..20 {
        pause(&mut vm);
    }
    check_device(&mut vm, &disk, "many");

    // Pauses during flushes.
    vm.start("fsync-files", &["/mnt", "8", "100"]);
    for _ in 0..20 {
        pause(&mut vm);
    }
    vm.finish("fsync-files");
    check_device(&mut vm, &disk, "busy");

    // After the pauses, a reboot maps the window anew.
    vm.reboot();
    let (dev, _) = vm.ready(0);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    check_device(&mut vm, &disk, "reboot");
    vm.run("umount", &["/mnt"]);
    vm.run("fsck", &["ext4", &dev]);
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}

/// QMP `quit` while the VM is stopped: the daemon ends, and the stores are in the file.
#[test]
fn quit_while_stopped() {
    let Some(guest) = Guest::enter("quit_while_stopped") else { return };
    let disk = Disk::new(128);
    let mut vm = guest.boot(&[&disk]);
    let (dev, _) = vm.ready(0);
    vm.run("raw-write", &[&dev, "1048576", "65536", "stopped"]);
    vm.qmp("stop", json!({}));
    vm.qmp("quit", json!({}));
    vm.wait_daemons();
    assert!(disk.read(1 << 20, 65536) == pattern("stopped", 65536));
}
