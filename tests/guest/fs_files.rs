// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Files of many sizes have the same bytes in the guest and on the host, by read and by mmap,
//! whichever side has changed them.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::disk::{pattern, xxh3};
use crate::machine::Options;
use crate::report::CaseReport;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const MIB: usize = 1 << 20;
/// The daemon's default `--dax-threshold`.
const DAX_THRESHOLD: usize = MIB;
const SIZES: [usize; 10] =
    [0, 1, 4095, 4096, 4097, 2 * MIB - 1, 2 * MIB, 2 * MIB + 1, 3_000_000, 64 * MIB];

/// The files of one mount, as seen by the host.
struct Files<'s> {
    share: &'s Share,
    names: Vec<String>,
}

impl<'s> Files<'s> {
    /// Makes the files on the host, each with its own pattern, whose period is no divisor of a
    /// page.
    fn make(share: &'s Share) -> Self {
        let make = |size: &usize| {
            let name = format!("size-{size}");
            std::fs::write(share.path(&name), pattern(&name, *size)).unwrap();
            name
        };
        Self { share, names: SIZES.iter().map(make).collect() }
    }

    fn paths(&self) -> impl Iterator<Item = PathBuf> {
        self.names.iter().map(|name| self.share.path(name))
    }

    /// Checks for each file whether it is mapped directly. With `dax=inode` the daemon decides by
    /// size.
    fn check_dax(&self, vm: &mut Vm<'_>, mode: &str) {
        if !self.share.has_window() {
            return;
        }
        let names: Vec<String> = self.names.iter().map(|name| format!("/mnt/{name}")).collect();
        let report = vm.run("is-dax", &names.iter().map(String::as_str).collect::<Vec<_>>());
        let direct = report.values("dax");
        for (name, size) in names.iter().zip(SIZES) {
            let expected = mode == "always" || mode == "inode" && size > DAX_THRESHOLD;
            assert_eq!(direct.contains(&name.as_str()), expected, "{mode}: {report:#?}");
        }
    }

    /// Runs a command of mapio on all files.
    fn in_guest(&self, vm: &mut Vm<'_>, command: &[&str]) -> CaseReport {
        let names: Vec<String> = self.names.iter().map(|name| format!("/mnt/{name}")).collect();
        let mut words = command.to_vec();
        words.extend(names.iter().map(String::as_str));
        vm.run("mapio", &words)
    }

    /// Waits until the guest has the new sizes: it may cache attributes for a second.
    fn wait_for_sizes(&self, vm: &mut Vm<'_>) {
        let size = |name: &String| {
            let bytes = std::fs::metadata(self.share.path(name)).unwrap().len();
            format!("/mnt/{name}:{bytes}")
        };
        let words: Vec<String> = self.names.iter().map(size).collect();
        vm.run("fs-sees", &words.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Checks that guest and host have the same bytes; the guest reads them by read and by mmap.
    fn compare(&self, vm: &mut Vm<'_>, step: &str) {
        let report = self.in_guest(vm, &["sums"]);
        for (name, path) in self.names.iter().zip(self.paths()) {
            let bytes = std::fs::read(path).unwrap();
            let sum = xxh3(&bytes);
            let expected = format!("{name},{},{sum},{sum}", bytes.len());
            let got = report.values("sum");
            let wrong = got.iter().find(|line| line.starts_with(&format!("{name},")));
            assert!(
                got.contains(&expected.as_str()),
                "{step}: the file differs (name, size, sum by read, sum by mmap):\n \
                 host:  {expected}\n guest: {wrong:?}"
            );
        }
    }
}

/// Makes each change on either side, and compares the bytes on both sides afterwards.
fn change_and_compare(vm: &mut Vm<'_>, all: &Files<'_>, mode: &str) {
    let append = |path: PathBuf| {
        let mut file = OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(&pattern("host-append", 5000)).unwrap();
    };
    let resize = |path: PathBuf, delta: i64| {
        let file = File::options().write(true).open(path).unwrap();
        let bytes = file.metadata().unwrap().len();
        file.set_len(bytes.saturating_add_signed(delta)).unwrap();
    };
    all.compare(vm, &format!("{mode}: created by the host"));
    all.in_guest(vm, &["append", "5000", "guest-append"]);
    all.compare(vm, &format!("{mode}: appended to in the guest"));
    all.paths().for_each(append);
    all.wait_for_sizes(vm);
    all.compare(vm, &format!("{mode}: appended to by guest and host"));
    for delta in [-4097, 10_000] {
        all.in_guest(vm, &["resize", &delta.to_string()]);
        all.compare(vm, &format!("{mode}: resized by {delta} in the guest"));
    }
    for delta in [-4097, 10_000] {
        all.paths().for_each(|path| resize(path, delta));
        all.wait_for_sizes(vm);
        all.compare(vm, &format!("{mode}: resized by {delta} on the host"));
    }
    all.in_guest(vm, &["store", "100", "3000000", &format!("{mode}-synced"), "msync"]);
    all.compare(vm, &format!("{mode}: stored through mmap, with msync"));
    all.in_guest(vm, &["store", "5000", "2500000", &format!("{mode}-unsynced"), "none"]);
    all.compare(vm, &format!("{mode}: stored through mmap, without msync"));
}

#[test]
fn files_of_many_sizes() {
    let Some(guest) = Guest::enter("files_of_many_sizes") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "files")];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    for mode in ["always", "inode", "never"] {
        let files = Files::make(&shares[0]);
        vm.mount(&shares[0], "/mnt", &format!("dax={mode}"));
        files.check_dax(&mut vm, mode);
        change_and_compare(&mut vm, &files, mode);
        vm.run("umount", &["/mnt"]);
    }
    vm.poweroff();
    vm.assert_qemu_is_quiet();
}
