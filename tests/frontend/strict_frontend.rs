// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pmem device with the strict front-end: sessions, the window, and each rule of QEMU
//! (docs/front-ends.md).

use std::thread;

use testkit::driver::{Answer, DriverOptions};
use testkit::machine::BASELINE_REGIONS;
use testkit::memory::guest_ram;
use testkit::strict_vmm::{
    F_EVENT_IDX, F_INDIRECT_DESC, F_PROTOCOL_FEATURES, F_SHMEM_REGION, F_VERSION_1, VmmOptions,
};
use testkit::{FILE_BYTES, Guest, Host};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;
use vhost_user_dax::session::SessionError;

/// Checks that the front-end has refused no request, and got no unmap.
fn assert_nothing_refused(guest: &Guest) {
    let refused = guest.vmm.refused();
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(guest.vmm.unmap_requests(), 0);
}

/// Shows the offered features: without CONFIGURE_MEM_SLOTS (Q12), STATUS and RESET_DEVICE.
#[test]
fn features_are_the_documented_ones() {
    let host = Host::new();
    let guest = host.plug();
    let offer = guest.vmm.offer();
    let expected =
        F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_SHMEM_REGION;
    assert_eq!(offer.features, expected);
    let expected = Protocol::MQ
        | Protocol::CONFIG
        | Protocol::BACKEND_REQ
        | Protocol::BACKEND_SEND_FD
        | Protocol::REPLY_ACK
        | Protocol::SHARED_OBJECT
        | Protocol::SHMEM;
    assert_eq!(offer.protocol, expected);
    assert_eq!(offer.queues, 1);
    guest.kill();
}

/// Shows the config space (le64 0, le64 size in bytes) and the window's size.
#[test]
fn config_space_and_window_size() {
    let host = Host::new();
    let guest = host.plug();
    let mut config = vec![0u8; 8];
    config.extend_from_slice(&FILE_BYTES.to_le_bytes());
    assert_eq!(guest.vmm.offer().config, config);
    assert_eq!(guest.vmm.offer().windows, [FILE_BYTES]);
    guest.kill();
}

/// Shows that one map is sent at the start, and that stores to the window reach the file.
#[test]
fn start_maps_the_whole_file_and_stores_land_in_it() {
    let host = Host::new();
    let mut guest = host.boot();
    assert!(guest.vmm.store(0, b"first"));
    assert!(guest.vmm.store(FILE_BYTES - 4, b"last"));
    assert_eq!(host.file_bytes(0, 5), b"first");
    assert_eq!(host.file_bytes(FILE_BYTES - 4, 4), b"last");
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_eq!(guest.vmm.map_requests(), 1);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q1: shows that no map is sent before the start, also after GET_CONFIG and resets.
#[test]
fn q1_no_map_before_the_start() {
    let host = Host::new();
    let mut guest = host.plug();
    for _ in 0..10 {
        guest.vmm.get_config();
        guest.vmm.reset();
    }
    assert_eq!(guest.vmm.map_requests(), 0);
    guest.start();
    guest.vmm.wait_live(1);
    guest.power_off();
}

/// Q1: shows that no request is sent for a stopped device in many pauses and resets of a device
/// with a map.
#[test]
fn q1_start_and_stop_many_times() {
    let host = Host::new();
    let mut guest = host.boot();
    for _ in 0..100 {
        guest.vmm.stop();
        guest.start();
    }
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    for _ in 0..50 {
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
        guest.start();
        guest.vmm.wait_live(1);
    }
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q1: shows that no map is sent for a stopped device if the stop comes right after the start, and
/// that the device works on.
#[test]
fn q1_stop_right_behind_the_start() {
    let host = Host::new();
    let mut guest = host.boot();
    for _ in 0..200 {
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
        guest.start();
    }
    guest.vmm.wait_live(1);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    // Race: the window thread of one start sends its map only after the next start; the map of the
    // next start's window thread then overlaps it, and is refused.
    let refused = guest.vmm.refused();
    assert!(refused.iter().all(|r| r.starts_with("Q4")), "{refused:?}");
    assert_eq!(guest.vmm.unmap_requests(), 0);
    guest.power_off();
}

/// Shows that later sessions work after a front-end that hangs up and keeps the back-end channel
/// open, with a request in it that is unread or unanswered.
#[test]
fn front_end_that_keeps_its_channel() {
    let host = Host::new();
    let reboot = |guest: &mut testkit::Guest| {
        guest.vmm.reset();
        guest.driver.reset(guest.driver.options());
    };
    let mut deaf = host.boot();
    reboot(&mut deaf);
    deaf.vmm.turn_deaf();
    deaf.start();
    deaf.vmm.wait_unread();
    deaf.vmm.hang_up();
    deaf.session.ended().unwrap();

    // Without SHARED_OBJECT the map is sent through the vhost library.
    let mut kept = Vec::new();
    for lacks in [Protocol::empty(), Protocol::SHARED_OBJECT] {
        let options = VmmOptions { lacks, ..VmmOptions::default() };
        let mut mute = host.plug_with(DriverOptions::default(), options, guest_ram(1));
        mute.start();
        // A flush is answered after the daemon has read the ack of the first map.
        assert_eq!(mute.driver.flush_and_wait(), Answer::OK);
        reboot(&mut mute);
        mute.vmm.hang_in_map();
        let seen = mute.vmm.map_requests();
        mute.start();
        mute.vmm.wait_map_requests(seen + 1);
        mute.vmm.hang_up();
        mute.session.ended().unwrap();
        kept.push(mute.vmm);
    }

    // A front-end that hangs up possibly before it has answered the probe of its acks.
    let mut early = host.plug();
    early.vmm.turn_deaf();
    early.start();
    early.vmm.hang_up();
    early.session.ended().unwrap();

    let mut last = host.boot();
    assert_eq!(last.driver.flush_and_wait(), Answer::OK);
    last.power_off();
}

/// Shows that the lengths of all shared memory regions add up to a power of two, without which QEMU
/// aborts at start (pci_register_bar), and that region 0 has the file's length.
#[test]
fn the_regions_make_a_whole_bar() {
    for (mib, windows) in [(2, vec![2]), (128, vec![128]), (130, vec![130, 126]), (6, vec![6, 2])] {
        let host = Host::with_bytes(mib << 20);
        let guest = host.plug();
        let offered = &guest.vmm.offer().windows;
        assert_eq!(*offered, windows.iter().map(|mib| mib << 20).collect::<Vec<u64>>());
        assert!(offered.iter().sum::<u64>().is_power_of_two());
        guest.kill();
    }
}

/// Q2: shows that the device has one map after each of 20 reboots of the guest.
#[test]
fn q2_one_map_for_one_device() {
    let host = Host::new();
    let mut guest = host.boot();
    for _ in 0..20 {
        guest.vmm.reboot(&mut guest.driver);
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(guest.vmm.live_maps(), 1);
    }
    guest.power_off();
}

/// Q3: shows that the memory update that a map causes is answered while the daemon waits for the
/// map's ack, also during a sync and after other updates.
#[test]
fn q3_memory_updates_are_answered_while_a_map_waits() {
    let host = Host::new();
    let mut guest = host.boot();
    host.gate.hold();
    let flush = guest.driver.flush();
    host.gate.wait_begun(1);
    guest.vmm.update_memory().unwrap();
    guest.vmm.reset();
    guest.driver.reset(guest.driver.options());
    let before = guest.vmm.table_updates();
    guest.start();
    guest.vmm.wait_live(1);
    // One table for the start, one inside the map.
    assert_eq!(guest.vmm.table_updates(), before + 2);
    host.gate.open();
    let _ = flush; // The reset has voided it.
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.power_off();
}

/// Q4, Q10: shows that a pause keeps the map: no request is sent, and the device works on.
#[test]
fn q4_q10_pause_keeps_the_map() {
    let host = Host::new();
    let mut guest = host.boot();
    for round in 0..20u8 {
        guest.vmm.stop();
        guest.start();
        assert!(guest.vmm.store(0, &[round]));
        // A flush is answered only once the window is known to be mapped: a map would have been
        // sent before.
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(host.file_bytes(0, 1), [round]);
    }
    assert_eq!(guest.vmm.map_requests(), 1);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Shows that the ring works after pauses and resets right after an answer, with more guests than
/// processors. (It rarely meets a race in vhost-user-backend: the vring_worker thread handles an
/// event of the old kick descriptor, but reads the kick of the new start. That race has tests on
/// the vring.)
#[test]
fn pauses_and_resets_under_load() {
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let host = Host::new();
                let mut guest = host.boot();
                for round in 0..300 {
                    guest.vmm.stop();
                    // A reset in every other round: then the window thread, and not the
                    // vring_worker, takes the first flush.
                    if round % 2 == 0 {
                        guest.vmm.reset();
                        guest.driver.reset(guest.driver.options());
                    }
                    guest.start();
                    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
                }
                guest.power_off();
            });
        }
    });
}

/// Q5: shows that the daemon sends no unmap during a pause, a reboot and a power-off.
#[test]
fn q5_nothing_is_unmapped_that_is_not_mapped() {
    let host = Host::new();
    let mut guest = host.boot();
    guest.vmm.stop();
    guest.start();
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q6, Q8: shows that the map ends at the end of the file and has a read-write descriptor.
#[test]
fn q6_q8_the_map_fits_the_file_and_is_writable() {
    let host = Host::new();
    let guest = host.boot();
    assert!(guest.vmm.store(FILE_BYTES - 1, b"x"));
    assert!(!guest.vmm.store(FILE_BYTES, b"x"));
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q10, Q12: shows that the map, which each reset drops, is sent again after each of 20 reboots.
#[test]
fn q10_q12_twenty_reboots() {
    let host = Host::new();
    let mut guest = host.boot();
    assert!(!guest.vmm.acked().contains(Protocol::CONFIGURE_MEM_SLOTS));
    for round in 0..20u8 {
        guest.vmm.reboot(&mut guest.driver);
        guest.vmm.wait_live(1);
        assert!(guest.vmm.store(u64::from(round), &[round]));
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    }
    assert_eq!(host.file_bytes(0, 20), (0..20).collect::<Vec<u8>>());
    assert_eq!(guest.vmm.map_requests(), 21);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q13: shows that a pause works with 8 regions, the most that one memory table holds.
#[test]
fn q13_pause_works_with_eight_regions() {
    let host = Host::new();
    let ram = guest_ram(BASELINE_REGIONS as u64 - 1);
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), ram);
    guest.start();
    guest.vmm.wait_live(1);
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q13: shows that with a ninth region the start after a pause fails (QEMU's error 105), and that
/// maps and flushes work before.
#[test]
fn q13_with_nine_regions_the_device_works_until_the_pause() {
    let host = Host::new();
    let ram = guest_ram(BASELINE_REGIONS as u64);
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), ram);
    guest.start();
    guest.vmm.wait_live(1);
    assert!(guest.vmm.store(0, b"mapped"));
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.stop();
    assert_eq!(guest.vmm.try_start(&mut guest.driver), Err(105));
    guest.kill();
}

/// Shows that drivers with different ring sizes and features can follow each other on one device,
/// as after a rebind.
#[test]
fn rebind_with_other_rings_and_features() {
    let host = Host::new();
    let mut guest = host.boot();
    for (size, event_idx, indirect) in [
        (128, true, true),
        (2, false, false),
        (256, true, false),
        (2, false, true),
        (64, true, true),
    ] {
        guest.vmm.reset();
        guest.driver.reset(DriverOptions { size, event_idx, indirect });
        guest.start();
        for _ in 0..300 {
            assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        }
    }
    guest.power_off();
}

/// Shows that the ring's 16-bit indices wrap: 66,560 flushes, with pauses.
#[test]
fn indices_wrap_around() {
    let host = Host::new();
    let mut guest = host.boot();
    for _ in 0..520 {
        let flushes: Vec<_> = (0..128).map(|_| guest.driver.add_flush()).collect();
        guest.driver.kick();
        for flush in flushes {
            assert_eq!(guest.driver.wait(flush), Answer::OK);
        }
        if guest.driver.avail_idx().is_multiple_of(4096) {
            guest.vmm.stop();
            guest.start();
        }
    }
    assert_eq!(host.pmem.counters().flushes, 520 * 128);
    guest.power_off();
}

fn assert_refused(host: &Host, lacks: Protocol, name: &str) {
    let options = VmmOptions { lacks, ..VmmOptions::default() };
    let mut guest = host.plug_with(DriverOptions::default(), options, guest_ram(1));
    // The daemon may close the connection before or during the start.
    let _ = guest.vmm.try_start(&mut guest.driver);
    let Guest { vmm, session, .. } = guest;
    match session.ended() {
        Err(SessionError::Refused(line)) => {
            for words in ["QEMU 11.1", "-device vhost-user-test-device-pci", name] {
                assert!(line.contains(words), "{words:?} is not in {line:?}");
            }
        }
        other => panic!("a front-end without {name} was not refused: {other:?}"),
    }
    vmm.check();
}

/// Shows that a front-end without SHMEM is refused with a line that names the front-end to use.
#[test]
fn front_end_without_shmem_is_refused() {
    assert_refused(&Host::new(), Protocol::SHMEM, "SHMEM");
}

/// Shows that a front-end without REPLY_ACK is refused with such a line. 30 times: how the daemon
/// notices it depends on a race with the front-end's start.
#[test]
fn front_end_without_reply_ack_is_refused() {
    let host = Host::new();
    for _ in 0..30 {
        assert_refused(&host, Protocol::REPLY_ACK, "REPLY_ACK");
    }
}

/// Shows that a front-end without a back-end channel is refused with such a line.
#[test]
fn front_end_without_back_end_channel_is_refused() {
    assert_refused(&Host::new(), Protocol::BACKEND_REQ, "channel");
}

/// Shows that one device serves several sessions after a refused front-end.
#[test]
fn sessions_follow_each_other() {
    let host = Host::new();
    assert_refused(&host, Protocol::SHMEM, "SHMEM");
    for round in 0..5u8 {
        let mut guest = host.boot();
        assert!(guest.vmm.store(0, &[round]));
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        if round % 2 == 0 { guest.power_off() } else { guest.kill() }
    }
    assert_eq!(host.file_bytes(0, 1), [4]);
}

/// Shows that flushes fail without a sync while the map is refused, and succeed after a reset whose
/// map is accepted.
#[test]
fn refused_map_fails_every_flush_until_the_next_start() {
    let host = Host::new();
    let mut guest = host.plug();
    guest.vmm.refuse_maps(true);
    guest.start();
    for _ in 0..3 {
        assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    }
    assert_eq!(host.gate.begun(), 0);
    guest.vmm.refuse_maps(false);
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.power_off();
}

/// Q4: shows that flushes succeed after a map that was refused as an overlap, if the memory table
/// shows the file.
#[test]
fn q4_refused_overlap_with_the_file_in_the_table_is_alive() {
    let host = Host::new();
    let mut guest = host.boot();
    guest.vmm.hide_maps_at_start(true);
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    assert_eq!(guest.vmm.map_requests(), 2);
    guest.power_off();
}

/// Shows that flushes fail after a map that was refused as an overlap, if the memory table does not
/// show the file.
#[test]
fn refused_overlap_without_the_file_in_the_table_fails() {
    let host = Host::new();
    let mut guest = host.boot();
    // A flush first: it is answered after the daemon has read the ack of the first map.
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.hide_maps_at_start(false);
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    guest.power_off();
}

/// Shows that flushes stay in the ring until the window is mapped, and are answered then.
#[test]
fn flushes_offered_before_the_start_wait_for_the_window() {
    let host = Host::new();
    let mut guest = host.plug();
    let flushes: Vec<_> = (0..5).map(|_| guest.driver.add_flush()).collect();
    guest.start();
    for flush in flushes {
        assert_eq!(guest.driver.wait(flush), Answer::OK);
        assert_eq!(guest.vmm.live_maps(), 1);
    }
    guest.power_off();
}

/// Shows that a memory table without the rings fails only that session, and that the ring works
/// again when a table has its memory.
#[test]
fn memory_table_without_the_rings() {
    let host = Host::new();
    let two = || guest_ram(2);
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), two());
    guest.vmm.hide_rings(true);
    assert!(guest.vmm.try_start(&mut guest.driver).is_err());
    drop(guest.vmm);
    let _ = guest.session.ended();

    // While the device runs: its ring can't be read until a table has the ring's memory again.
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), two());
    guest.start();
    guest.vmm.wait_live(1);
    guest.vmm.hide_rings(true);
    guest.vmm.update_memory().unwrap();
    let flush = guest.driver.flush();
    guest.vmm.get_config();
    guest.vmm.hide_rings(false);
    guest.vmm.update_memory().unwrap();
    guest.driver.force_kick();
    assert_eq!(guest.driver.wait(flush), Answer::OK);
    guest.power_off();
}

/// Shows that the session ends without an error, and the next one works, if the front-end closes
/// the connection at any step.
#[test]
fn front_end_that_closes_at_any_step() {
    let host = Host::new();
    drop(std::os::unix::net::UnixStream::connect(host.socket()).unwrap());
    host.serve().ended().unwrap();
    host.plug().kill();
    let mut guest = host.plug();
    guest.start();
    guest.kill();
    let mut guest = host.boot();
    guest.vmm.stop();
    guest.kill();
    host.boot().power_off();
}
