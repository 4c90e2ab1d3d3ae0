// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! File systems mounted with `-o dax`: the bytes that the guest fsyncs are in the backing file.

use crate::disk::{Disk, page_pattern, pattern};
use crate::vm::{Guest, Vm};

const MIB: usize = 1 << 20;

/// Makes a file system on the first disk and mounts it on /mnt with DAX.
fn mount_new(vm: &mut Vm<'_>, fs: &str) -> String {
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &[fs, &dev]);
    vm.run("mount", &[fs, &dev, "/mnt"]);
    dev
}

fn dax_file_system(test: &'static str, fs: &str, mib: u64) {
    let Some(guest) = Guest::enter(test) else { return };
    let disk = Disk::new(mib);
    let mut vm = guest.boot(&[&disk]);
    let dev = mount_new(&mut vm, fs);

    let written = vm.run("write", &["/mnt/written", "1000000", "written"]);
    disk.check_is(&written, &pattern("written", 1_000_000));
    let mapped = vm.run("mmap-write", &["/mnt/mapped", &MIB.to_string(), "7"]);
    disk.check_is(&mapped, &page_pattern(7, MIB));
    for engine in ["psync", "mmap"] {
        let verified = vm.run("fio-verify", &["/mnt", engine, "8M"]);
        disk.check(&verified);
    }

    vm.run("umount", &["/mnt"]);
    vm.run("fsck", &[fs, &dev]);
    vm.poweroff();
    vm.assert_qemu_is_quiet();
    // Later operations have neither moved nor changed the bytes.
    disk.check_is(&written, &pattern("written", 1_000_000));
    disk.check_is(&mapped, &page_pattern(7, MIB));
    let counts = vm.daemon(0).counts();
    assert!(counts.flushes > 0 && counts.syncs > 0, "no flush arrived: {counts:?}");
    assert!(counts.syncs <= counts.flushes, "{counts:?}");
    assert_eq!((counts.failed, counts.malformed), (0, 0), "{counts:?}");
}

#[test]
fn ext4_with_dax() {
    dax_file_system("ext4_with_dax", "ext4", 128);
}

// mkfs.xfs refuses a device below 300 MiB.
#[test]
fn xfs_with_dax() {
    dax_file_system("xfs_with_dax", "xfs", 384);
}

/// A device size that is not a power of two reaches the guest exactly, and its last bytes are
/// usable.
#[test]
fn a_size_that_is_no_power_of_two() {
    let Some(guest) = Guest::enter("a_size_that_is_no_power_of_two") else { return };
    let disk = Disk::new(130);
    let mut vm = guest.boot(&[&disk]);
    let (dev, bytes) = vm.ready(0);
    assert_eq!(bytes, disk.bytes());
    let last = (disk.bytes() - 65536).to_string();
    vm.run("raw-write", &[&dev, &last, "65536", "tail"]);
    assert!(disk.read(disk.bytes() - 65536, 65536) == pattern("tail", 65536));
    vm.poweroff();
}
