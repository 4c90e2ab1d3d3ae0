// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The second half of the demo: fio compares, in one guest, a share with a DAX window, a share
//! without one, and a share served by Debian's virtiofsd.

use std::fs::File;
use std::io::Write;

use tempfile::TempDir;

use crate::disk::{pattern, sha256};
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const FILE_BYTES: usize = 16 << 20;
/// Duration of each measurement.
const SECONDS: &str = "500ms";
const NAMES: [&str; 3] = ["DAX", "no DAX", "virtiofsd"];
const ROWS: [(&str, &str, &str); 8] = [
    ("sequential read", "psync", "read"),
    ("sequential read", "mmap", "read"),
    ("random read", "psync", "randread"),
    ("random read", "mmap", "randread"),
    ("sequential write", "psync", "write"),
    ("sequential write", "mmap", "write"),
    ("random write", "psync", "randwrite"),
    ("random write", "mmap", "randwrite"),
];

/// Rates of one row in KiB/s, in the order of `NAMES`.
type Row = [f64; 3];

pub fn run(guest: &Guest, step: &dyn Fn(&str)) {
    let dirs = NAMES.map(|_| TempDir::new().unwrap());
    let shares = [
        Share::dax(dirs[0].path(), "dax"),
        Share::plain(dirs[1].path(), "plain"),
        Share::virtiofsd(dirs[2].path(), "virtiofsd"),
    ];
    for share in &shares {
        let mut file = File::create(share.path("speed")).unwrap();
        file.write_all(&pattern("speed", FILE_BYTES)).unwrap();
    }
    step("starting vhost-user-dax fs with a window and without one, Debian's virtiofsd, and QEMU");
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    for share in &shares {
        vm.mount(share, &format!("/mnt/{}", share.tag()), "dax=always");
    }
    step("mounted all three in one guest, the first with -o dax");
    sums(&mut vm, &shares);
    let rows = ROWS.map(|(_, engine, rw)| {
        [0, 1, 2].map(|share| speed(&mut vm, shares[share].tag(), engine, rw))
    });
    step("fio measured them; the files had been read before");
    for (share, sum) in shares.iter().zip(sums(&mut vm, &shares)) {
        let bytes = std::fs::read(share.path("speed")).unwrap();
        assert_eq!(sum, sha256(&bytes), "the file's SHA-256 differs: guest (left), host (right)");
    }
    vm.poweroff();
    step("the SHA-256 of fio's files is equal in guest and host; all processes ended with code 0");
    print_table(&rows);
}

/// Reads each file in the guest, which fills the caches and the window, and returns the SHA-256 of
/// each.
fn sums(vm: &mut Vm<'_>, shares: &[Share; 3]) -> Vec<String> {
    let files = shares.each_ref().map(|share| format!("/mnt/{}/speed", share.tag()));
    let report = vm.run("sums", &files.each_ref().map(String::as_str));
    report.values("sum").into_iter().map(str::to_owned).collect()
}

fn speed(vm: &mut Vm<'_>, tag: &str, engine: &str, rw: &str) -> f64 {
    let dir = format!("/mnt/{tag}");
    let report = vm.run("fio-speed", &[&dir, engine, rw, &FILE_BYTES.to_string(), SECONDS]);
    report.get("kib_s").parse().unwrap()
}

fn print_table(rows: &[Row]) {
    println!(
        "\n  fio in the guest, 4k, MiB/s     {:>9} {:>9} {:>9}   DAX is",
        NAMES[0], NAMES[1], NAMES[2]
    );
    println!(
        "  ------------------------------  --------- --------- ---------   ---------------------"
    );
    for ((what, engine, _), row) in ROWS.iter().zip(rows) {
        let [dax, plain, virtiofsd] = row.map(|kib| kib / 1024.0);
        println!(
            "  {what:<17} {engine:<12}  {dax:>9.1} {plain:>9.1} {virtiofsd:>9.1}   \
             {:>5.1} x, {:>5.1} x",
            dax / plain,
            dax / virtiofsd
        );
    }
    println!(
        "\n  Both daemons ran with --cache auto: without DAX the guest drops its cache at each open.\n"
    );
}
