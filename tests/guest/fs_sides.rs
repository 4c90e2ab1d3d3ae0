// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Several guests, or several devices of one guest, that share one directory.

use std::fs::File;

use tempfile::TempDir;

use crate::disk::pattern;
use crate::machine::Options;
use crate::share::Share;
use crate::vm::Guest;

const MIB: usize = 1 << 20;
const ROUNDS: &str = "2001";

/// Two guests with one daemon each: each guest sees every store of the other guest through mmap, in
/// order, without a sync or a request.
#[test]
fn two_guests_in_step() {
    let Some(guest) = Guest::enter("two_guests_in_step") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "step")];
    if !shares[0].has_window() {
        guest.images().log_case("skip", "two_guests_in_step", "no-window", 0);
        return;
    }
    File::create(shares[0].path("step")).unwrap().set_len(8 << 20).unwrap();
    let mut vms = [0, 1].map(|_| guest.boot_shares(&shares, &[], &Options::default()));
    for (player, vm) in ["0", "1"].iter().zip(&mut vms) {
        vm.mount(&shares[0], "/mnt", "dax=always");
        vm.start("mapio", &["step", "/mnt/step", player, ROUNDS]);
    }
    for vm in &mut vms {
        vm.finish("mapio");
        vm.poweroff();
        vm.assert_qemu_is_quiet();
    }
}

/// fsx runs at the same time on two devices that share a directory, each on files of its own; then
/// the other mount and the host read each file.
#[test]
fn fsx_on_two_mounts() {
    let Some(guest) = Guest::enter("fsx_on_two_mounts") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "a").window("32M"), Share::dax(dir.path(), "b")];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/a", "dax=always");
    vm.mount(&shares[1], "/b", "dax=always");
    let report = vm.run("fsx", &["1000", "7", "/a/fsx-a", "/b/fsx-b"]);
    shares[0].check_sums(&report);
    vm.run("sh", &["cmp", "/a/fsx-a", "/b/fsx-a", "&&", "cmp", "/a/fsx-b", "/b/fsx-b"]);
    vm.poweroff();
}

/// O_DIRECT reads into a mapping of a DAX file, and O_DIRECT writes from such a mapping. The other
/// file lies on a device without DAX that shares the same directory, is an ordinary disk, or is
/// created by the O_DIRECT open.
#[test]
fn direct_io_and_mappings() {
    let Some(guest) = Guest::enter("direct_io_and_mappings") else { return };
    let (dir, other) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let shares = [
        Share::dax(dir.path(), "dax"),
        Share::plain(dir.path(), "plain").args(&["--allow-direct-io"]),
    ];
    let bytes = 5 * MIB;
    let words = bytes.to_string();
    let source = pattern("direct", bytes);
    std::fs::write(shares[0].path("source"), &source).unwrap();
    let scratch = other.path().join("disk");
    std::fs::write(&scratch, pattern("scratch", bytes)).unwrap();
    for name in ["from-plain", "from-disk", "to-plain"] {
        File::create(shares[0].path(name)).unwrap().set_len(bytes as u64).unwrap();
    }
    let options = Options { scratch: Some(scratch.clone()), ..Options::default() };
    let mut vm = guest.boot_shares(&shares, &[], &options);
    vm.mount(&shares[0], "/dax", "dax=always");
    vm.mount(&shares[1], "/plain", "rw");
    let disk = vm.run("disk", &["scratch"]).get("dev").to_owned();
    let mut direct = |what: &str, from: &str, to: &str| {
        let report = vm.run("mapio", &[what, from, to, &words]);
        assert_eq!(report.number("compared"), bytes as u64);
    };
    direct("direct-in", "/plain/source", "/dax/from-plain");
    direct("direct-in", &disk, "/dax/from-disk");
    direct("direct-out", "/dax/source", "/plain/to-plain");
    direct("direct-out", "/dax/source", &disk);
    direct("direct-out", "/dax/source", "/plain/created-plain");
    direct("direct-out", "/dax/source", "/dax/created-dax");
    vm.run("sh", &["umount", "/dax", "&&", "umount", "/plain", "&&", "sync"]);
    vm.poweroff();
    let on_host = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(
        on_host("from-plain") == source,
        "O_DIRECT read from the share into the mapping: the bytes differ"
    );
    assert!(
        on_host("from-disk") == pattern("scratch", bytes),
        "O_DIRECT read from the disk into the mapping: the bytes differ"
    );
    for name in ["to-plain", "created-plain", "created-dax"] {
        assert!(
            on_host(name) == source,
            "O_DIRECT write from the mapping to the share: {name} differs"
        );
    }
    assert!(
        std::fs::read(scratch).unwrap() == source,
        "O_DIRECT write from the mapping to the disk: the bytes differ"
    );
}

/// Stores to a MAP_PRIVATE mapping do not reach the host's file.
#[test]
fn a_private_mapping() {
    let Some(guest) = Guest::enter("a_private_mapping") else { return };
    let dir = TempDir::new().unwrap();
    let shares = [Share::dax(dir.path(), "private")];
    let bytes = pattern("private", 3_000_000);
    std::fs::write(shares[0].path("file"), &bytes).unwrap();
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    vm.run("mapio", &["private", "/mnt/file"]);
    vm.poweroff();
    assert!(std::fs::read(shares[0].path("file")).unwrap() == bytes);
}
