// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that many requests at one time, on several queues, for the same files and the same ranges
//! of the window, are all answered. Afterwards the daemon still works and the window is empty.

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, Pending, Reply};
use testkit::fuse_abi::{self as abi, Arg, MAP_READ, MAP_WRITE, op};

const BOTH: u64 = MAP_READ | MAP_WRITE;
const QUEUES: usize = 4;
const PLACES: u64 = 6;
const ROUNDS: u64 = 150;
const AT_ONCE: u64 = 40;

/// A request chosen by `number`, for one of `files` (node id, handle).
fn any_request(guest: &mut FsGuest, files: &[(u64, u64)], number: u64) -> (Pending, Vec<i32>) {
    let (node, fh) = files[(number / 7 % files.len() as u64) as usize];
    let (other, other_fh) = files[(number / 11 % files.len() as u64) as usize];
    let place = number / 3 % PLACES * RANGE;
    let from = number / 5 % 3 * RANGE;
    let flags = if number.is_multiple_of(2) { MAP_READ } else { BOTH };
    // Maps behind the end of a file that was truncated meanwhile; two grants of one range.
    let past: Vec<i32> = vec![libc::EINVAL, libc::ENXIO, libc::EFAULT, libc::EEXIST, libc::EBUSY];
    let size = number % 5 * RANGE / 2 + number % 3;
    match number % 13 {
        0..5 => (guest.send_setup(node, from, RANGE, flags, place), past),
        5..8 => {
            let arg = abi::removemapping(&[(place, RANGE)]);
            (guest.send(op::REMOVEMAPPING, 0, &arg, 0), past)
        }
        8 => (guest.send(op::SETATTR, node, &abi::set_size(size), abi::ATTR_OUT), vec![]),
        9 => {
            let data = [number as u8; 3000];
            let arg = abi::write(fh, number % (5 << 20), 3000);
            (guest.send_with(op::WRITE, node, &[&arg.0, &data], 8, &[], &[]), vec![])
        }
        10 => (guest.send(op::READ, node, &abi::read(fh, from, 4096), 4096), vec![]),
        11 => (guest.send_fsync(node, fh), vec![]),
        _ => {
            let arg = abi::copy_file_range((fh, 0), (other, other_fh, 5 << 20), 4096);
            let same = vec![libc::EINVAL];
            (guest.send(op::COPY_FILE_RANGE, node, &arg, 8), same)
        }
    }
}

fn stress(mem_slots: bool) {
    let options = FsOptions { request_queues: QUEUES, mem_slots, ..FsOptions::default() };
    let host = FsHost::with(options);
    let names = ["a", "b", "c"];
    names.iter().for_each(|name| host.put(name, &vec![1; 2 * RANGE as usize + 5]));
    let mut guest = host.boot();
    let files: Vec<_> = names.iter().map(|name| guest.opened(name)).collect();
    let mut seed = 1u64;
    for round in 0..ROUNDS {
        let mut sent = Vec::new();
        for i in 0..AT_ONCE {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            guest.on = FIRST + (i as usize) % QUEUES;
            sent.push((seed >> 20, any_request(&mut guest, &files, seed >> 20)));
        }
        for (number, (pending, allowed)) in sent {
            match guest.reply(pending) {
                Reply::Ok(_) => {}
                Reply::Error(errno) => {
                    assert!(allowed.contains(&errno), "round {round}, {number}: errno {errno}");
                }
                Reply::Returned => panic!("round {round}, {number}: no answer"),
            }
        }
        guest.vmm.check();
        if round % 50 == 49 {
            guest.vmm.stop();
            guest.start();
        }
    }
    guest.on = FIRST;
    let places: Vec<_> = (0..PLACES).map(|i| (i * RANGE, RANGE)).collect();
    guest.remove(&places).unwrap();
    assert_eq!(guest.vmm.mapped_bytes(), 0, "a grant could not be removed");
    assert_eq!(guest.vmm.refused(), [""; 0], "the front-end had to refuse");
    let (node, _fh) = files[0];
    guest.set_size(node, RANGE).unwrap();
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"still alive"));
    assert_eq!(&host.get("a")[..11], b"still alive");
    assert_eq!(guest.call(op::STATFS, abi::ROOT, &Arg::new(), 80).unwrap().len(), 80);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows it with memory slots.
#[test]
fn many_at_once() {
    stress(true);
}

/// Shows it without memory slots.
#[test]
fn many_at_once_without_memory_slots() {
    stress(false);
}
