// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Lifetimes of mounts, files and maps, and that nothing leaks.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;
use std::time::Instant;

use vhost_user_dax::passthrough::PassthroughMount;

use crate::map::{Map, own_mount_namespace};
use crate::places::connections;
use crate::roles::{Player, receive_file, send_file};
use crate::{RANGE_BYTES, alone, among_others, file_here, mount};

fn entries(dir: impl AsRef<Path>) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Number of threads that answer the kernel's FUSE requests.
pub fn servers() -> usize {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok());
    names.filter(|name| name.trim() == "passthrough").count()
}

fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// Number of FUSE inodes in the kernel; `None` if the kernel does not count them in a slab of their
/// own.
fn fuse_inodes() -> Option<u64> {
    let slabs = fs::read_to_string("/proc/slabinfo").ok()?;
    let line = slabs.lines().find(|line| line.starts_with("fuse_inode "))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// Waits until `holds` returns true: the kernel does some work shortly after a system call has
/// returned.
pub fn until(what: &str, holds: impl Fn() -> bool) {
    testkit::eventually(what, holds);
}

/// Shows: 10,000 rounds of open and drop leak no descriptor, no thread and no memory of this
/// process, and no inode in the kernel.
#[test]
fn ten_thousand_rounds_leave_nothing() {
    let _alone = alone();
    let Some(mount) = mount() else { return };
    let real = file_here(5000);
    let round = || {
        let passthrough = mount.open(&real).unwrap();
        Map::of(&passthrough, RANGE_BYTES).store(0, b"round");
    };
    (0..1000).for_each(|_| round());
    let began = Instant::now();
    (0..1000).for_each(|_| drop(mount.open(&real).unwrap()));
    println!("1,000 opens and drops: {:?}", began.elapsed());
    let counts = || (entries("/proc/self/fd"), entries("/proc/self/task"));
    let (before, kib, inodes) = (counts(), resident_kib(), fuse_inodes());
    let began = Instant::now();
    (0..10_000).for_each(|_| round());
    let took = began.elapsed();
    assert_eq!(counts(), before);
    let grown = resident_kib().saturating_sub(kib);
    println!("10,000 rounds: {took:?}, {grown} KiB more; inodes {inodes:?} -> {:?}", fuse_inodes());
    assert!(grown < 512, "the process has grown by {grown} KiB");
    if let Some(inodes) = inodes {
        until("inodes freed", || fuse_inodes().is_some_and(|now| now < inodes + 1000));
    }
}

/// Shows: threads that open passthrough files at the same time, of one shared file and of a file of
/// their own, each get the right file.
#[test]
fn many_threads_at_once() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let all = file_here(RANGE_BYTES);
    thread::scope(|scope| {
        for n in 0..16_u64 {
            let (mount, all) = (&mount, &all);
            scope.spawn(move || {
                let own = file_here(5000);
                for round in 0..200_u64 {
                    let (mine, ours) = (mount.open(&own).unwrap(), mount.open(all).unwrap());
                    let data = (n << 32 | round).to_ne_bytes();
                    Map::of(&mine, RANGE_BYTES).store(0, &data);
                    Map::of(&ours, RANGE_BYTES).store(n * 4096, &data);
                    for (file, at) in [(&own, 0), (all, n * 4096)] {
                        let mut seen = [0; 8];
                        file.read_exact_at(&mut seen, at).unwrap();
                        assert_eq!(seen, data);
                    }
                }
            });
        }
    });
}

/// Shows: the mount is in no mount table, and files can be opened from any mount namespace.
#[test]
fn no_mount_table_lists_the_mount() {
    let _alone = alone();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let Some(mount) = mount() else { return };
    let real = file_here(5000);
    let _passthrough = mount.open(&real).unwrap();
    assert_eq!(mounts(), before);
    thread::scope(|scope| {
        scope.spawn(|| {
            own_mount_namespace();
            Map::of(&mount.open(&real).unwrap(), RANGE_BYTES).store(0, b"elsewhere");
        });
    });
    let mut seen = [0; 9];
    real.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(&seen, b"elsewhere");
}

/// The number of the mount's FUSE connection.
fn connection(passthrough: &fs::File) -> String {
    nix::sys::stat::minor(passthrough.metadata().unwrap().dev()).to_string()
}

/// Shows: dropping the mount ends its thread and closes its descriptors although a process of
/// another user holds a map and a descriptor of a file. Both keep working, and the file can be
/// mapped anew. When the last of them is closed, the kernel removes the connection.
#[test]
fn dropping_the_mount_ends_it_while_it_is_mapped_elsewhere() {
    let _alone = alone();
    if mount().is_none() {
        return;
    }
    let list = connections();
    let counts = || (entries("/proc/self/fd"), servers());
    let before = counts();
    let mount = PassthroughMount::new().unwrap();
    let real = file_here(5000);
    let passthrough = mount.open(&real).unwrap();
    let connection = list.join(connection(&passthrough));
    let mut front_end = Player::start("front-end", Some(65534));
    send_file(&front_end.line, &passthrough);
    front_end.wait_byte();
    drop(mount);
    drop(passthrough);
    // The real file and the socket to the other process are still open.
    assert_eq!(counts(), (before.0 + 2, before.1));
    real.write_all_at(b"later", 1 << 20).unwrap();
    front_end.send_byte();
    front_end.wait_byte();
    for (at, stored) in
        [(0, &b"mapped"[..]), (1000, b"still mapped"), (2000, b"without a descriptor")]
    {
        let mut seen = vec![0; stored.len()];
        real.read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, stored);
    }
    assert!(connection.exists(), "the connection is gone although a map exists");
    front_end.send_byte();
    front_end.join();
    until("the connection is gone", || !connection.exists());
}

/// Shows: the blocks of a deleted file are freed when the mount, the file and the maps are gone,
/// although the mount was dropped first and no one can close a backing ID any more.
#[test]
fn a_dropped_mount_holds_no_file() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let place = crate::places::memory("2m").unwrap();
    let full = || {
        let real = place.create("file");
        real.write_all_at(&[1; 1 << 20], 0).unwrap();
        place.remove("file");
        real
    };
    let (real, kept) = (full(), file_here(5000));
    let held = mount.open(&kept).unwrap();
    // The map keeps the superblock alive; the other file has a backing ID, too.
    let map = Map::of(&held, RANGE_BYTES);
    let passthrough = mount.open(&real).unwrap();
    drop(mount);
    drop((real, passthrough));
    until("the blocks are freed", || {
        let again = place.create("again");
        let fits = again.write_all_at(&[1; 2 << 20], 0).is_ok();
        place.remove("again");
        fits
    });
    map.store(0, b"kept");
}

/// Shows: after kill -9 of the daemon, maps and descriptors of its files keep working.
#[test]
fn maps_outlive_a_killed_daemon() {
    let _others = among_others();
    if mount().is_none() {
        return;
    }
    let mut daemon = Player::start("daemon", None);
    let passthrough = receive_file(&daemon.line);
    let real = receive_file(&daemon.line);
    let map = Map::of(&passthrough, RANGE_BYTES);
    map.store(0, b"before");
    daemon.process.kill().unwrap();
    daemon.process.wait().unwrap();
    map.store(4096, b"after");
    real.write_all_at(b"grown", 1 << 20).unwrap();
    assert_eq!(map.load(1 << 20, 5), b"grown");
    let again = Map::of(&passthrough, RANGE_BYTES);
    drop(passthrough);
    again.store(8000, b"again");
    for (at, stored) in [(0, &b"before"[..]), (4096, b"after"), (8000, b"again")] {
        let mut seen = vec![0; stored.len()];
        real.read_exact_at(&mut seen, at).unwrap();
        assert_eq!(seen, stored);
    }
    real.sync_data().unwrap();
}

/// Shows: 100 mounts leak no descriptor, no thread and no FUSE connection.
#[test]
fn a_hundred_mounts_leave_nothing() {
    let _alone = alone();
    if mount().is_none() {
        return;
    }
    let list = connections();
    let real = file_here(5000);
    let counts = || (entries("/proc/self/fd"), servers(), entries(&list));
    let before = counts();
    for _ in 0..100 {
        let mount = PassthroughMount::new().unwrap();
        let passthrough = mount.open(&real).unwrap();
        Map::of(&passthrough, RANGE_BYTES).store(0, b"x");
    }
    until("descriptors, threads and connections are back at their old numbers", || {
        counts() == before
    });
}
