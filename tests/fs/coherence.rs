// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that the window, READ and WRITE, and the host see the same bytes at once, in files of many
//! lengths, while they grow and shrink, and when a grant changes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};

const PAGE: u64 = 4096;
const BOTH: u64 = MAP_READ | MAP_WRITE;
const SIZES: &[u64] =
    &[0, 1, PAGE - 1, PAGE, PAGE + 1, RANGE - 1, RANGE, RANGE + 1, 3_000_000, 2 * RANGE + 5];

fn pattern(bytes: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i * 31 + (i >> 9)) as u8 | 1).collect()
}

fn writable(host: &FsHost, name: &str) -> File {
    OpenOptions::new().read(true).write(true).open(host.path(name)).unwrap()
}

/// Reads the whole file by READ.
fn read_all(guest: &mut FsGuest, node: u64, fh: u64, bytes: u64) -> Vec<u8> {
    let mut all = Vec::new();
    while (all.len() as u64) < bytes {
        let part = guest.read(node, fh, all.len() as u64, 65536).unwrap();
        assert!(!part.is_empty(), "a short file");
        all.extend_from_slice(&part);
    }
    all
}

/// What a guest sees of a file at `at`, up to the end of its last page.
fn window(guest: &FsGuest, at: u64, bytes: u64) -> Option<Vec<u8>> {
    let mut seen = guest.vmm.fetch(at, bytes.next_multiple_of(PAGE) as usize)?;
    let tail = seen.split_off(bytes as usize);
    assert!(tail.iter().all(|&byte| byte == 0), "something behind the end of the file");
    Some(seen)
}

/// Stores by each path, then reads by each path, in a file of `bytes` bytes.
fn all_ways(mem_slots: bool, bytes: u64) {
    let host = FsHost::with(FsOptions { mem_slots, ..FsOptions::default() });
    host.put("file", &pattern(bytes));
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    let ranges = bytes.div_ceil(RANGE);
    // In reverse order, so that no range has the same offset in the window and in the file.
    let base = |range: u64| (ranges - 1 - range) * RANGE;
    for range in 0..ranges {
        guest.setup(node, range * RANGE, RANGE, BOTH, base(range)).unwrap();
    }
    let mut expected = pattern(bytes);
    let real = writable(&host, "file");
    let mut places: Vec<u64> =
        [0, 1, PAGE - 1, PAGE, bytes / 2, RANGE - 1, RANGE, bytes.wrapping_sub(1)].to_vec();
    places.retain(|&place| place < bytes);
    for (i, &place) in places.iter().enumerate() {
        let at = base(place / RANGE) + place % RANGE;
        let byte = 2 * i as u8;
        assert!(guest.vmm.store(at, &[byte]), "no window at {place} of {bytes}");
        let mut host_sees = [0u8; 1];
        real.read_exact_at(&mut host_sees, place).unwrap();
        assert_eq!(host_sees, [byte], "the host, {place} of {bytes}");
        assert_eq!(guest.read(node, fh, place, 1).unwrap(), [byte], "READ, {place} of {bytes}");
        real.write_all_at(&[byte + 100], place).unwrap();
        assert_eq!(guest.vmm.fetch(at, 1).unwrap(), [byte + 100], "host to window");
        assert_eq!(guest.write(node, fh, place, &[byte + 50]), Ok(1));
        assert_eq!(guest.vmm.fetch(at, 1).unwrap(), [byte + 50], "WRITE to window");
        expected[place as usize] = byte + 50;
    }
    for range in 0..ranges {
        let part = RANGE.min(bytes - range * RANGE);
        let seen = window(&guest, base(range), part).unwrap();
        let from = (range * RANGE) as usize;
        assert!(seen == expected[from..from + part as usize], "range {range} of {bytes}");
    }
    assert!(read_all(&mut guest, node, fh, bytes) == expected, "READ of {bytes}");
    assert!(host.get("file") == expected, "the host's file of {bytes}");
    assert_eq!(std::fs::metadata(host.path("file")).unwrap().len(), bytes, "its length changed");
    assert_eq!(guest.vmm.refused(), [""; 0]);
    let list: Vec<_> = (0..ranges).map(|range| (base(range), RANGE)).collect();
    if !list.is_empty() {
        guest.remove(&list).unwrap();
    }
    assert_eq!(guest.vmm.mapped_bytes(), 0);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that stores, WRITEs and writes of the host are seen at once by the two other paths.
#[test]
fn every_size_and_every_way() {
    SIZES.iter().for_each(|&bytes| all_ways(true, bytes));
}

/// Shows the same for a daemon without memory slots.
#[test]
fn every_size_without_memory_slots() {
    SIZES.iter().for_each(|&bytes| all_ways(false, bytes));
}

/// Shows that a grant of an empty file is refused or maps nothing while it is empty, and that the
/// file stays empty.
#[test]
fn an_empty_file_stays_empty() {
    let host = FsHost::new();
    host.put("file", b"");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    let _any = guest.setup(node, 0, RANGE, BOTH, 0);
    assert_eq!(std::fs::metadata(host.path("file")).unwrap().len(), 0, "a map made it grow");
    guest.vmm.check();
    guest.write(node, fh, 0, b"no longer empty").unwrap();
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert_eq!(window(&guest, 0, 15).unwrap(), b"no longer empty");
}

/// Shows that a grant shows the bytes that a WRITE appends behind the file's old end, that nothing
/// is mapped without a grant, and that the same holds for the next range after its grant.
#[test]
fn a_grant_outlives_growth() {
    let host = FsHost::new();
    host.put("file", &pattern(5000));
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 4 * RANGE).unwrap();
    let mut expected = pattern(5000);
    let ends = [5001, 8192, 8193, 12_000, 100_000, RANGE - 1, RANGE, RANGE + 1, RANGE + 70_000];
    for end in ends {
        while (expected.len() as u64) < end {
            let part = (end - expected.len() as u64).min(65_536);
            let more: Vec<u8> = (0..part).map(|i| (i * 7 + end) as u8 | 1).collect();
            let at = expected.len() as u64;
            assert_eq!(guest.write(node, fh, at, &more), Ok(part as u32));
            expected.extend_from_slice(&more);
        }
        let seen = window(&guest, 4 * RANGE, end.min(RANGE)).expect("the grant was removed");
        assert!(seen == expected[..end.min(RANGE) as usize], "at {end}");
        assert!(guest.vmm.mapped_bytes() <= RANGE, "mapped without a grant at {end}");
    }
    guest.setup(node, RANGE, RANGE, BOTH, 0).unwrap();
    assert!(window(&guest, 0, 70_000).unwrap() == expected[RANGE as usize..]);
    assert!(guest.vmm.store(4 * RANGE + 6000, b"stored"));
    expected[6000..6006].copy_from_slice(b"stored");
    assert!(host.get("file") == expected);
    assert_eq!(guest.vmm.refused(), [""; 0]);
}

/// Shows that a file that is truncated and grows again under live grants shows its bytes in each of
/// them, that nothing is mapped without a grant, and that bytes that were cut off are zero
/// afterwards.
#[test]
fn grants_outlive_a_truncation() {
    let host = FsHost::new();
    host.put("file", &pattern(3 * RANGE));
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    for range in 0..3 {
        guest.setup(node, range * RANGE, RANGE, BOTH, range * RANGE).unwrap();
    }
    for cut in [2 * RANGE + 17, 2 * RANGE, RANGE + PAGE, RANGE - 1, PAGE + 1, 1, 0] {
        assert_eq!(guest.set_size(node, cut).unwrap().size, cut);
        assert_eq!(std::fs::metadata(host.path("file")).unwrap().len(), cut);
        assert!(guest.vmm.mapped_bytes() <= 3 * RANGE, "more is mapped than was granted");
        let all = 3 * RANGE;
        assert_eq!(guest.set_size(node, all).unwrap().size, all);
        let last = b"the last bytes";
        guest.write(node, fh, all - last.len() as u64, last).unwrap();
        let mut expected = pattern(cut);
        expected.resize(all as usize, 0);
        expected[all as usize - last.len()..].copy_from_slice(last);
        let seen = window(&guest, 0, all).unwrap_or_else(|| panic!("a grant was removed at {cut}"));
        assert!(seen == expected, "the window after a cut at {cut}");
        assert!(host.get("file") == expected, "the file after a cut at {cut}");
        assert!(guest.vmm.store(RANGE, b"x"));
        assert_eq!(host.get("file")[RANGE as usize], b'x');
        guest.write(node, fh, 0, &pattern(65_536)).unwrap();
        for at in (65_536..cut).step_by(65_536) {
            let end = cut.min(at + 65_536);
            guest.write(node, fh, at, &pattern(end)[at as usize..]).unwrap();
        }
    }
    guest.vmm.check();
}

/// Shows that a read grant becomes a write grant, and back, without a message to the front-end.
#[test]
fn an_upgrade_sends_nothing() {
    let host = FsHost::new();
    host.put("file", &pattern(2 * RANGE));
    let mut guest = host.boot();
    let node = guest.node("file");
    guest.setup(node, RANGE, RANGE, MAP_READ, 0).unwrap();
    let sent = guest.vmm.map_requests() + guest.vmm.unmap_requests();
    for flags in [BOTH, BOTH, MAP_READ, BOTH] {
        guest.setup(node, RANGE, RANGE, flags, 0).unwrap();
        assert_eq!(guest.vmm.map_requests() + guest.vmm.unmap_requests(), sent);
    }
    assert!(guest.vmm.store(5, b"upgraded"));
    assert_eq!(&host.get("file")[RANGE as usize + 5..][..8], b"upgraded");
    guest.remove(&[(0, RANGE)]).unwrap();
    assert_eq!(guest.vmm.mapped_bytes(), 0);
}

/// Shows that one file can be granted in two ranges, that both show it, and that a range reused for
/// another file shows that file.
#[test]
fn one_file_twice_and_one_range_twice() {
    let host = FsHost::new();
    host.put("a", &pattern(RANGE));
    host.put("b", &vec![b'b'; RANGE as usize]);
    let mut guest = host.boot();
    let (a, b) = (guest.node("a"), guest.node("b"));
    guest.setup(a, 0, RANGE, BOTH, 0).unwrap();
    guest.setup(a, 0, RANGE, MAP_READ, 7 * RANGE).unwrap();
    assert!(guest.vmm.store(123, b"both"));
    assert_eq!(guest.vmm.fetch(7 * RANGE + 123, 4).unwrap(), b"both");
    guest.remove(&[(0, RANGE)]).unwrap();
    assert_eq!(guest.vmm.fetch(7 * RANGE + 123, 4).unwrap(), b"both");
    guest.setup(b, 0, RANGE, BOTH, 0).unwrap();
    assert_eq!(guest.vmm.fetch(0, 2).unwrap(), b"bb");
    // A file without a name is still a file.
    guest.unlink("a").unwrap();
    assert_eq!(guest.vmm.fetch(7 * RANGE + 123, 4).unwrap(), b"both");
    guest.remove(&[(0, RANGE), (7 * RANGE, RANGE)]).unwrap();
    assert_eq!(guest.vmm.mapped_bytes(), 0);
}
