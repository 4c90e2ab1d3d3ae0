// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that a file with two node ids (by a bind mount in the share) is one file for the daemon: a
//! change by one node id respects the maps by the other.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};

use testkit::eventually;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, Entry, MAP_READ, MAP_WRITE, ROOT, op};

const PAGE: u64 = 4096;
const BOTH: u64 = MAP_READ | MAP_WRITE;
const BYTES: u64 = 2 * RANGE;

/// Directory `b` is a bind mount of directory `a`.
const BIND: &str = "mkdir \"$SHARE/a\" \"$SHARE/b\" && mount --bind \"$SHARE/a\" \"$SHARE/b\"";

fn host(options: FsOptions) -> Option<FsHost> {
    let host = FsHost::with_mounts(options, BIND);
    if host.is_none() {
        eprintln!("SKIPPED: no mount namespace can be had here");
    }
    host
}

/// A guest, and the node ids of the directories through which it finds a file.
struct Fixture {
    host: FsHost,
    guest: FsGuest,
    dirs: [u64; 2],
}

impl Fixture {
    fn new(options: FsOptions) -> Option<Self> {
        let host = host(options)?;
        let mut guest = host.boot();
        let dirs = [guest.node("a"), guest.node("b")];
        Some(Self { host, guest, dirs })
    }

    /// The file on the host.
    fn real(&self, name: &str) -> File {
        let path = self.host.path(&format!("a/{name}"));
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    /// A sparse file of `BYTES` bytes, and its two node ids.
    fn file(&mut self, name: &str) -> (File, [u64; 2]) {
        let real = self.real(name);
        real.set_len(BYTES).unwrap();
        let numbers = self.dirs.map(|dir| self.guest.lookup(dir, name).unwrap().nodeid);
        assert_ne!(numbers[0], numbers[1], "two mounts, two node ids");
        (real, numbers)
    }

    /// Whether the window maps the file at `at` up to `end`, rounded up to `steps`, and not more.
    /// `steps`: a page if the host has truncated the file, a range if the guest has, since the
    /// guest does not access pages behind an end that it has set.
    fn is_shown_to(&self, at: u64, end: u64, steps: u64) -> bool {
        let end = end.next_multiple_of(steps);
        (end == 0 || self.guest.vmm.is_mapped(at + end - 1)) && !self.guest.vmm.is_mapped(at + end)
    }
}

/// A change of a file by one of its node ids; the errno of a file system that does not support it;
/// the length of the file afterwards.
type Change = (&'static str, fn(&mut Fixture, u64, &str) -> Result<(), i32>, u64);

const CHANGES: [Change; 9] = [
    ("SETATTR", |fixture, node, _| fixture.guest.set_size(node, 5000).map(drop), 5000),
    (
        "SETATTR with a handle",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            // FATTR_SIZE and FATTR_FH.
            let arg = abi::Arg::new().u32s(&[1 << 3 | 1 << 6, 0]).u64s(&[fh, 5000, 0, 0, 0, 0]);
            fixture.guest.call(op::SETATTR, node, &arg.u32s(&[0; 8]), abi::ATTR_OUT).map(drop)
        },
        5000,
    ),
    (
        "OPEN",
        |fixture, node, _| fixture.guest.open(node, libc::O_RDWR | libc::O_TRUNC).map(drop),
        0,
    ),
    (
        "CREATE",
        |fixture, _, name| {
            let flags = libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC;
            let (arg, out) = (abi::create(name, flags, 0o644), abi::ENTRY_OUT + abi::OPEN_OUT);
            fixture.guest.call(op::CREATE, fixture.dirs[1], &arg, out).map(drop)
        },
        0,
    ),
    (
        "COLLAPSE_RANGE",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            fixture.guest.fallocate(node, fh, 0, BYTES / 2, libc::FALLOC_FL_COLLAPSE_RANGE)
        },
        BYTES / 2,
    ),
    (
        "PUNCH_HOLE",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            fixture.guest.fallocate(node, fh, 0, BYTES, mode)
        },
        BYTES,
    ),
    (
        "WRITE",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            fixture.guest.write(node, fh, BYTES - 100, b"w").map(drop)
        },
        BYTES,
    ),
    (
        "COPY_FILE_RANGE",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            let (from, from_fh) = fixture.guest.create("source")?;
            fixture.guest.write(from, from_fh, 0, &[7; 5000])?;
            let arg = abi::copy_file_range((from_fh, 0), (node, fh, 0), 5000);
            fixture.guest.call(op::COPY_FILE_RANGE, from, &arg, 8).map(drop)
        },
        BYTES,
    ),
    (
        "FSYNC",
        |fixture, node, _| {
            let fh = fixture.guest.open(node, libc::O_RDWR)?;
            fixture.guest.fsync(node, fh)
        },
        BYTES,
    ),
];

/// Shows: after each change by the node id without a map, the window maps the file exactly up to
/// its end when the reply comes, and each range granted for writing has blocks.
#[test]
fn a_change_by_the_other_node_id() {
    let Some(mut fixture) = Fixture::new(FsOptions::default()) else { return };
    for (i, (what, change, bytes)) in CHANGES.into_iter().enumerate() {
        for mapped_by in [0, 1] {
            let name = format!("file{i}-{mapped_by}");
            let (real, numbers) = fixture.file(&name);
            fixture.guest.setup(numbers[mapped_by], 0, BYTES, BOTH, 0).unwrap();
            let other = if what == "CREATE" { 1 } else { 1 - mapped_by };
            match change(&mut fixture, numbers[other], &name) {
                Ok(()) => {}
                Err(libc::EOPNOTSUPP) if what == "COLLAPSE_RANGE" => continue,
                Err(errno) => panic!("{what}: errno {errno}"),
            }
            let found = real.metadata().unwrap();
            assert_eq!(found.len(), bytes, "{what}");
            assert!(fixture.is_shown_to(0, bytes, RANGE), "{what}: {bytes} bytes");
            assert!(found.blocks() * 512 >= bytes, "{what}: {} blocks", found.blocks());
            fixture.guest.remove(&[(0, BYTES)]).unwrap();
        }
    }
    fixture.guest.vmm.check();
    assert_eq!(fixture.guest.vmm.refused(), [""; 0]);
}

/// Shows: a truncation by the other node id removes the map first: if the front-end keeps the map,
/// the file keeps its length.
#[test]
fn a_truncation_by_the_other_node_id_waits_for_the_window() {
    let Some(mut fixture) = Fixture::new(FsOptions::default()) else { return };
    let (real, [one, other]) = fixture.file("file");
    fixture.guest.setup(one, 0, BYTES, BOTH, 0).unwrap();
    fixture.guest.vmm.refuse_maps(true);
    assert!(fixture.guest.set_size(other, 5000).is_err(), "the rest of the map can't be removed");
    assert_eq!(real.metadata().unwrap().len(), BYTES);
}

/// Shows: growth by the other node id allocates blocks for the ranges granted for writing before
/// its reply.
#[test]
fn growth_by_the_other_node_id_has_blocks() {
    let Some(mut fixture) = Fixture::new(FsOptions::default()) else { return };
    let (real, [one, other]) = fixture.file("file");
    real.set_len(100).unwrap();
    fixture.guest.setup(one, 0, RANGE, BOTH, 0).unwrap();
    fixture.guest.set_size(other, RANGE).unwrap();
    assert!(fixture.is_shown_to(0, RANGE, RANGE));
    assert!(real.metadata().unwrap().blocks() * 512 >= RANGE);
}

/// Shows: grants by both node ids, removed in either order and made again, belong to one address
/// space: a change by either node id shortens both maps.
#[test]
fn grants_by_both_node_ids_are_removed() {
    let Some(mut fixture) = Fixture::new(FsOptions::default()) else { return };
    for (round, first) in [0, 1, 0, 1].into_iter().enumerate() {
        let (_, numbers) = fixture.file(&format!("file{round}"));
        let at = |i: usize| i as u64 * BYTES;
        (0..2).for_each(|i| fixture.guest.setup(numbers[i], 0, BYTES, BOTH, at(i)).unwrap());
        if round < 2 {
            fixture.guest.remove(&[(0, 2 * BYTES)]).unwrap();
        } else {
            fixture.guest.remove(&[(at(first), BYTES)]).unwrap();
            fixture.guest.remove(&[(at(1 - first), BYTES)]).unwrap();
        }
        (0..2).for_each(|i| fixture.guest.setup(numbers[i], 0, BYTES, BOTH, at(i)).unwrap());
        fixture.guest.set_size(numbers[first], 5000).unwrap();
        let shown = |i| fixture.is_shown_to(at(i), 5000, RANGE);
        assert!(shown(0) && shown(1), "round {round}");
        fixture.guest.remove(&[(0, 2 * BYTES)]).unwrap();
    }
    assert_eq!(fixture.guest.vmm.mapped_bytes(), 0);
}

/// Shows: two first maps of a file at one time, by both node ids, make one address space, and the
/// daemon notices when the host changes the file.
#[test]
fn two_first_maps_at_once() {
    let Some(mut fixture) = Fixture::new(FsOptions { request_queues: 2, ..FsOptions::default() })
    else {
        return;
    };
    for round in 0..20 {
        let (real, numbers) = fixture.file(&format!("file{round}"));
        let pending = [0, 1].map(|i| {
            fixture.guest.on = 1 + i;
            fixture.guest.send_setup(numbers[i], 0, RANGE, BOTH, i as u64 * RANGE)
        });
        pending.into_iter().for_each(|setup| drop(fixture.guest.result(setup).unwrap()));
        real.set_len(5000).unwrap();
        eventually("both maps to be clipped", || {
            fixture.is_shown_to(0, 5000, PAGE) && fixture.is_shown_to(RANGE, 5000, PAGE)
        });
        fixture.guest.set_size(numbers[round % 2], 0).unwrap();
        assert!(!fixture.guest.vmm.is_mapped(0) && !fixture.guest.vmm.is_mapped(RANGE));
        fixture.guest.remove(&[(0, 2 * RANGE)]).unwrap();
    }
}

/// Shows: two files with the same inode number on two devices are two files.
#[test]
fn one_inode_number_on_two_devices() {
    let mounts = "mkdir \"$SHARE/a\" \"$SHARE/b\" && mount -t tmpfs tmpfs \"$SHARE/a\" && \
                  mount -t tmpfs tmpfs \"$SHARE/b\"";
    let Some(host) = FsHost::with_mounts(FsOptions::default(), mounts) else { return };
    ["a/file", "b/file"].iter().for_each(|name| host.put(name, &[1; 10_000]));
    let inode = |name: &str| std::fs::metadata(host.path(name)).unwrap().ino();
    assert_eq!(inode("a/file"), inode("b/file"), "the first file of a tmpfs");
    let mut guest = host.boot();
    let nodes = ["a", "b"].map(|dir| {
        let dir = guest.node(dir);
        guest.lookup(dir, "file").unwrap().nodeid
    });
    guest.setup(nodes[0], 0, RANGE, BOTH, 0).unwrap();
    guest.set_size(nodes[1], 100).unwrap();
    assert!(guest.vmm.is_mapped(2 * PAGE), "the other file has changed");
    let fh = guest.open(nodes[1], libc::O_RDWR | libc::O_TRUNC).unwrap();
    guest.fsync(nodes[1], fh).unwrap();
    assert!(guest.vmm.is_mapped(2 * PAGE));
    assert_eq!(host.get("a/file").len(), 10_000);
}

/// Shows: a file that was mapped by a node id which the guest then forgot is found by its new node
/// id, and the forgotten one maps nothing.
#[test]
fn a_forgotten_node_id() {
    let host = FsHost::new();
    host.put("file", &vec![1; BYTES as usize]);
    let mut guest = host.boot();
    let old = guest.node("file");
    guest.setup(old, 0, BYTES, BOTH, 0).unwrap();
    guest.forget(old, 1);
    assert_eq!(guest.setup(old, 0, RANGE, BOTH, BYTES), Err(libc::EBADF));
    let new = guest.node("file");
    assert_ne!(old, new);
    guest.set_size(new, 5000).unwrap();
    assert!(guest.vmm.is_mapped(0) && !guest.vmm.is_mapped(RANGE));
    let body = guest.call(op::LOOKUP, ROOT, &abi::Arg::new().name("file"), abi::ENTRY_OUT).unwrap();
    assert_eq!(Entry::parse(&body).attr.size, 5000);
    let mut seen = [0; 2];
    File::open(host.path("file")).unwrap().read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(Some(seen.to_vec()), guest.vmm.fetch(0, 2));
}

/// Shows: a guest that repeats look-ups, maps and FORGETs, and removes no map, makes the daemon
/// hold no more descriptors and memory than after the first few.
#[test]
fn maps_of_forgotten_node_ids_do_not_add_up() {
    let host = FsHost::new();
    (0..4).for_each(|i| host.put(&format!("file{i}"), &[1; 5000]));
    let mut guest = host.boot();
    let mut round = |i: u64| {
        let node = guest.node(&format!("file{}", i % 4));
        guest.setup(node, 0, RANGE, MAP_READ, i % 2 * RANGE).unwrap();
        guest.forget(node, 1);
    };
    (0..500).for_each(&mut round);
    let (kib, descriptors) = (host.own_kib(), host.descriptors().len());
    (0..5000).for_each(&mut round);
    assert!(host.descriptors().len() <= descriptors + 2, "{:?}", host.descriptors());
    // 5,000 entries of a table would take more.
    let grown = host.own_kib().saturating_sub(kib);
    assert!(grown < 200, "{grown} KiB");
    guest.vmm.check();
}
