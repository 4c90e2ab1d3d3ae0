// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon against the strict front-end: sessions, the window, and each of QEMU's rules.

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

/// What every session that kept the rules looks like.
fn assert_nothing_refused(guest: &Guest) {
    let refused = guest.vmm.refused();
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(guest.vmm.unmap_requests(), 0);
}

/// Shows which features are offered: no CONFIGURE_MEM_SLOTS (Q12), no STATUS, no RESET_DEVICE.
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

/// Shows the config space (le64 0, le64 size) and the window's size.
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

/// Shows that one map is sent at the start, and that stores through the window land in the file.
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

/// Q1: shows that nothing is mapped before the start, whatever is asked before it.
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

/// Q1: shows that no request reaches a stopped device, over many starts and stops once mapped.
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

/// Q1: shows that a stop right behind the start is crossed by no map, and that the device works on.
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
    // The map of one start may find that the next start has come, whose own map then meets it.
    let refused = guest.vmm.refused();
    assert!(refused.iter().all(|r| r.starts_with("Q4")), "{refused:?}");
    assert_eq!(guest.vmm.unmap_requests(), 0);
    guest.power_off();
}

/// Shows that a front-end which hangs up but keeps the back-end channel, with a request unread in
/// it or unanswered, is in no later one's way.
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

    // Without SHARED_OBJECT the library sends the map.
    let mut kept = Vec::new();
    for lacks in [Protocol::empty(), Protocol::SHARED_OBJECT] {
        let options = VmmOptions { lacks, ..VmmOptions::default() };
        let mut mute = host.plug_with(DriverOptions::default(), options, guest_ram(1));
        mute.start();
        // The answer comes after the daemon has read the ack of the first map.
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

    // The same, perhaps before it even said whether it acks.
    let mut early = host.plug();
    early.vmm.turn_deaf();
    early.start();
    early.vmm.hang_up();
    early.session.ended().unwrap();

    let mut last = host.boot();
    assert_eq!(last.driver.flush_and_wait(), Answer::OK);
    last.power_off();
}

/// Shows that all regions together are a power of two, or QEMU aborts at start (pci_register_bar);
/// the guest's region is the file's size all the same.
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

/// Q2: shows that one device has one map, however often the guest comes back.
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

/// Q3: shows that the memory update inside a map is answered while the daemon waits for the
/// ack, also when the disk hangs and other updates come.
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
    let _ = flush; // The reset took it away.
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.power_off();
}

/// Q4, Q10: shows that a pause keeps the map: no request is sent, and the device goes on.
#[test]
fn q4_q10_pause_keeps_the_map() {
    let host = Host::new();
    let mut guest = host.boot();
    for round in 0..20u8 {
        guest.vmm.stop();
        guest.start();
        assert!(guest.vmm.store(0, &[round]));
        // Answered only when the daemon has settled the window: a map would have come before.
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(host.file_bytes(0, 1), [round]);
    }
    assert_eq!(guest.vmm.map_requests(), 1);
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Shows that pauses and resets right behind an answer leave a working ring, with more guests than
/// processors. (It seldom meets the race in vhost-user-backend's kick handling, where the new
/// start's kick is read for an event of the old one; that needs a test of its own on the vring.)
#[test]
fn pauses_and_resets_under_load() {
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let host = Host::new();
                let mut guest = host.boot();
                for round in 0..300 {
                    guest.vmm.stop();
                    // Every other time a reset, after which another thread takes the first flush.
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

/// Q5: shows that the daemon unmaps nothing that is not mapped, in a whole life of a guest.
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

/// Q6, Q8: shows that the map ends where the file ends and comes from a read-write descriptor.
#[test]
fn q6_q8_the_map_fits_the_file_and_is_writable() {
    let host = Host::new();
    let guest = host.boot();
    assert!(guest.vmm.store(FILE_BYTES - 1, b"x"));
    assert!(!guest.vmm.store(FILE_BYTES, b"x"));
    assert_nothing_refused(&guest);
    guest.power_off();
}

/// Q10, Q12: shows that a reset, after which nothing is mapped, gets its map again, 20 times.
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

/// Q13: shows that pause and continue work up to the 8 regions that one memory table holds.
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

/// Q13: shows that a ninth region costs the pause (QEMU's error 105), but neither map nor flush.
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

/// Shows that drivers of any kind can follow each other on one device, as a rebind does.
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

/// Shows that the ring's indices wrap: more flushes than 16 bits count, over many pauses.
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
    // The daemon may cut the connection at once or in the middle of the start.
    let _ = guest.vmm.try_start(&mut guest.driver);
    let Guest { vmm, session, .. } = guest;
    match session.ended() {
        Err(SessionError::Refused(line)) => {
            for words in ["QEMU 11.1", "-device vhost-user-test-device-pci", name] {
                assert!(line.contains(words), "{words:?} is not in {line:?}");
            }
        }
        other => panic!("not refused for want of {name}: {other:?}"),
    }
    vmm.check();
}

/// Shows that a front-end without SHMEM is refused with a line that says what to use.
#[test]
fn front_end_without_shmem_is_refused() {
    assert_refused(&Host::new(), Protocol::SHMEM, "SHMEM");
}

/// Shows the same for REPLY_ACK; again and again, since what the daemon sees is a race.
#[test]
fn front_end_without_reply_ack_is_refused() {
    let host = Host::new();
    for _ in 0..30 {
        assert_refused(&host, Protocol::REPLY_ACK, "REPLY_ACK");
    }
}

/// Shows the same for a front-end without a back-end channel.
#[test]
fn front_end_without_back_end_channel_is_refused() {
    assert_refused(&Host::new(), Protocol::BACKEND_REQ, "channel");
}

/// Shows that the same device serves the next front-end after one was refused, and one after that.
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

/// Shows that flushes fail, without a sync, when the map was refused; and work again after a
/// reset at which it was not.
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

/// Q4: shows that a refusal for overlap means "still mapped" when the memory table shows the file.
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

/// Shows that a refusal is a failure when no table shows the file.
#[test]
fn refused_overlap_without_the_file_in_the_table_fails() {
    let host = Host::new();
    let mut guest = host.boot();
    // Behind the answer to the first map.
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.vmm.hide_maps_at_start(false);
    guest.vmm.stop();
    guest.start();
    assert_eq!(guest.driver.flush_and_wait(), Answer::FAILED);
    guest.power_off();
}

/// Shows that flushes stay in the ring until the window is up, then are answered.
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

/// Shows that a memory table without the rings harms nobody but that session's guest.
#[test]
fn memory_table_without_the_rings() {
    let host = Host::new();
    let two = || guest_ram(2);
    let mut guest = host.plug_with(DriverOptions::default(), VmmOptions::default(), two());
    guest.vmm.hide_rings(true);
    assert!(guest.vmm.try_start(&mut guest.driver).is_err());
    drop(guest.vmm);
    let _ = guest.session.ended();

    // The same while the device runs: its ring can't be read until the memory is back.
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

/// Shows that a front-end which goes in the middle of anything ends the session well.
#[test]
fn front_end_that_goes_at_any_step() {
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
