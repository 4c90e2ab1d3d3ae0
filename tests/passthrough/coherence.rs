// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A map of a passthrough file shows the pages of the real file.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, UNIX_EPOCH};

use nix::sys::signal::Signal;
use vhost_user_dax::passthrough::CLAIMED_BYTES;

use crate::map::Map;
use crate::places::{self, Place};
use crate::{RANGE_BYTES, among_others, file_here, mount};

const PAGE_BYTES: u64 = 4096;

fn pread(file: &File, from: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    file.read_exact_at(&mut data, from).unwrap();
    data
}

/// Shows, on each file system: a file of 5,000 bytes can be mapped with 2 MiB. The map, pread,
/// pwrite and a map of the real file see the same bytes, also beyond the old end after the file has
/// grown, and after it was cut and has grown again. A store beyond the end raises SIGBUS.
#[test]
fn both_directions_on_each_file_system() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    for place in places::all() {
        let real = place.create("file");
        real.write_all_at(&[3; 5000], 0).unwrap();
        let mut passthrough = mount.open(&real).unwrap_or_else(|e| panic!("{}: {e}", place.name));
        assert_eq!(passthrough.metadata().unwrap().len(), CLAIMED_BYTES);
        assert_eq!(Seek::seek(&mut &*passthrough, SeekFrom::End(0)).unwrap(), CLAIMED_BYTES);
        let map = Map::of(&passthrough, RANGE_BYTES);
        both_directions(&place, &real, &passthrough, &map);
        // The descriptor and the FUSE inode are gone; the map remains.
        passthrough = mount.open(&real).unwrap();
        drop(passthrough);
        map.store(77, b"after");
        assert_eq!(pread(&real, 77, 5), b"after", "{}", place.name);
    }
}

fn both_directions(place: &Place, real: &File, passthrough: &File, map: &Map) {
    let name = place.name;
    let own = Map::of(real, RANGE_BYTES);
    assert_eq!(map.load(0, 5000), [3; 5000], "{name}");
    assert_eq!(
        map.load(5000, 3192),
        [0; 3192],
        "{name}: other bytes than zeros after the end of the file"
    );
    assert_eq!(map.store_kills(2 * PAGE_BYTES), Some(Signal::SIGBUS), "{name}");
    assert_eq!(own.store_kills(2 * PAGE_BYTES), Some(Signal::SIGBUS), "{name}");

    map.store(4990, b"by map");
    assert_eq!(pread(real, 4990, 6), b"by map", "{name}");
    real.write_all_at(b"by pwrite", 10).unwrap();
    assert_eq!(map.load(10, 9), b"by pwrite", "{name}");
    own.store(100, b"by the file's map");
    assert_eq!(map.load(100, 17), b"by the file's map", "{name}");
    assert_eq!(pread(passthrough, 100, 17), b"by the file's map", "{name}");

    // Beyond the old end.
    real.write_all_at(b"grown", 1 << 20).unwrap();
    assert_eq!(map.load(1 << 20, 5), b"grown", "{name}");
    assert_eq!(map.load(5000, 5000), [0; 5000], "{name}");
    map.store((1 << 19) + 1, b"between");
    assert_eq!(pread(real, (1 << 19) + 1, 7), b"between", "{name}");
    assert_eq!(real.metadata().unwrap().len(), (1 << 20) + 5, "{name}");

    // The file is cut, and grows again.
    real.set_len(20).unwrap();
    assert_eq!(map.store_kills(PAGE_BYTES), Some(Signal::SIGBUS), "{name}");
    real.set_len(RANGE_BYTES).unwrap();
    assert_eq!(map.load(10, 20), b"by pwrite\x03\0\0\0\0\0\0\0\0\0\0", "{name}");
    assert_eq!(map.load(1 << 20, 5), [0; 5], "{name}");
    map.store(1 << 20, b"again");
    assert_eq!(pread(real, 1 << 20, 5), b"again", "{name}");
    assert_eq!(own.load(1 << 20, 5), b"again", "{name}");

    // A write(2) to the passthrough descriptor reaches the file, too.
    passthrough.write_all_at(b"by descriptor", 300).unwrap();
    assert_eq!(map.load(300, 13), b"by descriptor", "{name}");
}

/// Shows: for a file that overlayfs copies up at open, the map shows the copy in the upper layer.
#[test]
fn from_an_overlays_lower_layer() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let Ok(place) = places::overlay() else { return };
    let real = place.open("from-below");
    let map = Map::of(&mount.open(&real).unwrap(), RANGE_BYTES);
    assert_eq!(map.load(0, 5000), [7; 5000]);
    map.store(0, b"above");
    assert_eq!(pread(&place.open("from-below"), 0, 5), b"above");
}

/// Shows: two passthrough inodes of one file, of one mount or of two, and a descriptor opened
/// through /proc map the same pages; and the file can be mapped up to the claimed length.
#[test]
fn inodes_of_one_file_share_its_pages() {
    let _others = among_others();
    let (Some(mount), Some(other)) = (mount(), mount()) else { return };
    let real = file_here(5000);
    let (one, two, three) =
        (mount.open(&real).unwrap(), mount.open(&real).unwrap(), other.open(&real).unwrap());
    let anew = format!("/proc/self/fd/{}", one.as_raw_fd());
    let anew = OpenOptions::new().read(true).write(true).open(anew).unwrap();
    let maps = [&*one, &*two, &*three, &anew, &real].map(|file| Map::of(file, RANGE_BYTES));
    for (n, map) in maps.iter().enumerate() {
        map.store(n as u64 * 1000, &[n as u8 + 1; 1000]);
    }
    for map in &maps {
        let data = map.load(0, 5000);
        assert!(data.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at / 1000 + 1));
    }
    let far = Map::at(&one, CLAIMED_BYTES - RANGE_BYTES, RANGE_BYTES);
    assert_eq!(far.store_kills(0), Some(Signal::SIGBUS));
}

/// Shows: bytes stored through the map are on the disk when fdatasync of the real file has
/// returned. The test looks for them in the loop device's image.
#[test]
fn fdatasync_of_the_real_file_makes_stores_durable() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    for mut place in places::all() {
        let Some(mut disk) = place.disk.take() else { continue };
        let real = place.create("file");
        real.set_len(5000).unwrap();
        real.sync_all().unwrap();
        let map = Map::of(&mount.open(&real).unwrap(), RANGE_BYTES);
        let data: Vec<u8> = (0..PAGE_BYTES).map(|n| (n * n % 251) as u8 ^ 0xa5).collect();
        map.store(0, &data);
        real.sync_data().unwrap();
        let mut all = Vec::new();
        disk.read_to_end(&mut all).unwrap();
        let found = all.chunks(PAGE_BYTES as usize).any(|block| block == data);
        assert!(found, "{}: not on the disk", place.name);
    }
}

/// Shows: a store to a hole allocates blocks and changes mtime exactly where a store through a map
/// of the real file does.
#[test]
fn blocks_and_mtime_change_as_with_a_plain_map() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    for place in places::all() {
        let changed = [false, true].map(|passthrough| {
            let real = place.create(if passthrough { "passthrough" } else { "plain" });
            real.set_len(RANGE_BYTES).unwrap();
            let old = UNIX_EPOCH + Duration::from_secs(1_000_000);
            real.set_modified(old).unwrap();
            real.sync_all().unwrap();
            assert_eq!(real.metadata().unwrap().blocks(), 0);
            let map = match passthrough {
                true => Map::of(&mount.open(&real).unwrap(), RANGE_BYTES),
                false => Map::of(&real, RANGE_BYTES),
            };
            map.load(1 << 20, 1);
            map.store(1 << 20, b"x");
            real.sync_data().unwrap();
            let after = real.metadata().unwrap();
            assert!(after.blocks() > 0, "{}", place.name);
            (after.blocks(), after.modified().unwrap() != old)
        });
        assert_eq!(changed[0], changed[1], "{}", place.name);
        if place.name != "tmpfs" {
            assert!(changed[1].1, "{}: mtime has not changed", place.name);
        }
    }
}

/// Shows: on a full file system a store to a hole raises SIGBUS and a store to an allocated block
/// succeeds, as with a map of the real file; when there is space again, a store to a hole succeeds.
#[test]
fn stores_on_a_full_file_system() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let small = [places::ext4(), places::memory("2m")];
    for place in small.map(Result::unwrap) {
        let real = place.create("sparse");
        real.set_len(RANGE_BYTES).unwrap();
        real.write_all_at(&[2; PAGE_BYTES as usize], 0).unwrap();
        let maps = [Map::of(&real, RANGE_BYTES), Map::of(&mount.open(&real).unwrap(), RANGE_BYTES)];
        let filler = place.create("filler");
        let fill = |from: u64| {
            let mut to = from;
            while let Ok(written @ 1..) = filler.write_at(&[1; 4096], to) {
                to += written as u64;
            }
            filler.sync_all().unwrap();
            to
        };
        // A sync frees the blocks that were reserved for metadata and not needed, so the filling is
        // repeated.
        let mut filled = 0;
        while let more @ 1.. = fill(filled) - filled {
            filled += more;
        }
        for map in &maps {
            assert_eq!(map.store_kills(1 << 20), Some(Signal::SIGBUS), "{}", place.name);
            assert_eq!(map.store_kills(0), None, "{}", place.name);
        }
        // A child that another test forks may hold the file for a moment: only a truncation frees
        // the blocks at once.
        filler.set_len(0).unwrap();
        place.remove("filler");
        // ext4 reuses freed blocks only after the journal has committed.
        real.sync_all().unwrap();
        assert_eq!(maps[1].store_kills(1 << 20), None, "{}", place.name);
        assert_eq!(pread(&real, 1 << 20, 1), [1]);
    }
}
