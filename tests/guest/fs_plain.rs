// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's own vhost-user-fs-pci. It answers the config space itself, has no window, and its rings
//! are longer than those of vhost-user-test-device-pci.

use serde_json::json;
use tempfile::TempDir;

use crate::disk::{pattern, sha256};
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const LEN: usize = 3_000_000;
/// Bytes that each of two jobs writes, 4 KiB per request.
const BYTES: &str = "1048576";
/// QEMU answers the config space itself, and prints this warning for each device.
const QEMU_SAYS: &str = "supports VHOST_USER_PROTOCOL_F_CONFIG but QEMU does not";

/// The guest writes files and the host reads them; then the host writes one and the guest reads it.
fn both_ways(vm: &mut Vm<'_>, share: &Share, dir: &str, engine: &str, step: &str) {
    let report = vm.run("fs-fio", &[dir, engine, "randwrite", BYTES, BYTES, "2"]);
    assert_eq!(report.values("sum").len(), 2);
    share.check_sums(&report);
    vm.run("sh", &["rm", &format!("{dir}/*")]);
    let bytes = pattern(step, LEN);
    std::fs::write(share.path(step), &bytes).unwrap();
    vm.run("verify", &[&format!("{dir}/{step}"), &sha256(&bytes)]);
}

/// Shows: without a window everything except DAX works, with one request queue and with four,
/// across a pause, a reset and a new mount. A mount with `dax=always` is refused with a reason in
/// the kernel log; `dax=inode` works without DAX.
#[test]
fn a_share_without_a_window() {
    let Some(guest) = Guest::enter("a_share_without_a_window") else { return };
    let dirs = [TempDir::new().unwrap(), TempDir::new().unwrap()];
    let shares =
        [Share::plain(dirs[0].path(), "one"), Share::plain(dirs[1].path(), "four").queues(4)];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    for share in &shares {
        let (tag, dir) = (share.tag(), format!("/mnt/{}", share.tag()));
        vm.run("fs-mount", &[tag, &dir]);
        both_ways(&mut vm, share, &dir, "psync", "plain");
        vm.run("umount", &[&dir]);
        let report = vm.run("fs-mount-refused", &[tag, &dir, "dax=always"]);
        let why = "dax can't be enabled as filesystem device does not support it";
        assert!(report.lines.iter().any(|line| line.contains(why)), "{report:#?}");
        vm.run("fs-mount", &[tag, &dir, "dax=inode"]);
        vm.qmp("stop", json!({}));
        vm.qmp("cont", json!({}));
        both_ways(&mut vm, share, &dir, "mmap", "dax-inode");
        let report = vm.run("is-dax", &[&format!("{dir}/dax-inode")]);
        assert_eq!(report.get("nodax"), format!("{dir}/dax-inode"));
    }
    vm.reboot();
    for share in &shares {
        let dir = format!("/mnt/{}", share.tag());
        vm.run("fs-mount", &[share.tag(), &dir]);
        both_ways(&mut vm, share, &dir, "psync", "after-a-reset");
        vm.run("umount", &[&dir]);
    }
    vm.poweroff();
    for line in vm.qemu_lines() {
        assert!(line.contains(QEMU_SAYS), "{line}");
    }
    for (index, share) in shares.iter().enumerate().filter(|(_, share)| share.is_ours()) {
        let log = vm.share(index).log();
        let mapped_none = log.contains("malformed=0; window: grants=0 refused=0");
        assert!(mapped_none, "{}: {log}", share.tag());
    }
}
