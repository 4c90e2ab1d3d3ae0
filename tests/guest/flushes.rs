// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compares the number of the guest's flushes with the number of syncs on the host. strace delays
//! the daemon's fdatasync(2) or makes it fail, reproducibly.

use crate::disk::Disk;
use crate::machine::Options;
use crate::vm::Guest;

/// Each fdatasync is delayed by 20 ms.
const SLOW: &[&str] = &["-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=20000"];

/// Eight threads fsync the bare device. Each fsync is one flush; the flushes that wait when a sync
/// begins share that sync.
#[test]
fn flushes_share_syncs() {
    let Some(guest) = Guest::enter("flushes_share_syncs") else { return };
    // Newer stock kernels send the flushes of a device one after another.
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
    assert!(
        host_syncs * 3 <= counts.flushes,
        "flushes do not share syncs: {host_syncs} syncs, {counts:?}"
    );
    // At most 8 flushes wait at a time, so one sync answers at most 8.
    assert!(host_syncs * 8 >= fsyncs, "too few syncs: {host_syncs}, for {fsyncs} fsyncs");
    assert_eq!(host_syncs, counts.syncs, "the daemon counts its syncs wrong");
}

/// One fdatasync fails: that flush and every later flush fail with EIO in the guest.
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
