// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Data that the guest has fsynced survives `kill -9` of QEMU and of the daemon.

use crate::daemon::Daemon;
use crate::disk::{Disk, pattern};
use crate::vm::{Guest, Vm};

const LEN: usize = 300_000;
/// Number of acknowledged records at which the kill comes, in the middle of the next record.
const RECORDS: u64 = 10;

/// Boots a VM, fsyncs a file, and then record after record until the kill. Returns the VM, the
/// file's SHA-256, and the number of the last acknowledged record.
fn write_until_kill<'g>(
    guest: &'g Guest,
    disk: &Disk,
    kill: impl FnOnce(&mut Vm<'g>),
) -> (Vm<'g>, String, u64) {
    let mut vm = guest.boot(&[disk]);
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    let file = vm.run("write", &["/mnt/file", &LEN.to_string(), "durable"]);
    vm.start("ack-loop", &["/mnt", "100000"]);
    let mut last = 0;
    while last < RECORDS {
        let line = vm.case_line();
        match line.strip_prefix("acked=").and_then(|record| record.parse().ok()) {
            Some(record) => last = record,
            None => vm.fail(&format!("unexpected line of ack-loop: '{line}'")),
        }
    }
    kill(&mut vm);
    disk.check_is(&file, &pattern("durable", LEN));
    let sha256 = file.get("sha256").to_owned();
    (vm, sha256, last)
}

/// A new daemon and a new VM on the same file find the file and every acknowledged record.
fn verify_in_new_vm(guest: &Guest, disk: &Disk, sha256: &str, last: u64) {
    let mut vm = guest.boot(&[disk]);
    let (dev, _) = vm.ready(0);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    vm.run("verify", &["/mnt/file", sha256]);
    vm.run("ack-verify", &["/mnt", &last.to_string()]);
    vm.run("umount", &["/mnt"]);
    vm.run("fsck", &["ext4", &dev]);
    vm.poweroff();
}

#[test]
fn kill_of_qemu() {
    let Some(guest) = Guest::enter("kill_of_qemu") else { return };
    let disk = Disk::new(128);
    let (mut vm, sha256, last) = write_until_kill(&guest, &disk, Vm::kill_qemu);
    // The VM has gone, so the daemon ends, with exit code 0.
    vm.wait_daemons();
    drop(vm);
    verify_in_new_vm(&guest, &disk, &sha256, last);
}

#[test]
fn kill_of_the_daemon() {
    let Some(guest) = Guest::enter("kill_of_the_daemon") else { return };
    let disk = Disk::new(128);
    let (mut vm, sha256, last) = write_until_kill(&guest, &disk, |vm| vm.kill_daemon(0));
    // The VM still maps the file and so still holds its lock: another daemon is refused.
    Daemon::assert_refused(&disk, "in use by another process");
    vm.kill_qemu();
    drop(vm);
    verify_in_new_vm(&guest, &disk, &sha256, last);
}
