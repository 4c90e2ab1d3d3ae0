// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that a daemon holds no more at the end than at the beginning: after 10,000 maps and
//! unmaps, after 100 mounts, and after 20 front-ends that hung up without a stop.

use testkit::eventually;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};

const ROUNDS: u64 = 10_000;
const FILES: u64 = 8;
/// Growth of memory that an allocator may cause, in KiB. A leak of 32 bytes a round is more.
const SLACK_KIB: u64 = 320;

/// What a daemon holds, without its memory.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: Vec<String>,
    file_maps: Vec<String>,
    maps: usize,
    threads: usize,
}

fn held(host: &FsHost) -> Held {
    Held {
        descriptors: host.descriptors(),
        file_maps: host.file_maps(),
        maps: host.maps(),
        threads: host.threads(),
    }
}

/// Whether each of `now` is one of `before`.
fn is_among(now: &[String], before: &[String]) -> bool {
    let mut left = before.to_vec();
    now.iter().all(|name| left.iter().position(|of| of == name).map(|at| left.remove(at)).is_some())
}

/// Waits until no more is held than `before`, since threads of an earlier session may still close
/// files. An allocator may keep arenas, which are a few mappings.
fn wait_held(host: &FsHost, before: &Held, what: &str) {
    let same = |now: &Held| {
        is_among(&now.descriptors, &before.descriptors)
            && now.file_maps == before.file_maps
            && now.threads <= before.threads
            && now.maps <= before.maps + 8
    };
    let what = format!("{what}: no more than {before:#?}");
    eventually(&what, || same(&held(host)));
}

fn host_with_files(options: FsOptions) -> FsHost {
    let host = FsHost::with(options);
    for i in 0..FILES {
        let file = std::fs::File::create(host.path(&format!("file{i}"))).unwrap();
        file.set_len(4 * RANGE).unwrap();
    }
    host
}

/// Maps one range, reads it, and unmaps it.
fn round(guest: &mut FsGuest, nodes: &[u64], i: u64) {
    let node = nodes[(i % FILES) as usize];
    let at = i % 32 * RANGE;
    let flags = if i.is_multiple_of(3) { MAP_READ } else { MAP_READ | MAP_WRITE };
    guest.setup(node, i % 4 * RANGE, RANGE, flags, at).unwrap();
    assert!(guest.vmm.is_mapped(at + RANGE - 1));
    guest.remove(&[(at, RANGE)]).unwrap();
    assert!(!guest.vmm.is_mapped(at));
}

fn many_rounds(mem_slots: bool, rounds: u64) {
    let host = host_with_files(FsOptions { mem_slots, ..FsOptions::default() });
    let mut guest = host.boot();
    let nodes: Vec<_> = (0..FILES).map(|i| guest.node(&format!("file{i}"))).collect();
    // After this all state that is created at first use exists.
    for i in 0..500 {
        round(&mut guest, &nodes, i);
    }
    let (before, kib) = (held(&host), host.own_kib());
    for i in 0..rounds {
        round(&mut guest, &nodes, i);
    }
    wait_held(&host, &before, "rounds of map and unmap");
    let now = host.own_kib();
    assert!(now <= kib + SLACK_KIB, "own memory grew from {kib} to {now} KiB");
    assert_eq!(guest.vmm.mapped_bytes(), 0);
    assert_eq!(guest.vmm.refused(), [""; 0]);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that the number of descriptors, mappings and threads, and the memory, are back at their
/// first values after 10,000 rounds.
#[test]
fn ten_thousand_maps_and_unmaps() {
    many_rounds(true, ROUNDS);
}

/// Shows the same for a daemon that offers no memory slots.
#[test]
fn maps_and_unmaps_without_memory_slots() {
    many_rounds(false, ROUNDS);
}

/// Shows that 100 mounts whose grants the guest does not remove, each ended by DESTROY, leak
/// nothing.
#[test]
fn a_hundred_mounts() {
    let host = host_with_files(FsOptions::default());
    let mut guest = host.boot();
    guest.destroy();
    let mut before = None;
    for i in 0..100 {
        guest.init();
        for file in 0..FILES {
            let (node, _fh) = guest.opened(&format!("file{file}"));
            guest.setup(node, 0, RANGE, MAP_READ | MAP_WRITE, (i + file) % 32 * RANGE).unwrap();
        }
        guest.names().unwrap();
        guest.destroy();
        assert_eq!(guest.vmm.mapped_bytes(), 0, "mount {i} left a map");
        if i == 1 {
            before = Some(held(&host));
        }
    }
    wait_held(&host, &before.unwrap(), "100 mounts");
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that 20 front-ends that hang up with live grants, open files and running requests leak
/// nothing, and that the 21st is served.
#[test]
fn twenty_front_ends_that_vanish() {
    let host = host_with_files(FsOptions { keep_listening: true, ..FsOptions::default() });
    let mut before = None;
    for i in 0..20 {
        let mut guest = host.boot();
        for file in 0..FILES {
            let (node, fh) = guest.opened(&format!("file{file}"));
            guest.setup(node, 0, RANGE, MAP_READ | MAP_WRITE, file * RANGE).unwrap();
            let _fsync = guest.send_fsync(node, fh);
            let _setup = guest.send_setup(node, 0, RANGE, MAP_READ, (file + 8) * RANGE);
        }
        guest.kill();
        if i == 1 {
            // The session's memory and its threads' epoll descriptors are closed after its
            // connection.
            eventually("the session's end", || {
                let open = host.descriptors();
                let count = |kind| open.iter().filter(|name| name.starts_with(kind)).count();
                host.maps_of("guest-ram") == 0
                    && host.file_maps().is_empty()
                    // The listener holds two of them, the broker's socket is one.
                    && (count("socket:"), count("anon_inode:[eventpoll]")) == (3, 0)
            });
            before = Some(held(&host));
        } else if let Some(before) = &before {
            wait_held(&host, before, &format!("front-end {i}"));
        }
    }
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file0");
    assert_eq!(guest.read(node, fh, 0, 4).unwrap(), [0; 4]);
    guest.power_off();
}
