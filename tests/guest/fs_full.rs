// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A full host disk: a guest's program gets ENOSPC or SIGBUS, and the guest, QEMU and the daemon go
//! on.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::host_disk::own_namespace;
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const DISK_MIB: u64 = 64;
const MIB: u64 = 1 << 20;
const ENOSPC: u64 = 28;
const SIGBUS: u64 = 7;

/// Mounts a small ext4 at dir/disk, in a mount namespace of this thread and its children.
fn mount_small_disk(dir: &Path, block_bytes: &str) -> bool {
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program).args(args).current_dir(dir).output();
        done.is_ok_and(|output| output.status.success())
    };
    std::fs::create_dir(dir.join("disk")).unwrap();
    own_namespace().is_ok()
        && run("truncate", &["-s", &format!("{DISK_MIB}M"), "image"])
        && run("mkfs.ext4", &["-q", "-F", "-b", block_bytes, "-O", "^has_journal", "image"])
        && run("mount", &["-o", "loop", "image", "disk"])
}

/// Stores page after page to a file that is larger than the disk, until a SIGBUS.
fn fill_by_mmap(vm: &mut Vm<'_>, share: &Share) {
    let report = vm.run("mapio", &["fill", "/mnt/mapped", &(2 * DISK_MIB * MIB).to_string()]);
    let stored = report.number("stored");
    // Without a window the stores go to the guest's page cache, and the later writeback fails.
    if share.has_window() {
        assert_eq!(report.number("signal"), SIGBUS, "{report:#?}");
        assert!(stored > 32 * MIB && stored < DISK_MIB * MIB, "{report:#?}");
        let bytes = std::fs::read(share.path("mapped")).unwrap();
        let stored = usize::try_from(stored).unwrap();
        assert!(bytes[..stored].iter().all(|byte| *byte == b'f'), "a store was lost");
    }
}

fn fill_and_use_again(guest: &Guest, share: Share) {
    let shares = [share];
    let share = &shares[0];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(share, "/mnt", "dax=always");
    for _ in 0..2 {
        fill_by_mmap(&mut vm, share);
        vm.run("sh", &["rm", "/mnt/mapped"]);
        let report = vm.run("mapio", &["write-out", "/mnt/written", &(128 * MIB).to_string()]);
        assert_eq!(report.number("error"), ENOSPC, "{report:#?}");
        assert!(
            report.number("written") > 32 * MIB,
            "too little space after the file was removed: {report:#?}"
        );
        vm.run("sh", &["rm", "/mnt/written"]);
    }
    let report = vm.run("fs-fio", &["/mnt", "mmap", "write", "16M", "16M"]);
    share.check_sums(&report);
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
}

/// Runs `job` on a share in a small disk of its own.
fn on_small_disk(test: &'static str, block_bytes: &str, job: fn(&Guest, Share)) {
    let Some(guest) = Guest::enter(test) else { return };
    let dir = TempDir::new().unwrap();
    if !mount_small_disk(dir.path(), block_bytes) {
        guest.images().log_case("skip", test, "no-loop-mount", 0);
        return;
    }
    job(&guest, Share::dax(&dir.path().join("disk"), "small"));
    // umount fails if a process still has a file open there.
    let unmounted = Command::new("umount").arg(dir.path().join("disk")).status();
    assert!(unmounted.unwrap().success(), "a process still uses the disk");
}

#[test]
fn a_full_disk() {
    on_small_disk("a_full_disk", "4096", fill_and_use_again);
}

/// A host file system whose blocks are smaller than a page: fsync and msync work.
#[test]
fn small_blocks_on_the_host() {
    on_small_disk("small_blocks_on_the_host", "1024", |guest, share| {
        let shares = [share];
        let mut vm = guest.boot_shares(&shares, &[], &Options::default());
        vm.mount(&shares[0], "/mnt", "dax=always");
        for engine in ["psync", "mmap"] {
            let report = vm.run("fs-fio", &["/mnt", engine, "write", "4M", "4M"]);
            shares[0].check_sums(&report);
        }
        vm.poweroff();
    });
}
