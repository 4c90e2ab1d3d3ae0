// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! More data than the window has room for: the guest maps and unmaps ranges all the time.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use tempfile::TempDir;

use crate::machine::Options;
use crate::share::Share;
use crate::vm::Guest;

const MIB: u64 = 1 << 20;
/// Size of the window: a quarter of the data.
const WINDOW: &str = "16M";
const DATA: u64 = 64 * MIB;
/// Number of rounds. Each round touches all ranges of the data, most of which are not mapped then.
const ROUNDS: u64 = 64;

/// fio writes and verifies four times the size of the window; the host finds the same bytes.
#[test]
fn fio_with_a_small_window() {
    let Some(guest) = Guest::enter("fio_with_a_small_window") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "small").window(WINDOW)];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    let (data, part) = (DATA.to_string(), (DATA / 16).to_string());
    for (engine, rw, written) in
        [("psync", "write", &data), ("mmap", "write", &data), ("mmap", "randwrite", &part)]
    {
        let report = vm.run("fs-fio", &["/mnt", engine, rw, &data, written]);
        shares[0].check_sums(&report);
        vm.run("sh", &["rm", &format!("/mnt/{engine}-{rw}.0.0")]);
    }
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}

/// A guest that reads all of a sparse file, by read and by mmap, makes the host allocate no block.
#[test]
fn a_sparse_file_stays_sparse() {
    let Some(guest) = Guest::enter("a_sparse_file_stays_sparse") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "sparse").window(WINDOW)];
    let file = File::create(shares[0].path("sparse")).unwrap();
    file.set_len(1 << 30).unwrap();
    let before = file.metadata().unwrap().blocks();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    let report = vm.run("mapio", &["zeros", "/mnt/sparse"]);
    assert_eq!(report.number("pages"), (1 << 30) / 4096);
    assert_eq!(
        file.metadata().unwrap().blocks(),
        before,
        "blocks were allocated by a read through mmap"
    );
    vm.run("sh", &["dd", "if=/mnt/sparse", "of=/dev/null", "bs=1M"]);
    assert_eq!(file.metadata().unwrap().blocks(), before, "blocks were allocated by read");
    vm.poweroff();
    assert_eq!(file.metadata().unwrap().blocks(), before, "blocks were allocated until power-off");
}

/// Thousands of maps and unmaps leak no descriptor and no map in the daemon.
#[test]
fn thousands_of_maps() {
    let Some(guest) = Guest::enter("thousands_of_maps") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "maps").window(WINDOW)];
    File::create(shares[0].path("file")).unwrap().set_len(DATA).unwrap();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    let touch = |rounds: u64| {
        ["touch", &DATA.to_string(), &rounds.to_string(), "write", "/mnt/file"].map(str::to_owned)
    };
    let mut run = |rounds: u64| {
        vm.mount(&shares[0], "/mnt", "dax=always");
        let words = touch(rounds);
        let report = vm.run("mapio", &words.each_ref().map(String::as_str));
        assert_eq!(report.number("touched"), rounds * DATA / (2 * MIB));
        vm.run("umount", &["/mnt"]);
        vm.share(0).usage()
    };
    let began = run(2);
    let ended = run(ROUNDS);
    ended.assert_like(began);
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}
