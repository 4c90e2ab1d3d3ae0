// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! When a pmem device treats its window as mapped: after pauses and resets, with and without memory
//! messages of the front-end; with another device that shows the same file; and after the guest has
//! moved the window.

use testkit::Host;
use testkit::driver::{Answer, DriverOptions};
use testkit::memory::{GuestMem, RAM_REGION_BYTES, guest_ram};
use testkit::strict_vmm::VmmOptions;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// Shows that flushes succeed after a pause whose start brings no memory table: the map is kept.
#[test]
fn a_pause_without_a_table_at_the_start() {
    let host = Host::new();
    let mut guest = host.boot();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.start_untold();
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK, "the map was kept");
    guest.power_off();
}

/// Shows that flushes succeed after a reset over which the front-end keeps the map, also if the
/// guest has moved the BAR meanwhile.
#[test]
fn a_pmem_reset_that_keeps_the_map() {
    let mut failed = Vec::new();
    for mem_slots in [false, true] {
        for moves in [false, true] {
            let host = if mem_slots { Host::with_mem_slots() } else { Host::new() };
            let mut guest = host.boot();
            assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
            guest.vmm.keep_maps();
            for round in 0..3 {
                guest.vmm.reset();
                if moves {
                    guest.vmm.move_window();
                }
                guest.driver.reset(guest.driver.options());
                guest.start();
                if guest.driver.flush_and_wait() != Answer::OK {
                    failed.push(format!("slots {mem_slots}, moves {moves}, reset {round}"));
                }
            }
            guest.power_off();
        }
    }
    assert!(failed.is_empty(), "the window shows the file, but the flush fails: {failed:#?}");
}

/// Shows that flushes succeed after pauses of a guest that has moved the BAR of the running
/// device.
#[test]
fn a_pause_of_a_pmem_whose_window_has_moved() {
    let mut failed = Vec::new();
    for mem_slots in [false, true] {
        let host = if mem_slots { Host::with_mem_slots() } else { Host::new() };
        let mut guest = host.boot();
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        guest.vmm.move_window();
        guest.vmm.update_memory().unwrap();
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        for round in 0..3 {
            guest.vmm.stop();
            guest.start();
            if guest.driver.flush_and_wait() != Answer::OK {
                failed.push(format!("slots {mem_slots}, pause {round}"));
            }
        }
        guest.power_off();
    }
    assert!(failed.is_empty(), "the window shows the file, but the flush fails: {failed:#?}");
}

/// Shows that each flush fails if the map was refused, also if another device of the VM shows the
/// same file: the guest's stores do not reach the file.
#[test]
fn a_refusal_beside_another_devices_map_is_no_window() {
    for mem_slots in [false, true] {
        let host = if mem_slots { Host::with_mem_slots() } else { Host::new() };
        let ram = guest_ram(1);
        let rings = ram.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let theirs = FileOffset::new(host.file.try_clone().unwrap(), 0);
        let ram = GuestMem::from_ranges_with_files(&[
            (GuestAddress(0), RAM_REGION_BYTES as usize, Some(FileOffset::new(rings, 0))),
            (GuestAddress(1 << 33), testkit::FILE_BYTES as usize, Some(theirs)),
        ])
        .unwrap();
        let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), ram);
        guest.vmm.refuse_maps(true);
        guest.start();
        let done = guest.driver.flush_and_wait();
        assert!(!guest.vmm.store(0, &[1]), "the window is mapped");
        assert_eq!(done, Answer::FAILED, "slots {mem_slots}: a success without a map");
        guest.power_off();
    }
}

/// Shows that no flush succeeds without a map after this: a driver that has sent no flush is bound
/// again, the front-end drops the map at the reset, and sends no memory message at the start.
#[test]
fn a_reset_of_an_unused_ring_without_a_memory_message() {
    let host = Host::with_mem_slots();
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), guest_ram(2));
    guest.start();
    guest.vmm.wait_live(1);
    guest.vmm.start_untold();
    guest.vmm.reset();
    guest.driver.reset(guest.driver.options());
    guest.start();
    let done = guest.driver.flush_and_wait();
    let stored = guest.vmm.store(0, &[1]);
    assert!(stored || done == Answer::FAILED, "a success without a map");
    guest.power_off();
}
