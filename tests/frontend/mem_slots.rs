// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end with CONFIGURE_MEM_SLOTS, which sends its memory table as differences: a start
//! brings no table, and the last table stays valid (docs/front-ends.md Q17).

use testkit::driver::{Answer, DriverOptions};
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::machine::BASELINE_REGIONS;
use testkit::memory::guest_ram;
use testkit::strict_vmm::VmmOptions;
use testkit::{Guest, Host};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

const BOTH: u64 = MAP_READ | MAP_WRITE;

fn boot(host: &Host, ram_regions: u64) -> Guest {
    let ram = guest_ram(ram_regions);
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), ram);
    assert!(guest.vmm.acked().contains(Protocol::CONFIGURE_MEM_SLOTS));
    guest.start();
    guest.vmm.wait_live(1);
    guest
}

/// Stores a byte and flushes, and checks that the flush succeeds and the byte is in the file.
fn works(host: &Host, guest: &mut Guest, byte: u8) {
    assert!(guest.vmm.store(0, &[byte]));
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_eq!(host.file_bytes(0, 1), [byte]);
}

/// Q17: shows that the device works after each of many pauses, although the start sends no memory
/// message, and that it sends no map, which QEMU would refuse with a line in its log.
#[test]
fn q17_a_pause_sends_no_memory_message_and_keeps_the_map() {
    for ram_regions in [1, 3, BASELINE_REGIONS as u64 + 4] {
        let host = Host::with_mem_slots();
        let mut guest = boot(&host, ram_regions);
        works(&host, &mut guest, 1);
        let before = guest.vmm.memory_messages();
        for round in 2..22 {
            guest.vmm.stop();
            guest.start();
            works(&host, &mut guest, round);
        }
        assert_eq!(guest.vmm.memory_messages(), before, "a start sent a memory message");
        assert_eq!(guest.vmm.map_requests(), 1);
        assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
        guest.power_off();
    }
}

/// Q17: shows that the device works after 0 to 39 pauses right after the first start, which meet
/// the first map at different moments.
#[test]
fn q17_pauses_right_behind_the_first_start() {
    for pauses in 0..40 {
        let host = Host::with_mem_slots();
        let ram = guest_ram(2);
        let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), ram);
        guest.start();
        for _ in 0..pauses {
            guest.vmm.stop();
            guest.start();
        }
        guest.vmm.wait_live(1);
        works(&host, &mut guest, 7);
        guest.power_off();
    }
}

/// Shows that the device keeps its map when other memory is removed from the table and added again,
/// while the device runs or is paused.
#[test]
fn other_memory_comes_and_goes() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, 3);
    // A flush first: after a pause of a ring that was never used, the device sends the map again,
    // since it can't be distinguished from a new ring.
    works(&host, &mut guest, 9);
    for round in 0..4 {
        if round % 2 == 0 {
            guest.vmm.stop();
        }
        for hide in [true, false] {
            guest.vmm.hide_rings(hide);
            guest.vmm.update_memory().unwrap();
        }
        if round % 2 == 0 {
            guest.start();
        }
        works(&host, &mut guest, round);
    }
    assert_eq!(guest.vmm.map_requests(), 1);
    guest.power_off();
}

/// Q12: shows that the device sends its map again after a reset that QEMU survives (the start comes
/// within some 50 ms, before QEMU has freed the map's region), and that no flush succeeds without
/// the map.
#[test]
fn q12_a_reset_that_qemu_survives_is_seen() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, 2);
    guest.vmm.start_at_once(true);
    for round in 0..20 {
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
        guest.start();
        guest.vmm.wait_live(1);
        works(&host, &mut guest, round);
        guest.vmm.stop();
        guest.start();
        works(&host, &mut guest, round + 100);
        assert_eq!(guest.vmm.map_requests(), usize::from(round) + 2);
    }
    assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
    guest.power_off();
}

/// Shows that the device sends its map again after a reset at which the front-end drops the map and
/// sends no memory message at the start: the last table is not used for a new driver.
#[test]
fn a_reset_without_a_memory_message_is_no_loss() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, 2);
    guest.vmm.start_untold();
    for round in 0..10 {
        // A flush first: a reset ring whose indices were 0 can't be distinguished from a ring that
        // continues.
        works(&host, &mut guest, round);
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
        guest.start();
        guest.vmm.wait_live(1);
        works(&host, &mut guest, round + 100);
    }
    guest.power_off();
}

/// Q13: shows that a pause works with more than 8 regions.
#[test]
fn q13_pause_works_with_many_regions() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, BASELINE_REGIONS as u64 + 2);
    guest.vmm.stop();
    guest.start();
    works(&host, &mut guest, 1);
    guest.power_off();
}

/// Shows that sessions with and without CONFIGURE_MEM_SLOTS can follow each other on one pmem
/// device (`--keep-listening`): the memory tables of one session have no effect on the next.
#[test]
fn pmem_sessions_follow_each_other() {
    let host = Host::with_mem_slots();
    for round in 0..6 {
        let lacks = match round % 3 {
            2 => Protocol::CONFIGURE_MEM_SLOTS,
            _ => Protocol::empty(),
        };
        let options = VmmOptions { lacks, ..VmmOptions::default() };
        let mut guest = host.plug_with(DriverOptions::default(), options, guest_ram(2));
        guest.start();
        guest.vmm.wait_live(1);
        for pause in 0..3 {
            works(&host, &mut guest, round * 10 + pause);
            guest.vmm.stop();
            guest.start();
        }
        works(&host, &mut guest, round * 10 + 9);
        assert_eq!(guest.vmm.map_requests(), 1);
        if round % 2 == 0 { guest.power_off() } else { guest.kill() }
    }
}

/// Shows that sessions with and without CONFIGURE_MEM_SLOTS can follow each other on one share: the
/// window of each session has only the maps of that session, also after pauses.
#[test]
fn share_sessions_follow_each_other() {
    let host = FsHost::with(FsOptions { keep_listening: true, ..FsOptions::default() });
    host.put("file", &vec![b'f'; 2 * RANGE as usize]);
    for round in 0..4_u8 {
        let lacks = match round {
            2 => Protocol::CONFIGURE_MEM_SLOTS,
            _ => Protocol::empty(),
        };
        let mut guest = host.plug_lacking(lacks);
        guest.start();
        guest.init();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, BOTH, RANGE).unwrap();
        for pause in 0..3 {
            assert!(guest.vmm.store(RANGE, &[round, pause]));
            assert_eq!(guest.fsync(node, fh), Ok(()));
            assert_eq!(host.get("file")[..2], [round, pause]);
            guest.vmm.stop();
            guest.start();
        }
        guest.setup(node, RANGE, RANGE, BOTH, 0).unwrap();
        assert_eq!((guest.vmm.live_maps(), guest.vmm.map_requests()), (2, 2));
        assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
        if round % 2 == 0 {
            guest.vmm.stop();
        } else {
            guest.vmm.kill();
        }
    }
}

/// Q12: shows that maps of a share work after a reset that QEMU survives.
#[test]
fn q12_a_share_after_a_reset_that_qemu_survives() {
    let host = FsHost::new();
    host.put("file", &vec![b'f'; 2 * RANGE as usize]);
    let mut guest = host.boot();
    guest.vmm.start_at_once(true);
    for round in 0..5_u8 {
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        assert!(guest.vmm.store(0, &[round]));
        assert_eq!(guest.fsync(node, fh), Ok(()));
        assert_eq!(host.get("file")[0], round);
        guest.reset();
        guest.init();
    }
    assert_eq!(guest.vmm.live_maps(), 0);
}
