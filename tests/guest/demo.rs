// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demo that `ci/demo` runs. A stock guest mounts a host file with `-o dax`, fio writes and
//! verifies in it, and the host then compares the guest's bytes in the backing file. Then the same
//! program boots a guest that shares a host directory, with a DAX window and without.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(dead_code)] // The shared modules contain more than the demo uses.

mod daemon;
mod demo_share;
mod disk;
mod images;
mod machine;
mod output;
mod qmp;
mod report;
mod share;
mod vm;

use std::time::Instant;

use disk::{Disk, pattern};
use report::CaseReport;
use vm::Guest;

const SIZE_MIB: u64 = 256;
const MESSAGE: &str = "durable";
const MESSAGE_BYTES: usize = 3_000_000;

fn main() {
    let began = Instant::now();
    let step = |text: &str| println!("  [{:5.1} s] {text}", began.elapsed().as_secs_f64());
    let Some(guest) = Guest::enter("demo") else { return };
    let disk = Disk::new(SIZE_MIB);

    step(&format!("starting vhost-user-dax on a host file of {SIZE_MIB}M, and QEMU beside it"));
    let mut vm = guest.boot(&[&disk]);
    let (dev, bytes) = vm.ready(0);
    step(&format!("the guest is up (emulated, not KVM) and has {dev}: {}M", bytes >> 20));
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    step("made ext4, mounted it with -o dax");
    let verified = ["psync", "mmap"].map(|engine| {
        let report = vm.run("fio-verify", &["/mnt", engine, "16M"]);
        step(&format!("fio wrote 16M by {engine} with crc32c, and verified all of it"));
        (engine, report)
    });
    let written = vm.run("write", &["/mnt/file", &MESSAGE_BYTES.to_string(), MESSAGE]);
    step("a program wrote a file and called fsync");
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
    step("the guest is off; QEMU and the daemon have ended with code 0");

    disk.check_is(&written, &pattern(MESSAGE, MESSAGE_BYTES));
    for (_, report) in &verified {
        disk.check(report);
    }
    step("the host found the bytes of all three files at their extents in the host file");
    print_table(&verified);
    let counts = vm.daemon(0).counts();
    println!(
        "\n  flushes from the guest: {}, answered by {} fdatasync on the host, {} failed\n",
        counts.flushes, counts.syncs, counts.failed
    );

    demo_share::run(&guest, &step);
}

fn print_table(verified: &[(&str, CaseReport)]) {
    println!("\n  fio in the guest, 4k random   written KiB/s   verified KiB/s   errors");
    println!("  ---------------------------   -------------   --------------   ------");
    for (engine, report) in verified {
        let line = report.lines.iter().find(|line| line.starts_with("fio ")).unwrap();
        let value = |key: &str| -> &str {
            let found = line.split_whitespace().filter_map(|word| word.split_once('='));
            found.filter(|(name, _)| *name == key).map(|(_, value)| value).next().unwrap()
        };
        println!(
            "  {engine:<27}   {:>13}   {:>14}   {:>6}",
            value("write_kib_s"),
            value("read_kib_s"),
            value("errors")
        );
    }
}
