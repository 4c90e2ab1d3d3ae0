// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows a share with `--persist=cacheline`, in memory: a WRITE goes past the processor's cache and
//! otherwise acts like any write. A file that is truncated on the host gets an error, and other
//! files do not. (ci/test runs all other tests of shares with this option, too.)

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, SystemTime};

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::slow::{Strace, skip};

const BOTH: u64 = MAP_READ | MAP_WRITE;

fn in_memory() -> FsHost {
    FsHost::with(FsOptions {
        persist: "cacheline".into(),
        below: "/dev/shm".into(),
        ..FsOptions::default()
    })
}

/// A guest with a file of two ranges, mapped for writing.
fn mapped(host: &FsHost) -> (FsGuest, u64, u64) {
    host.put("file", &vec![1; 2 * RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, 2 * RANGE, BOTH, 0).unwrap();
    (guest, node, fh)
}

/// Shows: a WRITE to a range granted for writing is a store of the daemon: no write(2), the bytes
/// are in the file and in the window at once, and mtime is new. Any other WRITE is a write(2).
#[test]
fn writes_to_granted_ranges_go_past_the_cache() {
    if !Strace::is_here() {
        return skip("writes_to_granted_ranges_go_past_the_cache", "no strace");
    }
    let host = in_memory();
    let (mut guest, node, fh) = mapped(&host);
    let file = fs::File::options().write(true).open(host.path("file")).unwrap();
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    file.set_modified(old).unwrap();
    let mut strace = Strace::attach(host.pid(), "pwritev,pwritev2", "");
    let mut expected = vec![1; 2 * RANGE as usize];
    for (at, bytes) in [(0, 1), (4095, 2), (RANGE - 5, 300), (77, 5000), (2 * RANGE - 64, 64)] {
        let data: Vec<_> = (0..bytes).map(|n| (n % 199 + 2) as u8).collect();
        assert_eq!(guest.write(node, fh, at, &data), Ok(bytes as u32));
        expected[at as usize..at as usize + bytes].copy_from_slice(&data);
        assert_eq!(guest.vmm.fetch(at, bytes).unwrap(), data);
    }
    assert!(!strace.text().contains("pwritev"), "by the kernel: {}", strace.text());
    assert!(host.get("file") == expected, "other bytes in the file");
    assert!(fs::metadata(host.path("file")).unwrap().modified().unwrap() > old, "no new mtime");

    drop(strace);
    let mut strace = Strace::attach(host.pid(), "pwritev,pwritev2", "");
    assert_eq!(guest.write(node, fh, 2 * RANGE - 3, b"longer"), Ok(6));
    expected.truncate(2 * RANGE as usize - 3);
    expected.extend(b"longer");
    assert!(strace.text().contains("pwritev"), "growth is the file system's");
    assert!(host.get("file") == expected, "other bytes in the file that grew");
    guest.fsync(node, fh).unwrap();
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows: a hole punched at unaligned offsets reads as zeros by each path, beside live write
/// grants, too.
#[test]
fn odd_holes_are_zeros() {
    let host = in_memory();
    let (mut guest, node, fh) = mapped(&host);
    let mut expected = vec![1; 2 * RANGE as usize];
    for (at, bytes) in [(5, 100), (4000, 200), (8191, 4098), (RANGE - 10_000, 20_001)] {
        let mode = libc_flags();
        guest.fallocate(node, fh, at, bytes, mode).unwrap();
        expected[at as usize..(at + bytes) as usize].fill(0);
        assert!(guest.vmm.fetch(0, 2 * RANGE as usize).unwrap() == expected, "{at}: window");
        assert!(host.get("file") == expected, "{at}: file");
    }
    guest.fsync(node, fh).unwrap();
    assert_eq!(fs::metadata(host.path("file")).unwrap().size(), 2 * RANGE);
}

fn libc_flags() -> i32 {
    let flags = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    flags.bits()
}

/// Shows: a process on the host truncates a mapped file while the guest syncs it. That file may get
/// an error; the daemon, the guest and another file continue.
#[test]
fn a_file_cut_off_on_the_host_harms_no_other() {
    let host = in_memory();
    let (mut guest, node, fh) = mapped(&host);
    host.put("other", &vec![2; RANGE as usize]);
    let (other, other_fh) = guest.opened("other");
    guest.setup(other, 0, RANGE, BOTH, 4 * RANGE).unwrap();
    let file = fs::File::options().read(true).write(true).open(host.path("file")).unwrap();
    for round in 0..50 {
        file.set_len(2 * RANGE).unwrap();
        let pending = guest.send_fsync(node, fh);
        file.set_len(if round % 2 == 0 { 0 } else { RANGE + 5 }).unwrap();
        let _ = guest.result(pending); // It may be an error, but must be answered.
        assert!(guest.vmm.store(4 * RANGE, &[round as u8]));
        guest.fsync(other, other_fh).unwrap();
        assert_eq!(guest.write(other, other_fh, 8, b"kept"), Ok(4));
    }
    let mut found = [0; 4];
    fs::File::open(host.path("other")).unwrap().read_exact_at(&mut found, 8).unwrap();
    assert_eq!(&found, b"kept");
}
