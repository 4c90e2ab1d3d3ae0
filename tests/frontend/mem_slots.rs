// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end that tells of its memory by differences (CONFIGURE_MEM_SLOTS): a start brings no
//! table, and what the last one said still holds (row Q17).

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

/// Stores and flushes: the flush succeeds, and the byte is in the file.
fn works(host: &Host, guest: &mut Guest, byte: u8) {
    assert!(guest.vmm.store(0, &[byte]));
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_eq!(host.file_bytes(0, 1), [byte]);
}

/// Q17: shows that pause after pause the device goes on, though a start tells nothing of memory,
/// and that no map is sent, which QEMU would refuse with a line in its log.
#[test]
fn q17_a_pause_tells_nothing_and_keeps_the_map() {
    for ram_regions in [1, 3, BASELINE_REGIONS as u64 + 4] {
        let host = Host::with_mem_slots();
        let mut guest = boot(&host, ram_regions);
        works(&host, &mut guest, 1);
        let told = guest.vmm.memory_messages();
        for round in 2..22 {
            guest.vmm.stop();
            guest.start();
            works(&host, &mut guest, round);
        }
        assert_eq!(guest.vmm.memory_messages(), told, "a start told of memory");
        assert_eq!(guest.vmm.map_requests(), 1);
        assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
        guest.power_off();
    }
}

/// Q17: shows the same for pauses that meet the first map at any moment.
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

/// Shows that memory which comes and goes beside the window, while the device runs or is paused, is
/// not taken for the window's going.
#[test]
fn other_memory_comes_and_goes() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, 3);
    // A ring that was never used starts where a new one does: then the map is asked for again.
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

/// Q12: shows that a reset which QEMU survives, since the start comes before what it freed is gone,
/// takes the map away: it is made again, and no flush succeeds without it.
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

/// Shows that a front-end which drops the map at a reset, and does not say so at the start, is
/// asked for it again: what it has told is not believed where the driver has begun anew.
#[test]
fn a_reset_that_goes_untold_is_no_loss() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, 2);
    guest.vmm.start_untold();
    for round in 0..10 {
        // A ring that has moved: one that has not can't be told from one that goes on.
        works(&host, &mut guest, round);
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
        guest.start();
        guest.vmm.wait_live(1);
        works(&host, &mut guest, round + 100);
    }
    guest.power_off();
}

/// Q13: shows that more than 8 regions cost no pause.
#[test]
fn q13_pause_works_with_many_regions() {
    let host = Host::with_mem_slots();
    let mut guest = boot(&host, BASELINE_REGIONS as u64 + 2);
    guest.vmm.stop();
    guest.start();
    works(&host, &mut guest, 1);
    guest.power_off();
}

/// Shows `--keep-listening`: front-ends with and without CONFIGURE_MEM_SLOTS follow each other on
/// one pmem device, and what one said of its memory is nothing to the next.
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

/// Shows the same of a share: the second front-end's window shows its own maps only, over pauses
/// too.
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

/// Q12: shows that a share finds its window again after a reset that QEMU survives.
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
