// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Flushes, counted: how many the guest sent, and how many syncs the host did.
//! strace makes the disk slow, or bad, the same way each time.

use crate::disk::Disk;
use crate::machine::Options;
use crate::vm::Guest;

/// Each fdatasync takes 20 ms longer.
const SLOW: &[&str] = &["-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=20000"];

/// Eight threads fsync the bare device: each fsync is one flush, and those that
/// wait when a sync begins share it.
#[test]
fn flushes_share_syncs() {
    let Some(guest) = Guest::enter("flushes_share_syncs") else { return };
    // Newer stock kernels send a device's flushes one after the other.
    let Some(kernel) = guest.images().kernel_parallel() else {
        guest.images().log_case("skip", "flushes_share_syncs", "no-parallel-kernel", 0);
        return;
    };
    let disk = Disk::new(128);
    let options = Options { strace: SLOW, kernel: Some(kernel), ..Options::default() };
    let mut vm = guest.boot_with(&[&disk], &options);
    let (dev, _) = vm.ready(0);
    let fsyncs = vm.run("fsync-raw", &[&dev, "8", "50"]).number("fsyncs");
    vm.poweroff();

    let counts = vm.daemon(0).counts();
    let host_syncs = vm.daemon(0).traced("fdatasync");
    eprintln!("fsyncs={fsyncs} {counts:?} fdatasync={host_syncs}");
    assert!(counts.flushes >= fsyncs, "flushes were lost: {fsyncs} fsyncs, {counts:?}");
    assert!(host_syncs * 3 <= counts.flushes, "not shared: {host_syncs} syncs, {counts:?}");
    // Each sync can serve no more than the eight that waited.
    assert!(host_syncs * 8 >= fsyncs, "too few: {host_syncs} syncs, {fsyncs} fsyncs");
    assert_eq!(host_syncs, counts.syncs, "the daemon's own count is wrong");
}

/// One failed fdatasync: the guest sees EIO then, and in every later flush.
#[test]
fn a_failed_sync_is_for_good() {
    let Some(guest) = Guest::enter("a_failed_sync_is_for_good") else { return };
    let disk = Disk::new(128);
    let once = ["-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=3"];
    let options = Options { strace: &once, ..Options::default() };
    let mut vm = guest.boot_with(&[&disk], &options);
    let (dev, _) = vm.ready(0);
    vm.run("flush", &[&dev]);
    vm.run("flush", &[&dev]);
    vm.run("flush-fails", &[&dev]);
    vm.run("flush-fails", &[&dev]);
    vm.reboot();
    let (dev, _) = vm.ready(0);
    vm.run("flush-fails", &[&dev]);
    vm.poweroff();
    let counts = vm.daemon(0).counts();
    assert!(counts.failed >= 3, "{counts:?}");
}
