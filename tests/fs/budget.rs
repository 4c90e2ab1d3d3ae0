// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that the number of maps and of the VM's other regions stays within the limits of QEMU and
//! of the library, and that a window that is too large for them is refused at the start.

use std::fs::File;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};

/// Largest number of memory slots: vhost-user-backend's MAX_MEM_SLOTS.
const MAX_SLOTS: usize = 509;

/// Grants all ranges of the window, in an order without neighbours, to a VM with `ram_regions`
/// regions.
fn scattered(mem_slots: bool, ram_regions: u64, ranges: u64) {
    let window_bytes = ranges * RANGE;
    let host =
        FsHost::with(FsOptions { window_bytes, mem_slots, ram_regions, ..Default::default() });
    File::create(host.path("large")).unwrap().set_len(window_bytes).unwrap();
    let mut guest = host.boot();
    let node = guest.node("large");
    for _round in 0..2 {
        let mut granted = Vec::new();
        for i in 0..ranges {
            // No two neighbours in the window are neighbours in the file.
            let from = i * 7 % ranges * RANGE;
            match guest.setup(node, from, RANGE, MAP_READ, i * RANGE) {
                Ok(()) => granted.push((i * RANGE, RANGE)),
                Err(errno) => assert!(errno == libc::ENOBUFS, "errno {errno}"),
            }
        }
        let room = MAX_SLOTS - ram_regions as usize;
        assert!(granted.len() + 32 >= room.min(ranges as usize), "only {}", granted.len());
        for part in granted.chunks(256) {
            guest.remove(part).unwrap();
        }
        assert_eq!(guest.vmm.mapped_bytes(), 0);
    }
    assert!(guest.vmm.most_regions() <= MAX_SLOTS, "{} regions", guest.vmm.most_regions());
    assert_eq!(guest.vmm.refused(), [""; 0]);
    guest.setup(node, 0, RANGE, MAP_READ | MAP_WRITE, 0).unwrap();
    assert!(guest.vmm.store(0, b"still alive"));
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that a VM with one region gets all 256 ranges of its window.
#[test]
fn a_small_vm() {
    scattered(true, 1, 256);
}

/// Shows that a VM with many regions is refused some grants, and that the limits of QEMU hold.
#[test]
fn a_vm_with_many_regions() {
    scattered(true, 200, 384);
}

/// Shows it for a daemon without memory slots.
#[test]
fn without_memory_slots() {
    scattered(false, 1, 256);
}

/// Shows that a window that is too large for any VM is refused with code 2 and one line, and that
/// the size in this line is accepted.
#[test]
fn a_window_that_is_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    for window_bytes in [2 << 30, 64 << 30, 1 << 60] {
        let options = FsOptions { window_bytes, ..FsOptions::default() };
        let output = options.command(&socket, dir.path()).output().unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(!socket.exists());
        let words: Vec<_> = line.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        let size = |word: &&str| {
            let number = word.strip_suffix('M')?.parse::<u64>().ok()?;
            Some(number << 20)
        };
        let would_do = words.iter().rev().find_map(size).unwrap_or_else(|| panic!("{line}"));
        assert!(would_do >= 256 * RANGE && would_do < window_bytes, "{line}");
        let host = FsHost::with(FsOptions { window_bytes: would_do, ..FsOptions::default() });
        let guest = host.boot();
        assert_eq!(guest.vmm.offer().windows.first(), Some(&would_do));
    }
}
