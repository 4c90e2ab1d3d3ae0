// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that invalid SETUPMAPPINGs and REMOVEMAPPINGs are refused with the right errno, that only
//! granted ranges stay mapped, and that the next valid request is served.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;

use libc::{
    E2BIG, EBADF, EFBIG, EINVAL, EISDIR, ELOOP, ENODEV, ENOENT, ENXIO, EOPNOTSUPP, EOVERFLOW,
    EPERM, ERANGE, ESTALE,
};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use testkit::fs::{FsHost, FsOptions, RANGE, WINDOW};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, Arg, MAP_READ, MAP_WRITE, ROOT, op};

const PAGE: u64 = 4096;
const BOTH: u64 = MAP_READ | MAP_WRITE;
/// Errnos for an impossible number.
const BAD_NUMBER: &[i32] = &[EINVAL, ENXIO, EOVERFLOW, EFBIG, ERANGE];
/// Errnos for an invalid node id.
const NO_NODE: &[i32] = &[EBADF, ENOENT, ESTALE, EINVAL];
/// Errnos for a node without pages.
const NO_FILE: &[i32] = &[EINVAL, EISDIR, ENODEV, EOPNOTSUPP, EBADF, ENXIO, EPERM, ELOOP];
/// Errnos for a range without a grant.
const NOT_GRANTED: &[i32] = &[EINVAL, ENOENT, ENXIO];

/// A guest, a valid file of two ranges, and another file.
struct Bench {
    guest: FsGuest,
    good: u64,
    other: u64,
    host: FsHost,
}

fn bench() -> Bench {
    bench_with(FsOptions::default())
}

fn bench_with(options: FsOptions) -> Bench {
    let host = FsHost::with(options);
    host.put("good", &vec![b'g'; 2 * RANGE as usize]);
    host.put("other", &vec![b'o'; 2 * RANGE as usize]);
    let mut guest = host.boot();
    let (good, other) = (guest.node("good"), guest.node("other"));
    Bench { guest, good, other, host }
}

impl Bench {
    /// Makes a valid grant, reads it through the window, and removes it.
    fn good_request_works(&mut self, after: &str) {
        let guest = &mut self.guest;
        assert_eq!(guest.setup(self.good, RANGE, RANGE, BOTH, 0), Ok(()), "after {after}");
        assert_eq!(guest.vmm.fetch(RANGE - 4, 4).unwrap(), b"gggg", "after {after}");
        assert_eq!(guest.remove(&[(0, RANGE)]), Ok(()), "after {after}");
        assert_eq!(guest.vmm.mapped_bytes(), 0, "after {after}");
        guest.vmm.check();
    }

    /// The request of `ask` must be refused with one of `errnos`, and change nothing.
    fn refused<T: std::fmt::Debug>(
        &mut self,
        what: &str,
        errnos: &[i32],
        ask: impl FnOnce(&mut FsGuest) -> Result<T, i32>,
    ) {
        let before = self.guest.vmm.mapped_bytes();
        let result = ask(&mut self.guest);
        assert!(matches!(&result, Err(e) if errnos.contains(e)), "{what}: {result:?}");
        assert_eq!(self.guest.vmm.mapped_bytes(), before, "{what}");
    }
}

/// Shows that offsets and lengths that wrap, leave the window or the file, are unaligned or 0, are
/// refused.
#[test]
fn impossible_numbers() {
    let mut b = bench();
    let top = u64::MAX - RANGE + 1;
    // Linux's loff_t ends at i64::MAX.
    let last = (i64::MAX as u64 + 1) - RANGE;
    let cases: &[(&str, [u64; 4])] = &[
        ("the window's end and a range", [0, RANGE, BOTH, WINDOW]),
        ("over the window's end", [0, 2 * RANGE, BOTH, WINDOW - RANGE]),
        ("far behind the window", [0, RANGE, BOTH, 1 << 60]),
        ("moffset wraps", [0, 2 * RANGE, BOTH, top]),
        ("moffset and length reach 2^64", [0, RANGE, BOTH, top]),
        ("length of all", [0, u64::MAX, BOTH, 0]),
        ("length of all ranges", [0, top, BOTH, 0]),
        ("length 2^63", [0, 1 << 63, BOTH, 0]),
        ("foffset wraps", [top, 2 * RANGE, BOTH, 0]),
        ("foffset and length reach 2^64", [top, RANGE, BOTH, 0]),
        ("foffset 2^63", [1 << 63, RANGE, BOTH, 0]),
        ("foffset at the end of all files", [last, RANGE, BOTH, 0]),
        ("past the end of the file", [2 * RANGE, RANGE, BOTH, 0]),
        ("past the end, to read", [2 * RANGE, RANGE, MAP_READ, 0]),
        ("far past the end", [1 << 40, RANGE, MAP_READ, 0]),
        ("length 0", [0, 0, BOTH, 0]),
        ("length 0 at the window's end", [0, 0, BOTH, WINDOW]),
        ("length 1", [0, 1, BOTH, 0]),
        ("length unaligned", [0, RANGE + 1, BOTH, 0]),
        ("moffset unaligned", [0, RANGE, BOTH, 512]),
        ("moffset odd", [0, RANGE, BOTH, RANGE + 1]),
        ("foffset unaligned", [512, RANGE, BOTH, 0]),
        ("foffset odd", [RANGE - 1, RANGE, BOTH, 0]),
        ("unknown flags", [0, RANGE, BOTH | 1 << 63, 0]),
    ];
    for &(what, [foffset, len, flags, moffset]) in cases {
        let node = b.good;
        b.refused(what, BAD_NUMBER, |guest| guest.setup(node, foffset, len, flags, moffset));
        b.good_request_works(what);
    }
    assert_eq!(b.guest.vmm.refused(), [""; 0], "the front-end had to refuse");
}

/// Shows that node ids that are invalid, or are no regular files, are refused. A FIFO blocks no
/// thread.
#[test]
fn nodes_without_pages() {
    let mut b = bench();
    let dir = b.host.path("dir");
    std::fs::create_dir(&dir).unwrap();
    let _socket = UnixListener::bind(b.host.path("socket")).unwrap();
    mkfifo(&b.host.path("fifo"), Mode::S_IRWXU).unwrap();
    symlink("good", b.host.path("symlink")).unwrap();
    let mut kinds = vec!["dir", "socket", "fifo", "symlink"];
    let null = mknod(&b.host.path("null"), SFlag::S_IFCHR, Mode::S_IRWXU, makedev(1, 3));
    if null.is_ok() {
        kinds.push("null");
    }
    for kind in kinds {
        let Ok(entry) = b.guest.lookup(ROOT, kind) else { continue };
        for flags in [MAP_READ, BOTH] {
            b.refused(kind, NO_FILE, |guest| guest.setup(entry.nodeid, 0, RANGE, flags, 0));
            b.good_request_works(kind);
        }
    }
    b.refused("the root", NO_FILE, |guest| guest.setup(ROOT, 0, RANGE, BOTH, 0));

    let freed = b.guest.lookup(ROOT, "other").unwrap().nodeid;
    b.guest.forget(freed, 2);
    b.refused("a freed node", NO_NODE, |guest| guest.setup(freed, 0, RANGE, BOTH, 0));
    for unknown in [0, 4711, u64::MAX, 1 << 63, 1 << 32 | 1] {
        let what = format!("node {unknown}");
        b.refused(&what, NO_NODE, |guest| guest.setup(unknown, 0, RANGE, BOTH, 0));
        b.good_request_works(&what);
    }
}

/// Shows that a FORGET with too large a count, and one of an invalid node id, forgets no other
/// node.
#[test]
fn forgets_of_too_much() {
    let mut b = bench();
    for (node, count) in [(b.other, u64::MAX), (b.other, 1), (0, 1), (4711, 1), (ROOT, u64::MAX)] {
        b.guest.forget(node, count);
        b.good_request_works("a forget");
        assert!(b.guest.lookup(ROOT, "good").is_ok(), "the root was forgotten");
    }
    let other = b.guest.node("other");
    b.guest.setup(other, 0, RANGE, BOTH, 0).unwrap();
    assert_eq!(b.guest.vmm.fetch(0, 4).unwrap(), b"oooo");
    // The grant of a forgotten node can still be removed.
    b.guest.forget(other, 1);
    b.guest.remove(&[(0, RANGE)]).unwrap();
    assert_eq!(b.guest.vmm.mapped_bytes(), 0);
}

/// Shows that a map over a live one replaces it or is refused, and that the window matches the
/// reply. Linux sends such a request after a removal that failed.
#[test]
fn maps_over_live_ones() {
    let mut b = bench();
    let half = RANGE / 2;
    let cases = [(0, RANGE), (0, 2 * RANGE), (half, RANGE), (half, half), (RANGE - PAGE, RANGE)];
    for (at, len) in cases {
        let guest = &mut b.guest;
        guest.setup(b.good, 0, RANGE, BOTH, 0).unwrap();
        let took = guest.setup(b.other, 0, len, BOTH, at);
        for page in (0..3 * RANGE).step_by(PAGE as usize) {
            let old = page < RANGE;
            let new = page >= at && page < at + len;
            let allowed: &[Option<u8>] = match (took.is_ok(), new, old) {
                (true, true, _) => &[Some(b'o')],
                (true, false, true) => &[Some(b'g'), None],
                (false, _, true) => &[Some(b'g')],
                _ => &[None],
            };
            let seen = guest.vmm.fetch(page, 1).map(|bytes| bytes[0]);
            assert!(allowed.contains(&seen), "{at:#x} {len:#x}: {seen:?} at {page:#x}: {took:?}");
        }
        // Removes all grants, each as it was made.
        let _ = guest.remove(&[(at, len)]);
        let _ = guest.remove(&[(0, RANGE)]);
        guest.destroy();
        assert_eq!(guest.vmm.mapped_bytes(), 0, "{at:#x} {len:#x}");
        guest.init();
        (b.good, b.other) = (b.guest.node("good"), b.guest.node("other"));
        b.good_request_works("a map over a live one");
    }
    assert_eq!(b.guest.vmm.refused(), [""; 0], "the front-end had to refuse");
}

/// Shows that REMOVEMAPPINGs with too many, too few, wrapping or never granted ranges are refused.
#[test]
fn removals_that_are_refused() {
    let mut b = bench();
    let list = |count: u32, given: usize| {
        let ranges = (0..given).map(|i| [RANGE * (i as u64 + 1), RANGE]);
        ranges.fold(Arg::new().u32s(&[count]), |arg, range| arg.u64s(&range))
    };
    let lists: &[(&str, Arg)] = &[
        ("257", list(257, 257)),
        ("2 said, 1 given", list(2, 1)),
        ("1 said, none given", list(1, 0)),
        ("2^32 - 1 said", list(u32::MAX, 2)),
        ("2^28 said: the bytes wrap", list(1 << 28, 2)),
        ("no count", Arg::new()),
        ("half a count", Arg::new().bytes(&[1, 0])),
    ];
    for (what, arg) in lists {
        b.refused(what, &[EINVAL, E2BIG], |guest| guest.call(op::REMOVEMAPPING, 0, arg, 0));
        b.good_request_works(what);
    }
    let top = u64::MAX - RANGE + 1;
    let ranges: &[(&str, (u64, u64))] = &[
        ("behind the window", (WINDOW, RANGE)),
        ("over the window's end", (WINDOW - RANGE, 2 * RANGE)),
        ("wraps", (top, 2 * RANGE)),
        ("reaches 2^64", (top, RANGE)),
        ("all there is", (0, u64::MAX)),
        ("nothing", (0, 0)),
        ("unaligned", (1, RANGE)),
    ];
    for &(what, range) in ranges {
        let errnos: Vec<i32> = [NOT_GRANTED, BAD_NUMBER].concat();
        b.refused(what, &errnos, |guest| guest.remove(&[range]));
        b.good_request_works(what);
    }
}

/// Shows that the removal of a range without a grant changes nothing. It may succeed.
#[test]
fn removals_without_a_grant() {
    let mut b = bench();
    b.guest.setup(b.other, 0, RANGE, BOTH, 4 * RANGE).unwrap();
    for range in [(0, RANGE), (WINDOW - RANGE, RANGE), (RANGE, 3 * RANGE), (5 * RANGE, RANGE)] {
        for _twice in 0..2 {
            let result = b.guest.remove(&[range]);
            assert!(matches!(&result, Ok(()) | Err(EINVAL | ENOENT | ENXIO)), "{result:?}");
            assert_eq!(b.guest.vmm.fetch(4 * RANGE, 4).unwrap(), b"oooo", "{range:?}");
            assert_eq!(b.guest.vmm.mapped_bytes(), RANGE);
        }
    }
    b.guest.remove(&[(4 * RANGE, RANGE)]).unwrap();
    b.good_request_works("removals of nothing");
}

/// Shows that an invalid removal in one request with a valid one does not remove a third grant.
#[test]
fn a_bad_removal_beside_good_ones() {
    let mut b = bench();
    let guest = &mut b.guest;
    for i in 0..3 {
        guest.setup(b.good, 0, RANGE, BOTH, i * RANGE).unwrap();
    }
    let result = guest.remove(&[(0, RANGE), (WINDOW, RANGE), (RANGE, RANGE)]);
    assert!(result.is_err());
    assert_eq!(guest.vmm.fetch(2 * RANGE, 4).unwrap(), b"gggg", "the third grant was removed");
    let _ = guest.remove(&[(0, RANGE)]);
    let _ = guest.remove(&[(RANGE, RANGE)]);
    guest.remove(&[(2 * RANGE, RANGE)]).unwrap();
    assert_eq!(guest.vmm.mapped_bytes(), 0);
    b.good_request_works("mixed removals");
}

/// Shows that 256 ranges, the largest number, can be removed by one request.
#[test]
fn the_largest_number_of_removals() {
    let mut b = bench_with(FsOptions { window_bytes: 256 * RANGE, ..FsOptions::default() });
    std::fs::File::create(b.host.path("large")).unwrap().set_len(256 * RANGE).unwrap();
    let node = b.guest.node("large");
    let ranges: Vec<_> = (0..256).map(|i| (i * RANGE, RANGE)).collect();
    for &(at, len) in &ranges {
        b.guest.setup(node, at, len, MAP_READ, at).unwrap();
    }
    assert_eq!(b.guest.vmm.mapped_bytes(), 256 * RANGE);
    b.guest.remove(&ranges).unwrap();
    assert_eq!(b.guest.vmm.mapped_bytes(), 0);
    b.good_request_works("256 removals");
}

/// Shows that no map is made before INIT, that none stays after DESTROY, and that a second INIT
/// works.
#[test]
fn maps_outside_of_a_session() {
    let mut b = bench();
    b.guest.setup(b.good, 0, RANGE, BOTH, 0).unwrap();
    b.guest.destroy();
    assert_eq!(b.guest.vmm.mapped_bytes(), 0, "DESTROY leaves a map");
    let good = b.good;
    let any: Vec<i32> = (1..200).filter(|&e| e != libc::EAGAIN).collect();
    b.refused("after DESTROY", &any, |guest| guest.setup(good, 0, RANGE, BOTH, 0));
    b.refused("after DESTROY", &any, |guest| guest.call(op::REMOVEMAPPING, 0, &Arg::new(), 0));
    b.guest.init();
    (b.good, b.other) = (b.guest.node("good"), b.guest.node("other"));
    b.good_request_works("a second INIT");

    let mut fresh = bench();
    fresh.guest.reset();
    for node in [ROOT, 2, 3, fresh.good] {
        fresh.refused("before INIT", &any, |guest| guest.setup(node, 0, RANGE, BOTH, 0));
    }
    let arg = abi::setupmapping(0, RANGE, BOTH, 0);
    for cut in 0..arg.0.len() {
        let arg = Arg(arg.0[..cut].to_vec());
        fresh.refused("before INIT", &any, |guest| guest.call(op::SETUPMAPPING, ROOT, &arg, 0));
    }
    fresh.guest.init();
    fresh.good = fresh.guest.node("good");
    fresh.good_request_works("requests before INIT");
}
