// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows when a pmem device believes that its window shows the file: after pauses and resets of
//! which the front-end tells much, little or nothing, with other devices beside it, and where the
//! guest moves the window.

use testkit::Host;
use testkit::driver::{Answer, DriverOptions};
use testkit::memory::{GuestMem, RAM_REGION_BYTES, guest_ram};
use testkit::strict_vmm::VmmOptions;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

/// A VM that is paused goes on without a memory table that says so again: its map is where it was.
#[test]
fn a_pause_behind_which_no_table_comes() {
    let host = Host::new();
    let mut guest = host.boot();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.start_untold();
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK, "the map is still there");
    guest.power_off();
}

/// The same of pmem, where the table of the start shows the map, also if the guest has moved the
/// BAR meanwhile.
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
    assert!(failed.is_empty(), "the file is shown, and the flush fails: {failed:#?}");
}

/// A guest that moves the BAR of a running pmem device, and is paused then.
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
    assert!(failed.is_empty(), "the file is shown, and the flush fails: {failed:#?}");
}

/// A map that was refused for another reason than that it is there, of a VM in which another device
/// shows the same file: no flush succeeds, since what the guest stores is nowhere.
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
        assert!(!guest.vmm.store(0, &[1]), "there is no window");
        assert_eq!(done, Answer::FAILED, "slots {mem_slots}: a success without a window");
        guest.power_off();
    }
}

/// A driver that has sent no flush is bound anew, the front-end drops the map, and does not say so
/// at the start: no flush succeeds while nothing is mapped.
#[test]
fn a_reset_of_an_unused_ring_that_goes_untold() {
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
    assert!(stored || done == Answer::FAILED, "a success without a window");
    guest.power_off();
}
