// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the strict front-end of `testkit`: for each rule of QEMU (docs/front-ends.md), a
//! back-end that breaks it.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use tempfile::TempDir;
use testkit::HANG;
use testkit::bad_backend::BadBackend;
use testkit::driver::{Driver, DriverOptions};
use testkit::machine::{BASELINE_REGIONS, MAX_REGIONS};
use testkit::memory::guest_ram;
use testkit::strict_vmm::{StrictVmm, VmmOptions};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

const PAGE: u64 = 4096;
const WINDOW: u64 = 4 << 20;

/// A strict front-end, connected to a back-end that breaks rules. The front-end is dropped first.
struct Bench {
    vmm: StrictVmm,
    driver: Driver,
    bad: BadBackend,
    file: File,
    dir: TempDir,
}

fn bench(more: Protocol, ram_regions: u64) -> Bench {
    bench_with(more, ram_regions, HANG / 2)
}

fn bench_with(more: Protocol, ram_regions: u64, reply_deadline: Duration) -> Bench {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(WINDOW).unwrap();
    let bad = BadBackend::new(dir.path(), WINDOW, more);
    let ram = guest_ram(ram_regions);
    let options = VmmOptions { reply_deadline, ..VmmOptions::default() };
    let vmm = StrictVmm::connect(bad.path(), &ram, options).unwrap();
    let driver = Driver::new(ram, DriverOptions::default());
    Bench { vmm, driver, bad, file, dir }
}

fn plain() -> Bench {
    let mut bench = bench(Protocol::empty(), 1);
    bench.vmm.start(&mut bench.driver);
    bench
}

fn assert_violation(vmm: &StrictVmm, words: &[&str]) {
    let violations = vmm.take_violations();
    let hit = violations.iter().any(|v| words.iter().all(|word| v.contains(word)));
    assert!(hit, "expected {words:?} in {violations:?}");
}

fn assert_refused(vmm: &StrictVmm, words: &[&str]) {
    let refused = vmm.refused();
    let hit = refused.iter().any(|r| words.iter().all(|word| r.contains(word)));
    assert!(hit, "expected {words:?} in {refused:?}");
}

/// Shows that maps and unmaps that keep the rules are accepted, and that stores reach the
/// back-end's file.
#[test]
fn a_well_behaved_back_end_passes() {
    let b = plain();
    b.bad.map(&b.file, PAGE, 0, PAGE).unwrap();
    assert!(b.vmm.store(8, b"through"));
    assert_eq!(testkit::strict_vmm::file_bytes(&b.file, PAGE + 8, 7), b"through");
    b.bad.unmap(0, PAGE).unwrap();
    assert!(!b.vmm.store(8, b"into nothing"));
    assert!(b.vmm.refused().is_empty());
}

/// Q1: shows that a map before the first start is a violation.
#[test]
fn q1_map_before_the_start_is_a_segfault() {
    let b = bench(Protocol::empty(), 1);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap_err();
    assert_violation(&b.vmm, &["Q1", "QEMU would segfault"]);
}

/// Q1: shows that an unmap after the stop is a violation.
#[test]
fn q1_unmap_after_the_stop_is_a_segfault() {
    let mut b = plain();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.vmm.stop();
    b.bad.unmap(0, PAGE).unwrap_err();
    assert_violation(&b.vmm, &["Q1", "QEMU would segfault", "UNMAP"]);
}

/// Shows that the front-end panics on drop if it has a violation that the test has not taken.
#[test]
#[should_panic(expected = "QEMU would segfault")]
fn a_violation_that_is_not_looked_at_panics_on_drop() {
    let b = bench(Protocol::empty(), 1);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap_err();
}

/// Q2: shows that the map of the 513rd region is a violation, and that 512 regions are accepted.
#[test]
fn q2_more_than_512_regions_is_an_abort() {
    let mut b = bench(Protocol::CONFIGURE_MEM_SLOTS, 2);
    b.vmm.start(&mut b.driver);
    let fit = MAX_REGIONS as u64 - 2;
    for i in 0..fit {
        b.bad.map(&b.file, i * PAGE, i * PAGE, PAGE).unwrap();
    }
    b.vmm.check();
    b.bad.map(&b.file, fit * PAGE, fit * PAGE, PAGE).unwrap_err();
    assert_violation(&b.vmm, &["Q2", "QEMU would abort"]);
}

/// Q3: shows that a map under a lock that the memory update needs is a violation (deadlock).
#[test]
fn q3_waiting_for_the_ack_under_the_update_lock_is_a_deadlock() {
    // A short deadline, since the answer never comes.
    let mut b = bench_with(Protocol::empty(), 1, Duration::from_millis(200));
    b.vmm.start(&mut b.driver);
    let held = b.bad.hold_memory_updates();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap_err();
    assert_violation(&b.vmm, &["Q3", "deadlock", "SET_MEM_TABLE"]);
    drop(held);
}

/// Q3: shows that the front-end's memory update is answered before its ack comes.
#[test]
fn q3_the_memory_update_comes_before_the_ack() {
    let b = plain();
    let before = b.vmm.table_updates();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    assert_eq!(b.vmm.table_updates(), before + 1);
    b.bad.unmap(0, PAGE).unwrap();
    assert_eq!(b.vmm.table_updates(), before + 2);
}

/// Q4: shows that a map that overlaps a live one is refused, and a map next to a live one is
/// accepted.
#[test]
fn q4_overlap_is_refused() {
    let b = plain();
    b.bad.map(&b.file, 0, PAGE, 2 * PAGE).unwrap();
    b.bad.map(&b.file, 0, 0, 2 * PAGE).unwrap_err();
    b.bad.map(&b.file, 0, 2 * PAGE, PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q4", "overlap"]);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.bad.map(&b.file, 0, 3 * PAGE, PAGE).unwrap();
    assert_eq!(b.vmm.live_maps(), 3);
}

/// Q5: shows that an unmap must describe one earlier map exactly, and that a map past the end of
/// the window is refused.
#[test]
fn q5_unmap_of_anything_else_is_refused() {
    let b = plain();
    b.bad.map(&b.file, 0, 0, 2 * PAGE).unwrap();
    b.bad.map(&b.file, 2 * PAGE, 2 * PAGE, PAGE).unwrap();
    for (at, bytes) in [(0, PAGE), (PAGE, PAGE), (0, 3 * PAGE), (8 * PAGE, PAGE)] {
        b.bad.unmap(at, bytes).unwrap_err();
    }
    assert_refused(&b.vmm, &["Q5", "not found"]);
    assert_eq!(b.vmm.live_maps(), 2);
    b.bad.map(&b.file, 0, WINDOW - PAGE, 2 * PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q5", "Bad offset/len"]);
    b.bad.unmap(0, 2 * PAGE).unwrap();
}

/// Q6: shows that a map past the end of the file is refused.
#[test]
fn q6_map_past_the_end_of_the_file_is_refused() {
    let b = plain();
    b.file.set_len(5000).unwrap();
    b.bad.map(&b.file, 0, 0, 2 * PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q6", "too small"]);
    assert_eq!(b.vmm.live_maps(), 0);
}

/// Q6: shows that a map that begins at or behind the end of the file is a violation. QEMU accepts
/// it, and extends an empty file for it.
#[test]
fn q6_map_behind_the_end_of_the_file_is_seen() {
    for len in [0, PAGE] {
        let b = plain();
        b.file.set_len(len).unwrap();
        b.bad.map(&b.file, PAGE, 0, PAGE).unwrap_err();
        assert_violation(&b.vmm, &["Q6", "of a file of"]);
    }
}

/// Q8: shows that a map from a descriptor opened for reading only is refused.
#[test]
fn q8_map_from_a_read_only_descriptor_is_refused() {
    let b = plain();
    let read_only = File::open(b.dir.path().join("file")).unwrap();
    b.bad.map(&read_only, 0, 0, PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q8", "Permission denied"]);
}

/// Q10: shows that a pause keeps the maps: a map that is sent again is refused as an overlap.
#[test]
fn q10_a_pause_keeps_the_maps() {
    let mut b = plain();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.vmm.stop();
    b.vmm.start(&mut b.driver);
    assert!(b.vmm.store(0, b"mapped"));
    b.bad.map(&b.file, 0, 0, PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q4"]);
}

/// Q10: shows that a reset drops the maps without a message: an unmap is refused as not found, and
/// a store of the guest fails.
#[test]
fn q10_a_reset_drops_the_maps() {
    let mut b = plain();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.vmm.reset();
    b.driver.reset(b.driver.options());
    b.vmm.start(&mut b.driver);
    assert!(!b.vmm.store(0, b"lost"));
    b.bad.unmap(0, PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q5", "not found"]);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
}

/// Q12: shows that with CONFIGURE_MEM_SLOTS a start after a reset with live maps is a violation
/// (QEMU would crash).
#[test]
fn q12_reset_with_live_maps_and_mem_slots_is_a_segfault() {
    let mut b = bench(Protocol::CONFIGURE_MEM_SLOTS, 1);
    b.vmm.start(&mut b.driver);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.vmm.reset();
    b.driver.reset(b.driver.options());
    assert!(b.vmm.try_start(&mut b.driver).is_err());
    assert_violation(&b.vmm, &["Q12", "QEMU would segfault"]);
}

/// Q12: shows that a start works if the back-end has removed its maps before the reset.
#[test]
fn q12_reset_without_live_maps_is_safe() {
    let mut b = bench(Protocol::CONFIGURE_MEM_SLOTS, 1);
    b.vmm.start(&mut b.driver);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.bad.unmap(0, PAGE).unwrap();
    b.vmm.reboot(&mut b.driver);
}

/// Q13: shows that a start with more than 8 regions fails without CONFIGURE_MEM_SLOTS, and works
/// with it.
#[test]
fn q13_start_with_more_than_8_regions() {
    for (more, expected) in [(Protocol::empty(), Err(105)), (Protocol::CONFIGURE_MEM_SLOTS, Ok(()))]
    {
        let mut b = bench(more, BASELINE_REGIONS as u64);
        b.vmm.start(&mut b.driver);
        b.bad.map(&b.file, 0, 0, PAGE).unwrap();
        b.vmm.stop();
        assert_eq!(b.vmm.try_start(&mut b.driver), expected);
    }
}

/// Q17: shows that with CONFIGURE_MEM_SLOTS a start sends only the regions that were added or
/// removed since the stop, so none after a pause; and that without it a start sends the whole
/// table.
#[test]
fn q17_a_start_sends_what_has_changed() {
    let mut b = bench(Protocol::CONFIGURE_MEM_SLOTS, 3);
    b.vmm.start(&mut b.driver);
    assert_eq!(b.vmm.memory_messages(), 3, "each region of RAM, once");
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    assert_eq!(b.vmm.memory_messages(), 4);
    for _ in 0..3 {
        b.vmm.stop();
        b.vmm.start(&mut b.driver);
    }
    assert_eq!(b.vmm.memory_messages(), 4);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap_err();
    assert_refused(&b.vmm, &["Q4", "overlap"]);
    b.vmm.hide_rings(true);
    b.vmm.update_memory().unwrap();
    b.vmm.stop();
    b.vmm.hide_rings(false);
    b.vmm.start(&mut b.driver);
    assert_eq!(b.vmm.memory_messages(), 6, "a region was removed, and added at the start");

    let mut b = plain();
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    assert_eq!(b.vmm.memory_messages(), 2);
    b.vmm.stop();
    b.vmm.start(&mut b.driver);
    assert_eq!(b.vmm.memory_messages(), 3);
}

/// Q12: shows that a start right after the reset removes the map's region from the table, and that
/// a later start is a violation again.
#[test]
fn q12_a_start_at_once_removes_the_maps_region() {
    let mut b = bench(Protocol::CONFIGURE_MEM_SLOTS, 1);
    b.vmm.start(&mut b.driver);
    b.vmm.start_at_once(true);
    for _ in 0..3 {
        b.bad.map(&b.file, 0, 0, PAGE).unwrap();
        let before = b.vmm.memory_messages();
        b.vmm.reset();
        b.driver.reset(b.driver.options());
        b.vmm.start(&mut b.driver);
        assert_eq!(b.vmm.memory_messages(), before + 1);
    }
    b.vmm.start_at_once(false);
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    b.vmm.reset();
    b.driver.reset(b.driver.options());
    assert!(b.vmm.try_start(&mut b.driver).is_err());
    assert_violation(&b.vmm, &["Q12", "QEMU would segfault"]);
}

/// A message of the back-end: a header, then the u64 words of its body.
fn message(request: u32, flags: u32, body: &[u64]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [request, 1 | flags, body.len() as u32 * 8] {
        bytes.extend_from_slice(&word.to_ne_bytes());
    }
    body.iter().for_each(|word| bytes.extend_from_slice(&word.to_ne_bytes()));
    bytes
}

const SHMEM_MAP: u32 = 9;
const NEED_REPLY: u32 = 1 << 3;

/// Shows that a map whose first byte comes alone, with the descriptor, is carried out once the rest
/// has come.
#[test]
fn a_message_in_two_pieces_is_one_message() {
    let mut b = bench(Protocol::REPLY_ACK, 1);
    b.vmm.start(&mut b.driver);
    let mut channel = b.vmm.play_back_end();
    let map = message(SHMEM_MAP, NEED_REPLY, &[0, 0, 0, PAGE, 1]);
    channel.send_with_fd(&map[..1], b.file.as_raw_fd()).unwrap();
    assert_eq!(b.vmm.live_maps(), 0);
    channel.write_all(&map[1..]).unwrap();
    let mut reply = [0u8; 20];
    channel.read_exact(&mut reply).unwrap();
    assert_eq!(reply, *message(SHMEM_MAP, 1 << 2, &[0]));
    assert_eq!(b.vmm.live_maps(), 1);
}

/// Shows that a message without its rest is a violation: QEMU would wait for it forever.
#[test]
fn half_a_message_is_a_hang() {
    let mut b = bench_with(Protocol::empty(), 1, Duration::from_millis(200));
    b.vmm.start(&mut b.driver);
    b.vmm.play_back_end().write_all(&[9]).unwrap();
    testkit::eventually("the front-end to give up", || {
        b.vmm.take_violations().iter().any(|v| v.contains("half a message"))
    });
}

/// Shows that a request with an unknown number is skipped, and the next one is served.
#[test]
fn an_unknown_request_is_skipped() {
    let mut b = bench(Protocol::REPLY_ACK, 1);
    b.vmm.start(&mut b.driver);
    let mut channel = b.vmm.play_back_end();
    channel.write_all(&message(4711, 0, &[])).unwrap();
    channel.write_all(&message(4712, 0, &[1, 2, 3])).unwrap();
    channel.write_all(&message(4713, NEED_REPLY, &[])).unwrap();
    let mut reply = [0u8; 20];
    channel.read_exact(&mut reply).unwrap();
    assert_eq!(reply, *message(4713, 1 << 2, &[1]), "an unknown request is a failure");
    b.bad.map(&b.file, 0, 0, PAGE).unwrap();
    assert_eq!((b.vmm.unknown_requests(), b.vmm.live_maps()), (3, 1));
}

/// Shows that loads and stores of the window can cross from one map to the next.
#[test]
fn loads_and_stores_cross_maps() {
    let b = plain();
    b.bad.map(&b.file, 4 * PAGE, 0, PAGE).unwrap();
    b.bad.map(&b.file, 0, PAGE, PAGE).unwrap();
    assert!(b.vmm.store(PAGE - 2, b"abcd"));
    assert_eq!(b.vmm.fetch(PAGE - 2, 4).unwrap(), b"abcd");
    assert_eq!(testkit::strict_vmm::file_bytes(&b.file, 5 * PAGE - 2, 2), b"ab");
    assert_eq!(testkit::strict_vmm::file_bytes(&b.file, 0, 2), b"cd");
    assert!(b.vmm.fetch(2 * PAGE - 2, 4).is_none());
}
