// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows READ and WRITE whose data lies in the window (a guest's O_DIRECT into a mapped file), with
//! a memory table that lists the window's ranges and with one that does not.

use testkit::fs::{FsHost, FsOptions, RANGE, WINDOW};
use testkit::fuse::{FsGuest, Reply};
use testkit::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op};
use testkit::machine::BASELINE_REGIONS;
use testkit::queue::Extern;

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// Offsets in the window of the first and the second range of the file "window".
const HERE: u64 = 4 * RANGE;
const THERE: u64 = 2 * RANGE;

fn pattern(bytes: u64, salt: u64) -> Vec<u8> {
    (0..bytes).map(|i| (i * 13 + (i >> 8) + salt) as u8).collect()
}

struct Bench {
    guest: FsGuest,
    node: u64,
    fh: u64,
    /// Expected bytes of the file "window".
    shown: Vec<u8>,
    data: Vec<u8>,
    host: FsHost,
}

fn bench(options: FsOptions) -> Bench {
    let host = FsHost::with(options);
    let (shown, data) = (pattern(2 * RANGE, 5), pattern(RANGE, 99));
    host.put("window", &shown);
    host.put("data", &data);
    let mut guest = host.boot();
    let window = guest.node("window");
    guest.setup(window, 0, RANGE, BOTH, HERE).unwrap();
    guest.setup(window, RANGE, RANGE, BOTH, THERE).unwrap();
    let (node, fh) = guest.opened("data");
    Bench { guest, node, fh, shown, data, host }
}

/// Runs the test with memory slots, and without them: once with a memory table that lists both
/// ranges of the window, once with one that has room for the first range only.
fn each_way(test: fn(Bench)) {
    let one_fits = BASELINE_REGIONS as u64 - 1;
    for (mem_slots, ram_regions) in [(true, 1), (false, 1), (false, one_fits)] {
        eprintln!("mem_slots {mem_slots}, {ram_regions} regions of RAM");
        test(bench(FsOptions { mem_slots, ram_regions, ..FsOptions::default() }));
    }
}

impl Bench {
    fn read_to(&mut self, from: u64, places: &[Extern]) -> Reply {
        let size = places.iter().map(|place| place.1).sum();
        let arg = abi::read(self.fh, from, size);
        let pending = self.guest.send_with(op::READ, self.node, &[&arg.0], 0, &[], places);
        self.guest.reply_with_data(pending, size)
    }

    fn write_from(&mut self, to: u64, places: &[Extern]) -> Reply {
        let size = places.iter().map(|place| place.1).sum();
        let arg = abi::write(self.fh, to, size);
        let pending = self.guest.send_with(op::WRITE, self.node, &[&arg.0], 8, places, &[]);
        self.guest.reply(pending)
    }

    /// Compares both files, byte by byte, on the host and through the window.
    fn compare(&self, what: &str) {
        assert!(self.host.get("window") == self.shown, "{what}: the window's file");
        assert!(self.host.get("data") == self.data, "{what}: the data's file");
        let (first, second) = self.shown.split_at(RANGE as usize);
        let bytes = RANGE as usize;
        assert!(self.guest.vmm.fetch(HERE, bytes).unwrap() == first, "{what}: the window");
        assert!(self.guest.vmm.fetch(THERE, bytes).unwrap() == second, "{what}: the window");
        self.guest.vmm.check();
    }

    fn end(self) {
        self.guest.power_off();
        assert!(self.host.ended().success());
    }
}

/// Shows reads into the window: unaligned addresses, several buffers, RAM between them, 1 MiB.
#[test]
fn reads_into_the_window() {
    each_way(|mut b| {
        let odd = FsGuest::in_window(HERE + 3 * 4096 + 17);
        assert_eq!(b.read_to(1000, &[(odd, 10_000)]), Reply::Ok(vec![]));
        b.shown[12_305..22_305].copy_from_slice(&b.data[1000..11_000]);
        b.compare("one piece");

        let ram = b.guest.scratch;
        let pieces =
            [(FsGuest::in_window(HERE), 5), (ram, 100), (FsGuest::in_window(THERE + 4095), 4098)];
        assert_eq!(b.read_to(0, &pieces), Reply::Ok(vec![]));
        b.shown[..5].copy_from_slice(&b.data[..5]);
        assert_eq!(b.guest.peek(ram, 100), b.data[5..105]);
        let at = RANGE as usize + 4095;
        b.shown[at..at + 4098].copy_from_slice(&b.data[105..4203]);
        b.compare("several pieces");

        let half = RANGE as u32 / 2;
        assert_eq!(
            b.read_to(0, &[(FsGuest::in_window(HERE + RANGE / 2), half)]),
            Reply::Ok(vec![])
        );
        let half = half as usize;
        b.shown[half..2 * half].copy_from_slice(&b.data[..half]);
        b.compare("a megabyte");
        b.end();
    });
}

/// Shows writes from the window.
#[test]
fn writes_from_the_window() {
    each_way(|mut b| {
        let odd = FsGuest::in_window(HERE + 2 * 4096 - 3);
        let wrote = |reply: Reply| match reply {
            Reply::Ok(body) => abi::u32_at(&body, 0),
            other => panic!("{other:?}"),
        };
        assert_eq!(wrote(b.write_from(77, &[(odd, 9000)])), 9000);
        let from = 2 * 4096 - 3;
        b.data[77..9077].copy_from_slice(&b.shown[from..from + 9000]);
        b.compare("one piece");

        let ram = b.guest.scratch;
        b.guest.poke(ram, b"from memory");
        let pieces = [
            (ram, 11),
            (FsGuest::in_window(THERE), 4096),
            (FsGuest::in_window(HERE + RANGE - 9), 9),
        ];
        assert_eq!(wrote(b.write_from(20_000, &pieces)), 11 + 4096 + 9);
        b.data[20_000..20_011].copy_from_slice(b"from memory");
        b.data[20_011..24_107].copy_from_slice(&b.shown[RANGE as usize..RANGE as usize + 4096]);
        b.data[24_107..24_116].copy_from_slice(&b.shown[RANGE as usize - 9..RANGE as usize]);
        b.compare("several pieces");
        b.end();
    });
}

/// Shows that a file can be read into its own window.
#[test]
fn a_file_into_its_own_window() {
    each_way(|mut b| {
        (b.node, b.fh) = b.guest.opened("window");
        assert_eq!(b.read_to(RANGE, &[(FsGuest::in_window(HERE + 100), 5000)]), Reply::Ok(vec![]));
        let from = RANGE as usize;
        b.shown.copy_within(from..from + 5000, 100);
        b.compare("into itself");
        let wrote = b.write_from(50_000, &[(FsGuest::in_window(THERE + 8000), 6000)]);
        assert!(matches!(wrote, Reply::Ok(_)), "{wrote:?}");
        b.shown.copy_within(from + 8000..from + 14_000, 50_000);
        b.compare("from itself");
        b.end();
    });
}

/// Shows that a buffer in a part of the window without a grant gets an errno and changes no file,
/// also if a granted part comes before it.
#[test]
fn a_part_without_a_grant() {
    each_way(|mut b| {
        let places = [
            FsGuest::in_window(0),
            FsGuest::in_window(HERE + RANGE),
            FsGuest::in_window(HERE + RANGE - 50),
            FsGuest::in_window(THERE - 50),
            FsGuest::in_window(WINDOW - 50),
            FsGuest::in_window(WINDOW),
        ];
        for place in places {
            let what = format!("{:#x}", place - FsGuest::in_window(0));
            for reply in [b.write_from(0, &[(place, 100)]), b.read_to(0, &[(place, 100)])] {
                let fine =
                    matches!(reply, Reply::Error(libc::EIO | libc::EFAULT) | Reply::Returned);
                assert!(fine, "{what}: {reply:?}");
            }
            assert!(b.host.get("data") == b.data, "{what}");
            // A READ that was refused may have filled the granted part.
            b.shown = b.host.get("window");
            b.compare(&what);
        }
        // A range whose grant was removed is a part without a grant.
        b.guest.remove(&[(HERE, RANGE)]).unwrap();
        let reply = b.write_from(0, &[(FsGuest::in_window(HERE), 100)]);
        assert!(matches!(reply, Reply::Error(_) | Reply::Returned), "{reply:?}");
        assert!(b.host.get("data") == b.data);
        b.end();
    });
}

/// Shows that the daemon never uses a stale memory table: a range whose map has changed since is
/// served by its new map or refused, and so is a range that no table has listed.
#[test]
fn a_stale_table() {
    let all = BASELINE_REGIONS as u64;
    for ram_regions in [all - 2, all - 1, all] {
        let mut b = bench(FsOptions { mem_slots: false, ram_regions, ..FsOptions::default() });
        let new = pattern(RANGE, 200);
        b.host.put("new", &new);
        b.host.put("filler", &new);
        let (node, filler) = (b.guest.node("new"), b.guest.node("filler"));
        for i in 8..16 {
            b.guest.setup(filler, 0, RANGE, BOTH, i * RANGE).unwrap();
        }
        // The front-end sends no further memory table.
        b.guest.remove(&[(HERE, RANGE)]).unwrap();
        b.guest.setup(node, 0, RANGE, BOTH, HERE).unwrap();
        let wrote = b.write_from(0, &[(FsGuest::in_window(HERE + 64), 1000)]);
        match wrote {
            Reply::Ok(_) => b.data[..1000].copy_from_slice(&new[64..1064]),
            other => assert!(matches!(other, Reply::Error(libc::EFAULT | libc::EIO)), "{other:?}"),
        }
        assert!(b.host.get("data") == b.data, "{ram_regions} regions: the old map's bytes");
        let read = b.read_to(5000, &[(FsGuest::in_window(HERE + 4000), 1000)]);
        let mut expected = new.clone();
        match read {
            Reply::Ok(_) => expected[4000..5000].copy_from_slice(&b.data[5000..6000]),
            other => assert!(matches!(other, Reply::Error(libc::EFAULT | libc::EIO)), "{other:?}"),
        }
        assert!(b.host.get("window") == b.shown, "{ram_regions} regions: into the old map");
        assert!(b.host.get("new") == expected, "{ram_regions} regions");
        b.end();
    }
}

/// Lengths of one write(2) from a mapping, in bytes, as Linux sends them: a page, powers of two,
/// odd multiples of a page.
fn lengths() -> Vec<u32> {
    let pages = (0..10).flat_map(|i| [1u32 << i, 3 << i, (5 << i) + 1]).filter(|n| *n <= 512);
    pages.map(|n| n * 4096).collect()
}

/// Shows: a file opened with O_DIRECT, new or existing, takes each write from the window, of one
/// page to 2 MiB; also with --allow-direct-io, with which the host's descriptor has O_DIRECT.
#[test]
fn direct_writes_from_the_window() {
    const MOST: u32 = 1 << 20;
    let direct = libc::O_RDWR | libc::O_DIRECT;
    for extra in [vec![], vec!["--allow-direct-io".to_string()]] {
        let mut b = bench(FsOptions { extra, ..FsOptions::default() });
        for (i, bytes) in lengths().into_iter().enumerate() {
            let name = format!("new{i}");
            let arg = abi::create(&name, direct | libc::O_CREAT, 0o644);
            let made = b.guest.call(op::CREATE, abi::ROOT, &arg, 256).unwrap();
            let old = abi::u64_at(&made, 0);
            let fhs = [abi::u64_at(&made, abi::ENTRY_OUT), b.guest.open(old, direct).unwrap()];
            for fh in fhs {
                (b.node, b.fh) = (old, fh);
                for at in (0..bytes).step_by(MOST as usize) {
                    let now = (bytes - at).min(MOST);
                    let from = FsGuest::in_window(HERE + u64::from(at));
                    let Reply::Ok(body) = b.write_from(at.into(), &[(from, now)]) else {
                        panic!("{bytes} bytes at {at}")
                    };
                    assert_eq!(abi::u32_at(&body, 0), now, "{bytes} bytes");
                }
                assert!(b.host.get(&name) == b.shown[..bytes as usize], "{bytes} bytes");
                b.host.put(&name, b"");
                b.guest.release(old, fh).unwrap();
            }
        }
        b.end();
    }
}

/// Shows: with --allow-direct-io a READ into the window works up to the end of a file of odd
/// length, and into an unaligned buffer.
#[test]
fn direct_reads_into_the_window() {
    let extra = vec!["--allow-direct-io".to_string()];
    let mut b = bench(FsOptions { extra, ..FsOptions::default() });
    b.data.truncate(70_001);
    b.host.put("data", &b.data);
    b.fh = b.guest.open(b.node, libc::O_RDONLY | libc::O_DIRECT).unwrap();
    for (from, to, size) in [(0u64, 0u64, 4096u32), (4096, 4096 + 17, 8192), (65_536, 100, 4096)] {
        let place = (FsGuest::in_window(HERE + to), size);
        assert_eq!(b.read_to(from, &[place]), Reply::Ok(vec![]));
        let (from, to, size) = (from as usize, to as usize, size as usize);
        b.shown[to..to + size].copy_from_slice(&b.data[from..from + size]);
    }
    let end = 69_632; // A page's start.
    let arg = abi::read(b.fh, end as u64, 8192);
    let place = (FsGuest::in_window(HERE + 50), 8192);
    let pending = b.guest.send_with(op::READ, b.node, &[&arg.0], 0, &[], &[place]);
    assert_eq!(b.guest.reply_with_data(pending, 70_001 - end), Reply::Ok(vec![]));
    let (end, left) = (end as usize, 70_001 - end as usize);
    b.shown[50..50 + left].copy_from_slice(&b.data[end..]);
    b.compare("to the end");
    b.end();
}

/// Shows: the last page of a mapped file is mapped as a whole, as by mmap(2): bytes behind the end
/// of the file read as zeros, a READ into them does not lengthen the file, and the next page is
/// EFAULT.
#[test]
fn the_last_page_of_a_file() {
    each_way(|mut b| {
        let last = RANGE - 4096;
        b.host.put("short", &pattern(5000, 7));
        let node = b.guest.node("short");
        b.guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        let Reply::Ok(body) = b.write_from(0, &[(FsGuest::in_window(0), 8192)]) else { panic!() };
        assert_eq!(abi::u32_at(&body, 0), 8192);
        b.data[..5000].copy_from_slice(&pattern(5000, 7));
        b.data[5000..8192].fill(0);
        assert_eq!(b.read_to(last, &[(FsGuest::in_window(4096), 4096)]), Reply::Ok(vec![]));
        let mut short = pattern(5000, 7);
        short[4096..].copy_from_slice(&b.data[last as usize..last as usize + 904]);
        assert_eq!(b.host.get("short"), short);
        for reply in [
            b.write_from(0, &[(FsGuest::in_window(8192), 100)]),
            b.read_to(0, &[(FsGuest::in_window(8192), 100)]),
        ] {
            assert_eq!(reply, Reply::Error(libc::EFAULT));
        }
        b.compare("the last page");
        b.end();
    });
}
