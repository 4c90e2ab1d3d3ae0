// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attacks of a guest, and of another user of the host, in which a request meets another request, a
//! reset, or the end of a mount. A test that fails shows an attack that succeeds.

#![allow(unsafe_code)] // fcntl for leases.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use testkit::eventually;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, Pending};
use testkit::fuse_abi::{self as abi, Arg, ENTRY_OUT, MAP_READ, MAP_WRITE, OPEN_OUT, ROOT, op};
use testkit::slow::{HELD, SYNCS, Strace, skip};

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// Number of rounds of a storm of requests: they take some seconds.
const STORM_ROUNDS: u64 = 300;

fn with(extra: &[&str]) -> FsHost {
    let extra = extra.iter().map(|arg| arg.to_string()).collect();
    FsHost::with(FsOptions { extra, ..FsOptions::default() })
}

fn lookup_of(guest: &mut FsGuest, name: &str) -> Pending {
    guest.send(op::LOOKUP, ROOT, &Arg::new().name(name), ENTRY_OUT)
}

// --- another user of the host: leases ---

/// Takes a read lease on a file that is not open for writing. An open for writing then waits until
/// the lease is released, or for 45 s.
fn lease(host: &FsHost, name: &str) -> File {
    let file = File::open(host.path(name)).unwrap();
    // SAFETY: numbers only. F_SETSIG (10): a signal that is ignored by default, instead of SIGIO.
    unsafe {
        assert_eq!(libc::fcntl(file.as_raw_fd(), 10, libc::SIGURG), 0);
        let done = libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK);
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
    file
}

/// Waits until an open waits for that lease.
fn wait_wanted(lease: &File) {
    // SAFETY: numbers only. F_GETLEASE returns F_UNLCK when an open for writing waits.
    let is_wanted = || unsafe { libc::fcntl(lease.as_raw_fd(), libc::F_GETLEASE) } == libc::F_UNLCK;
    eventually("an open to break the lease", is_wanted);
}

fn unlease(file: &File) {
    // SAFETY: numbers only.
    unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
}

/// Must hold: maps of files under a lease of a host process do not delay a LOOKUP of another file.
#[test]
fn leases_and_maps_delay_no_lookup() {
    let host = with(&["--thread-pool-size", "4"]);
    (0..8).for_each(|i| host.put(&format!("leased{i}"), &[1; 5000]));
    host.put("other", b"other");
    let mut guest = host.boot();
    let nodes: Vec<_> = (0..8).map(|i| guest.node(&format!("leased{i}"))).collect();
    let leases: Vec<_> = (0..8).map(|i| lease(&host, &format!("leased{i}"))).collect();
    let maps: Vec<_> = nodes
        .iter()
        .enumerate()
        .map(|(i, node)| guest.send_setup(*node, 0, RANGE, MAP_READ, i as u64 * RANGE))
        .collect();
    guest.queues[FIRST].wait_taken();
    wait_wanted(&leases[0]);
    let other = lookup_of(&mut guest, "other");
    guest.result(other).unwrap();
    // The kernel breaks the leases after 45 s. Then all of these requests are answered.
    let waiting = maps.iter().all(|map| !guest.is_answered(*map));
    leases.iter().for_each(unlease);
    maps.into_iter().for_each(|map| drop(guest.reply(map)));
    assert!(waiting, "a LOOKUP of another file waits for the leases");
}

/// Must hold: a SETUPMAPPING that waits during a reset and a new INIT leaves no map in the new
/// driver's window.
fn over_a_reset(map_before: bool) {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    host.put("leased", &[1; 5000]);
    host.put("other", &[2; 5000]);
    let mut guest = host.boot();
    let node = guest.node("leased");
    let lease = lease(&host, "leased");
    let _old = guest.send_setup(node, 0, RANGE, BOTH, 0);
    wait_wanted(&lease);
    guest.reset();
    guest.init();
    let other = guest.node("other");
    if map_before {
        guest.setup(other, 0, RANGE, BOTH, 0).unwrap();
    }
    unlease(&lease);
    host.wait_idle();
    if !map_before {
        assert_eq!(
            guest.vmm.live_maps(),
            0,
            "the last driver's map is in the window of the new one"
        );
        guest.setup(other, 0, RANGE, BOTH, 0).unwrap();
    }
    assert_eq!(guest.vmm.live_maps(), 1);
    assert_eq!(guest.vmm.fetch(0, 2).unwrap(), [2, 2], "the last driver's map");
    assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
    let held = host.descriptors().iter().filter(|name| name.ends_with("/leased")).count();
    assert_eq!(held, 0, "the last driver's file stays open");
}

#[test]
fn a_map_that_waits_over_a_reset() {
    over_a_reset(false);
}

#[test]
fn a_map_that_waits_over_a_reset_and_comes_upon_another() {
    over_a_reset(true);
}

/// Must hold: two SETUPMAPPINGs that run when the VM is stopped and reset do not prevent the
/// device's next start.
#[test]
fn two_maps_on_their_way_at_a_reset() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    (0..2).for_each(|i| host.put(&format!("leased{i}"), &[1; 5000]));
    let mut guest = host.boot();
    let nodes: Vec<_> = (0..2).map(|i| guest.node(&format!("leased{i}"))).collect();
    let leases: Vec<_> = (0..2).map(|i| lease(&host, &format!("leased{i}"))).collect();
    for (i, node) in nodes.iter().enumerate() {
        let _ = guest.send_setup(*node, 0, RANGE, BOTH, i as u64 * RANGE);
    }
    leases.iter().for_each(wait_wanted);
    guest.vmm.reset();
    // Both requests reach the window now: one has it checked out and waits for the start of the
    // device, the other one waits for the checkout.
    leases.iter().for_each(unlease);
    host.wait_idle();
    guest.queues.iter_mut().for_each(testkit::queue::Queue::reset);
    guest.start();
    guest.init();
}

/// The same without leases: the requests reach the window without a delay.
#[test]
fn maps_on_their_way_at_a_reset() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    (0..16).for_each(|i| host.put(&format!("f{i}"), &[1; 5000]));
    let mut guest = host.boot();
    for _reset in 0..200 {
        let nodes: Vec<_> = (0..16).map(|i| guest.node(&format!("f{i}"))).collect();
        for (i, node) in nodes.iter().enumerate() {
            let _ = guest.send_setup(*node, 0, RANGE, BOTH, i as u64 * RANGE);
        }
        guest.reset();
        guest.init();
    }
}

/// Must hold: a SETUPMAPPING that waits during a DESTROY and an INIT leaves no map in the new
/// mount.
#[test]
fn a_map_that_waits_over_a_mount() {
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("leased", &[1; 5000]);
    host.put("other", &[2; 5000]);
    let mut guest = host.boot();
    let node = guest.node("leased");
    let lease = lease(&host, "leased");
    let old = guest.send_setup(node, 0, RANGE, BOTH, 0);
    wait_wanted(&lease);
    guest.on = FIRST + 1;
    guest.destroy();
    guest.init();
    let other = guest.node("other");
    guest.setup(other, 0, RANGE, BOTH, 0).unwrap();
    unlease(&lease);
    let reply = guest.reply(old);
    assert_eq!(guest.vmm.fetch(0, 2).unwrap(), [2, 2], "the old mount's map: {reply:?}");
}

// --- a slow disk, and requests that must not wait for it ---

/// Must hold: GETATTRs of a file whose FSYNC runs do not delay a LOOKUP of another file.
#[test]
fn looks_at_a_file_that_is_synced() {
    if !Strace::is_here() {
        return skip("looks_at_a_file_that_is_synced", "no strace");
    }
    let host = with(&["--thread-pool-size", "4"]);
    host.put("f", &vec![1; RANGE as usize]);
    host.put("other", b"other");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"dirty"));
    let mut strace = Strace::attach(host.pid(), "sync_file_range", HELD);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    let looks: Vec<_> =
        (0..8).map(|_| guest.send(op::GETATTR, node, &abi::getattr(), abi::ATTR_OUT)).collect();
    guest.queues[FIRST].wait_taken();
    // The test hangs here if the LOOKUP waits for the disk.
    let other = lookup_of(&mut guest, "other");
    guest.result(other).unwrap();
    drop(strace);
    let _ = guest.reply(fsync);
    looks.into_iter().for_each(|look| drop(guest.reply(look)));
}

/// Must hold: a SETUPMAPPING of one file does not wait until the times of another one are settled.
#[test]
fn a_map_beside_another_files_sync() {
    if !Strace::is_here() {
        return skip("a_map_beside_another_files_sync", "no strace");
    }
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("f", &vec![1; RANGE as usize]);
    host.put("other", &vec![2; RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    let other = guest.node("other");
    guest.setup(other, 0, RANGE, MAP_READ, 8 * RANGE).unwrap();
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"dirty"));
    let mut strace = Strace::attach(host.pid(), "sync_file_range", HELD);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    guest.on = FIRST + 1;
    let map = guest.send_setup(other, 0, RANGE, MAP_READ, 9 * RANGE);
    // The test hangs here if the map waits for the other file's disk.
    guest.result(map).unwrap();
    // The file `f` has no grant any more, and its times are still being settled.
    let unmap = guest.send(op::REMOVEMAPPING, 0, &abi::removemapping(&[(0, RANGE)]), 0);
    guest.queues[FIRST + 1].wait_taken();
    host.wait_idle();
    let map = guest.send_setup(other, 0, RANGE, MAP_READ, 10 * RANGE);
    guest.result(map).unwrap();
    drop(strace);
    let _ = (guest.reply(fsync), guest.reply(unmap));
}

/// Must hold: LSEEKs on a handle that a slow request uses do not delay a LOOKUP.
#[test]
fn seeks_beside_a_sync() {
    if !Strace::is_here() {
        return skip("seeks_beside_a_sync", "no strace");
    }
    let host = with(&["--thread-pool-size", "4"]);
    host.put("f", b"f");
    host.put("other", b"other");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    guest.write(node, fh, 0, b"dirty").unwrap();
    let mut strace = Strace::attach(host.pid(), SYNCS, HELD);
    let fsync = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    let seek = Arg::new().u64s(&[fh, 0]).u32s(&[libc::SEEK_DATA as u32, 0]);
    let seeks: Vec<_> = (0..8).map(|_| guest.send(op::LSEEK, node, &seek, 8)).collect();
    guest.queues[FIRST].wait_taken();
    // The test hangs here if the LOOKUP waits for the disk.
    let other = lookup_of(&mut guest, "other");
    guest.result(other).unwrap();
    drop(strace);
    let _ = guest.reply(fsync);
    seeks.into_iter().for_each(|seek| drop(guest.reply(seek)));
}

/// Must hold: a guest that reboots while a request for a mapped file is in a slow system call is
/// served at once.
fn reboot_beside(calls: &str, send: impl FnOnce(&mut FsGuest, u64, u64)) {
    if !Strace::is_here() {
        return skip(calls, "no strace");
    }
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    host.put("f", &vec![1; RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"dirty"));
    let mut strace = Strace::attach(host.pid(), calls, HELD);
    send(&mut guest, node, fh);
    strace.wait_begun(1);
    guest.reset();
    // The test hangs here if INIT waits for the slow call.
    guest.init();
    drop(strace);
    guest.getattr(ROOT).unwrap();
}

#[test]
fn a_reboot_beside_an_fsync() {
    reboot_beside("sync_file_range", |guest, node, fh| {
        let _ = guest.send_fsync(node, fh);
    });
}

#[test]
fn a_reboot_beside_a_truncation() {
    reboot_beside("ftruncate,truncate", |guest, node, _| {
        let _ = guest.send(op::SETATTR, node, &abi::set_size(5), abi::ATTR_OUT);
    });
}

#[test]
fn a_reboot_beside_a_chmod() {
    reboot_beside("fchmod,fchmodat", |guest, node, _| {
        let _ = guest.send(op::SETATTR, node, &abi::set_mode(0o600), abi::ATTR_OUT);
    });
}

// --- numbers ---

/// Must hold: extreme numbers in requests for a file, mapped or not, get an errno and change
/// nothing.
#[test]
fn numbers_at_the_edge() {
    let host = with(&["--xattr"]);
    host.put("f", &[7; 5000]);
    host.put("g", &[7; 5000]);
    let mut guest = host.boot();
    let (f, fh) = guest.opened("f");
    let (g, gh) = guest.opened("g");
    guest.setup(f, 0, RANGE, BOTH, 0).unwrap();
    let edges = [0, 1, 4095, 4096, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 4096, (1 << 63) - 1];
    let more = [1 << 63, u64::MAX - 4095, u64::MAX - 1, u64::MAX];
    let all: Vec<u64> = edges.iter().chain(&more).copied().collect();
    let mut seen = Vec::new();
    for (node, h) in [(f, fh), (g, gh)] {
        for &a in &all {
            let done =
                guest.call(op::WRITE, node, &abi::write(h, a, 0), 8).map(|b| abi::u32_at(&b, 0));
            seen.push(format!("write 0 at {a:#x}: {done:?}"));
            for &b in &all {
                if a < (1 << 31) && b > 8192 && b < (1 << 62) {
                    continue;
                }
                let lens = abi::copy_file_range((h, a), (node, h, b), 0);
                let _ = guest.call(op::COPY_FILE_RANGE, node, &lens, 8);
                let lens = abi::copy_file_range((h, a), (node, h, b), u64::MAX);
                let _ = guest.call(op::COPY_FILE_RANGE, node, &lens, 8);
                for mode in [3, 0x10, 0x8, 0x20, 0x40, 0xff, u32::MAX] {
                    // Only values that can't fill the disk.
                    let _ = guest.fallocate(node, h, a, b, mode as i32);
                }
                for whence in [0, 1, 2, 3, 4, 5, u32::MAX] {
                    let seek = Arg::new().u64s(&[h, a]).u32s(&[whence, 0]);
                    let _ = guest.call(op::LSEEK, node, &seek, 8);
                }
            }
            let _ = guest.call(op::READ, node, &abi::read(h, a, 0), 0);
            let _ = guest.read(node, h, a, 100);
            let _ = guest.setup(node, a, RANGE, BOTH, 2 * RANGE);
            let _ = guest.setup(node, 0, a, BOTH, 2 * RANGE);
            let _ = guest.setup(node, 0, RANGE, BOTH, a);
            let _ = guest.remove(&[(a, RANGE)]);
            let _ = guest.remove(&[(0, a)]);
            let _ = guest.set_size(node, a);
            let _ = guest.setup(node, 0, RANGE, BOTH, 0);
            let _ = guest.set_size(node, 5000);
        }
    }
    eprintln!("{}", seen.join("\n"));
    assert_eq!(guest.getattr(f).unwrap().size, 5000);
    guest.setup(f, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"still"));
    assert_eq!(&host.get("f")[..5], b"still");
    assert!(!host.said().contains("panic"), "{}", host.said());
}

/// Must hold: a file of the largest length is mapped or refused, and other files are mapped
/// afterwards.
#[test]
fn the_longest_file() {
    let host = FsHost::on_small_tmpfs(FsOptions::default(), 16 << 20);
    let Some(host) = host else { return skip("the_longest_file", "no mounts") };
    for (name, bytes) in
        [("long", i64::MAX as u64), ("long2", i64::MAX as u64 - 4096), ("long3", (1 << 62) + 1)]
    {
        File::create(host.path(name)).unwrap().set_len(bytes).unwrap();
    }
    host.put("other", &[2; 5000]);
    let mut guest = host.boot();
    let mut seen = Vec::new();
    for name in ["long", "long2", "long3"] {
        let (node, fh) = guest.opened(name);
        for flags in [MAP_READ, BOTH] {
            for from in [0, RANGE, (1 << 62), (1 << 63) - RANGE, (1 << 63) - 2 * RANGE] {
                seen.push(format!(
                    "{name} {flags} {from:#x}: {:?}",
                    guest.setup(node, from, RANGE, flags, RANGE)
                ));
            }
        }
        seen.push(format!("{:?}", guest.write(node, fh, i64::MAX as u64 - 2, b"abcd")));
        seen.push(format!("{:?}", guest.getattr(node).map(|a| a.size)));
        seen.push(format!("{:?}", guest.fsync(node, fh)));
    }
    eprintln!("{}", seen.join("\n"));
    guest.remove(&[(0, 16 * RANGE)]).unwrap();
    let other = guest.node("other");
    guest.setup(other, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"zz"));
    assert_eq!(&host.get("other")[..3], b"zz\x02");
    assert!(!host.said().contains("panic"), "{}", host.said());
}

// --- handles ---

/// Must hold: a hole is punched only through a handle of the file that can write, and only with the
/// flags that Linux accepts; also in a mapped file.
#[test]
fn a_hole_without_a_handle() {
    const PUNCH: i32 = 3;
    let mut wrong = Vec::new();
    for mapped in [false, true] {
        let host = with(&[]);
        host.put("f", &[7; 8192]);
        host.put("g", &[7; 8192]);
        let mut guest = host.boot();
        let f = guest.node("f");
        let reader = guest.open(f, libc::O_RDONLY).unwrap();
        let writer = guest.open(f, libc::O_RDWR).unwrap();
        let (_, others) = guest.opened("g");
        if mapped {
            guest.setup(f, 0, RANGE, MAP_READ, 0).unwrap();
        }
        for (what, fh, mode) in [
            ("no handle", 4711, PUNCH),
            ("a reader's", reader, PUNCH),
            ("another file's", others, PUNCH),
            ("without KEEP_SIZE", writer, 2),
            ("with COLLAPSE", writer, PUNCH | 8),
            ("with ZERO", writer, PUNCH | 0x10),
        ] {
            let done = guest.fallocate(f, fh, 0, 4096, mode);
            if done.is_ok() || host.get("f") != [7; 8192] {
                wrong.push(format!("mapped {mapped}, {what}: {done:?}"));
            }
            host.put("f", &[7; 8192]);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

// --- races ---

/// Must hold: a READ into the window stores like the guest's processor: it does not lengthen a file
/// that a SETATTR truncates at the same time.
#[test]
fn a_read_into_a_file_that_is_cut() {
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("from", &vec![b'x'; 1 << 20]);
    host.put("to", &vec![b'o'; 1 << 20]);
    let mut guest = host.boot();
    let (from, fh) = guest.opened("from");
    let (to, _) = guest.opened("to");
    // Each pause from 0 to 399 us is used five times, in an order in which neighbours differ.
    for round in 0..2000 {
        let wait = Duration::from_micros(round * 7 % 400);
        guest.on = FIRST;
        guest.set_size(to, 1 << 20).unwrap();
        guest.setup(to, 0, RANGE, BOTH, 0).unwrap();
        let arg = abi::read(fh, 0, 1 << 20);
        let place = [(FsGuest::in_window(0), 1 << 20)];
        let read = guest.send_with(op::READ, from, &[&arg.0], 0, &[], &place);
        let began = Instant::now();
        while began.elapsed() < wait {
            std::hint::spin_loop();
        }
        guest.on = FIRST + 1;
        let cut = guest.send(op::SETATTR, to, &abi::set_size(0), abi::ATTR_OUT);
        guest.result(cut).unwrap();
        let _ = guest.reply(read);
        let size = host.path("to").metadata().unwrap().len();
        assert_eq!(size, 0, "the file grew after it was cut, in round {round}");
        guest.remove(&[(0, RANGE)]).unwrap();
    }
}

/// The same, with strace lengthening the moment between the length check and the store.
#[test]
fn a_read_into_a_file_that_is_cut_in_between() {
    if !Strace::is_here() {
        return skip("a_read_into_a_file_that_is_cut_in_between", "no strace");
    }
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("from", &vec![b'x'; 1 << 20]);
    host.put("to", &vec![b'o'; 1 << 20]);
    let mut guest = host.boot();
    let (from, fh) = guest.opened("from");
    let (to, _) = guest.opened("to");
    guest.setup(to, 0, RANGE, BOTH, 0).unwrap();
    let mut strace = Strace::attach(host.pid(), "pwrite64", HELD);
    let place = [(FsGuest::in_window(0), 1 << 20)];
    let read = guest.send_with(op::READ, from, &[&abi::read(fh, 0, 1 << 20).0], 0, &[], &place);
    strace.wait_begun(1);
    guest.on = FIRST + 1;
    // The SETATTR waits until the READ has stored, or runs before that.
    let cut = guest.send(op::SETATTR, to, &abi::set_size(0), abi::ATTR_OUT);
    drop(strace);
    let reply = guest.reply(read);
    guest.result(cut).unwrap();
    let size = host.path("to").metadata().unwrap().len();
    assert_eq!(size, 0, "the file grew after it was cut: {reply:?}");
}

/// Must hold: a SYNCFS that failed before syncfs(2) makes no later FSYNC of other files fail.
#[test]
fn a_syncfs_that_did_not_begin() {
    let host = with(&[]);
    host.put("f", b"f");
    host.put("gone", b"gone");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    let gone = guest.node("gone");
    std::fs::remove_file(host.path("gone")).unwrap();
    let pending = guest.send(op::SYNCFS, gone, &Arg::new().u64s(&[0]), 0);
    let failed = guest.result(pending);
    assert!(failed.is_err());
    guest.write(node, fh, 0, b"more").unwrap();
    assert_eq!(guest.fsync(node, fh), Ok(()), "after a SYNCFS that said {failed:?}");
}

/// Must hold: a late OPEN of the last driver opens no file for the next driver.
#[test]
fn an_open_that_waits_over_a_reset() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    host.put("leased", &[1; 5000]);
    let mut guest = host.boot();
    let node = guest.node("leased");
    let lease = lease(&host, "leased");
    for _ in 0..4 {
        let _ = guest.send(op::OPEN, node, &abi::open(libc::O_RDWR), OPEN_OUT);
    }
    guest.queues[FIRST].wait_taken();
    wait_wanted(&lease);
    guest.reset();
    guest.init();
    unlease(&lease);
    drop(lease);
    host.wait_idle();
    let held = host.descriptors().iter().filter(|name| name.ends_with("/leased")).count();
    assert_eq!(held, 0, "the last driver's files stay open");
}

/// Must hold: a device that was reset while maps were being made ends at SIGTERM.
#[test]
fn sigterm_ends_a_stuck_device() {
    let mut host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    (0..16).for_each(|i| host.put(&format!("f{i}"), &[1; 5000]));
    let mut guest = host.boot();
    for round in 0..20 {
        let nodes: Vec<_> = (0..16).map(|i| guest.node(&format!("f{i}"))).collect();
        for (i, node) in nodes.iter().enumerate() {
            let _ = guest.send_setup(*node, 0, RANGE, BOTH, i as u64 * RANGE);
        }
        guest.reset();
        if round < 19 {
            guest.init();
        }
    }
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(host.pid() as i32),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(host.wait_end().success());
}

/// Must hold: the offset of a WRITE decides where it goes, though the file was opened with
/// O_APPEND: a page that the guest's kernel writes back, and a WRITE of a descriptor without
/// O_APPEND (F_SETFL), go to their offsets.
#[test]
fn a_handle_that_appends() {
    let mut wrong = Vec::new();
    for mapped in [false, true] {
        for (what, write_flags, flags) in
            [("a page from the cache", 1, libc::O_APPEND), ("no O_APPEND", 0, 0)]
        {
            let host = with(&[]);
            host.put("f", b"0123456789");
            let mut guest = host.boot();
            let node = guest.node("f");
            let fh = guest.open(node, libc::O_RDWR | libc::O_APPEND).unwrap();
            if mapped {
                guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
            }
            let arg = Arg::new()
                .u64s(&[fh, 0])
                .u32s(&[2, write_flags])
                .u64s(&[0])
                .u32s(&[(flags | libc::O_RDWR) as u32, 0]);
            let pending = guest.send_with(op::WRITE, node, &[&arg.0, b"ab"], 8, &[], &[]);
            let done = guest.result(pending);
            if host.get("f") != b"ab23456789" {
                wrong.push(format!(
                    "mapped {mapped}, {what}: {done:?}, {}",
                    String::from_utf8_lossy(&host.get("f"))
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Must hold: a VM that is paused while its guest maps files, reset during the pause, and
/// continued, works.
#[test]
fn a_reset_in_a_pause() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    (0..4).for_each(|i| host.put(&format!("f{i}"), &[1; 5000]));
    let mut guest = host.boot();
    let nodes: Vec<_> = (0..4).map(|i| guest.node(&format!("f{i}"))).collect();
    for (i, node) in nodes.iter().enumerate() {
        guest.setup(*node, 0, RANGE, BOTH, i as u64 * RANGE).unwrap();
    }
    // At one time: removals and a truncation that wait for the front-end.
    for i in 0..4 {
        let _ = guest.send(op::REMOVEMAPPING, 0, &abi::removemapping(&[(i * RANGE, RANGE)]), 0);
        let _ = guest.send(op::SETATTR, nodes[i as usize], &abi::set_size(0), abi::ATTR_OUT);
    }
    guest.vmm.reset();
    host.wait_idle();
    guest.queues.iter_mut().for_each(testkit::queue::Queue::reset);
    guest.start();
    guest.init();
}

/// Must hold: descriptor tables, heads and replies that cross the border of two memory regions are
/// served.
#[test]
fn messages_across_regions() {
    let host = FsHost::with(FsOptions { ram_regions: 8, ..FsOptions::default() });
    host.put("f", &[9; 1 << 16]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    let regions: Vec<_> = (1..8u64).collect();
    let total = guest.scratch + (16 << 20);
    for i in regions {
        let border = total / 8 * i;
        for back in [1u64, 7, 15, 16, 17, 4096] {
            if border < guest.scratch + 70_000 {
                continue;
            }
            let at = border - back;
            let head = abi::in_header(80, op::READ, 77_000, node);
            let arg = abi::read(fh, 0, 60_000).0;
            guest.poke(at, &[head, arg].concat());
            let chain = testkit::queue::Chain {
                input_at: vec![(at, 80)],
                output: vec![16],
                output_at: vec![(at - 30_000, 60_000)],
                ..Default::default()
            };
            let pending = guest.send_chain(FIRST, &chain, 77_000);
            guest.result(pending).unwrap();
            assert_eq!(guest.peek(at - 30_000, 60_000), vec![9; 60_000]);
            guest.poke(at - 30_000, &vec![5; 60_000]);
            let chain = testkit::queue::Chain {
                input: vec![abi::in_header(56, op::GETATTR, 78_000, node), abi::getattr().0],
                output_at: vec![(at - 8, 16 + 104)],
                ..Default::default()
            };
            let pending = guest.send_chain(FIRST, &chain, 78_000);
            guest.wait_returned(pending);
            assert_eq!(abi::u32_at(&guest.peek(at - 8, 4), 0), 120, "at {at:#x}");
        }
    }
}

/// Must hold: after any requests at one time on two queues, with INIT, DESTROY and resets in
/// between, the next driver finds the files unchanged, and the daemon leaks nothing. (With NO_RESET
/// set, without the resets.)
#[test]
fn a_storm() {
    let host =
        FsHost::with(FsOptions { request_queues: 2, mem_slots: false, ..FsOptions::default() });
    (0..4).for_each(|i| host.put(&format!("f{i}"), &vec![i as u8; RANGE as usize]));
    let mut guest = host.boot();
    guest.destroy();
    guest.init();
    let before = host.descriptors();
    eprintln!("threads {}", host.threads());
    let mut seed = 12345_u64;
    let mut random = move |n: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % n
    };
    for round in 0..STORM_ROUNDS {
        let nodes: Vec<_> =
            (0..4).map(|i| guest.lookup(ROOT, &format!("f{i}")).map_or(2, |e| e.nodeid)).collect();
        let mut handles: Vec<(u64, u64)> = Vec::new();
        for node in &nodes {
            if let Ok(fh) = guest.open(*node, libc::O_RDWR) {
                handles.push((*node, fh));
            }
        }
        handles.push((2, 2));
        let mut pending = Vec::new();
        for _ in 0..20 {
            guest.on = FIRST + random(2) as usize;
            let node = nodes[random(4) as usize];
            let (hn, fh) = handles[random(handles.len() as u64) as usize];
            let at = random(4) * RANGE;
            pending.push(match random(16) {
                0 => guest.send(op::INIT, 0, &abi::init(), abi::INIT_OUT),
                1 => guest.send(op::DESTROY, 0, &Arg::new(), 0),
                2..5 => guest.send_setup(node, 0, RANGE, BOTH, at),
                5 => guest.send(op::REMOVEMAPPING, 0, &abi::removemapping(&[(at, RANGE)]), 0),
                6 => guest.send(
                    op::SETATTR,
                    node,
                    &abi::set_size(random(3) * 100_000),
                    abi::ATTR_OUT,
                ),
                7 => guest.send(op::RELEASE, hn, &abi::release(fh), 0),
                8 => guest.send(
                    op::OPEN,
                    node,
                    &abi::open(libc::O_RDWR | if random(3) == 0 { libc::O_TRUNC } else { 0 }),
                    OPEN_OUT,
                ),
                9 => guest.send_fsync(hn, fh),
                10 => guest.send(op::FALLOCATE, hn, &abi::fallocate(fh, 0, 8192, 3), 0),
                11 => guest.send_syncfs(),
                12 => guest.send(
                    op::COPY_FILE_RANGE,
                    hn,
                    &abi::copy_file_range((fh, 0), (hn, fh, 1 << 20), 4096),
                    8,
                ),
                13 => guest.send(op::READ, hn, &abi::read(fh, 0, 4096), 4096),
                14 => {
                    let place = [(FsGuest::in_window(at), 65536)];
                    guest.send_with(op::READ, hn, &[&abi::read(fh, 0, 65536).0], 0, &[], &place)
                }
                _ => lookup_of(&mut guest, "f1"),
            });
            if random(40) == 0 {
                guest.forget(node, 1);
            }
        }
        guest.on = FIRST;
        if random(4) == 0 && std::env::var_os("NO_RESET").is_none() {
            eprintln!("round {round}: reset; threads {}", host.threads());
            guest.reset();
        } else {
            for one in pending {
                let _ = guest.reply(one);
            }
            guest.destroy();
        }
        guest.init();
    }
    (0..4).for_each(|i| host.put(&format!("f{i}"), &vec![i as u8 + 1; RANGE as usize]));
    let (node, fh) = guest.opened("f2");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"still"));
    guest.fsync(node, fh).unwrap();
    assert_eq!(&host.get("f2")[..6], b"still\x03");
    assert!(!host.said().contains("panic"), "{}", host.said());
    assert!(guest.vmm.refused().is_empty(), "{:?}", guest.vmm.refused());
    guest.destroy();
    guest.init();
    host.wait_descriptors(&before);
}

// --- user and group of a thread ---

/// Must hold: a request with a user id that the thread can't take leaves its group to no later
/// request of the thread. (That happens in a user namespace without that id. Here strace makes the
/// system call fail.)
#[test]
fn a_group_that_stays_behind() {
    use std::os::unix::fs::MetadataExt;
    if !Strace::is_here() {
        return skip("a_group_that_stays_behind", "no strace");
    }
    // strace fails a call by making it another one, which a filter would forbid.
    let host = with(&["--thread-pool-size", "2", "--seccomp", "none"]);
    let mut guest = host.boot();
    let make = |guest: &mut FsGuest, name: &str, (uid, gid): (u32, u32)| {
        let arg = Arg::new().u32s(&[0o100_644, 0, 0, 0]).name(name);
        let unique = guest.next_unique();
        let mut head =
            abi::in_header((abi::IN_HEADER + arg.0.len()) as u32, op::MKNOD, unique, ROOT);
        head[24..28].copy_from_slice(&uid.to_le_bytes());
        head[28..32].copy_from_slice(&gid.to_le_bytes());
        let chain = testkit::queue::Chain {
            input: vec![head, arg.0.clone()],
            output: vec![16, ENTRY_OUT],
            ..Default::default()
        };
        let pending = guest.send_chain(FIRST, &chain, unique);
        guest.result(pending).map(drop)
    };
    let strace = Strace::attach(host.pid(), "setresuid", "error=EINVAL");
    assert_eq!(make(&mut guest, "nobody", (5000, 7)), Err(libc::EINVAL));
    drop(strace);
    make(&mut guest, "roots", (0, 0)).unwrap();
    let found = host.path("roots").metadata().unwrap();
    assert_eq!((found.uid(), found.gid()), (0, 0));
}

// --- limits of one guest (threads, memory), and files that can't be written ---

/// Sends an OPEN for writing.
fn open_to_write(guest: &mut FsGuest, node: u64) -> Pending {
    guest.send(op::OPEN, node, &abi::open(libc::O_WRONLY), OPEN_OUT)
}

/// The flags of the daemon's descriptors of `name`.
fn host_flags(host: &FsHost, name: &str) -> Vec<i32> {
    // Not by the path: the worker's root is another one.
    let id = |found: std::fs::Metadata| (found.dev(), found.ino());
    let file = id(std::fs::metadata(host.path(name)).unwrap());
    let proc = format!("/proc/{}", host.pid());
    let all = std::fs::read_dir(format!("{proc}/fd")).unwrap().map(|fd| fd.unwrap());
    all.filter(|fd| std::fs::metadata(fd.path()).is_ok_and(|found| id(found) == file))
        .map(|fd| {
            let number = fd.file_name().into_string().unwrap();
            let info = std::fs::read_to_string(format!("{proc}/fdinfo/{number}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
            i32::from_str_radix(flags.trim(), 8).unwrap()
        })
        .collect()
}

/// Must hold: any number of OPENs of a file under a lease do not delay an OPEN of another file.
/// They succeed when the lease ends, and no descriptor keeps O_NONBLOCK.
#[test]
fn opens_under_a_lease_hold_up_no_open_of_another_file() {
    let host = with(&["--thread-pool-size", "8"]);
    host.put("leased", b"leased");
    host.put("other", b"other");
    let mut guest = host.boot();
    let (leased, other) = (guest.node("leased"), guest.node("other"));
    let lease = lease(&host, "leased");
    let waiting: Vec<_> = (0..16).map(|_| open_to_write(&mut guest, leased)).collect();
    wait_wanted(&lease);
    let open = open_to_write(&mut guest, other);
    guest.result(open).unwrap();
    let waited = waiting.iter().all(|open| !guest.is_answered(*open));
    unlease(&lease);
    drop(lease);
    assert!(waited, "OPENs were answered under the lease, or before the OPEN of another file");
    for open in waiting {
        guest.result(open).unwrap();
    }
    let flags = host_flags(&host, "leased");
    assert_eq!(flags.len(), 16);
    assert!(flags.iter().all(|flags| flags & libc::O_NONBLOCK == 0), "{flags:x?}");
    assert!(host_flags(&host, "other").iter().all(|flags| flags & libc::O_NONBLOCK == 0));
    // With O_NONBLOCK in the request, the descriptor has it.
    guest.open(other, libc::O_WRONLY | libc::O_NONBLOCK).unwrap();
    let asked = host_flags(&host, "other");
    assert_eq!(asked.iter().filter(|flags| **flags & libc::O_NONBLOCK != 0).count(), 1);
}

/// Sends a request for an inode.
type SendAbout<'a> = &'a dyn Fn(&mut FsGuest, u64) -> Pending;

/// Must hold: each request that opens a file waits for a lease and then succeeds, and does not
/// delay an OPEN of another file.
#[test]
fn each_request_that_waits_for_a_lease() {
    let trunc = libc::O_RDWR | libc::O_TRUNC;
    let sends: [(&str, SendAbout<'_>); 4] = [
        ("CREATE", &|guest, _| {
            guest.send(op::CREATE, ROOT, &abi::create("leased", 2, 0o644), ENTRY_OUT + OPEN_OUT)
        }),
        ("OPEN, O_TRUNC", &|guest, node| guest.send(op::OPEN, node, &abi::open(trunc), OPEN_OUT)),
        ("SETATTR", &|guest, node| guest.send(op::SETATTR, node, &abi::set_size(3), abi::ATTR_OUT)),
        ("SETUPMAPPING", &|guest, node| guest.send_setup(node, 0, RANGE, MAP_READ, 0)),
    ];
    for (what, send) in sends {
        let host = with(&["--thread-pool-size", "4"]);
        host.put("leased", b"leased");
        host.put("other", b"other");
        let mut guest = host.boot();
        let (leased, other) = (guest.node("leased"), guest.node("other"));
        let lease = lease(&host, "leased");
        let waiting: Vec<_> = (0..8).map(|_| send(&mut guest, leased)).collect();
        wait_wanted(&lease);
        let open = open_to_write(&mut guest, other);
        guest.result(open).unwrap();
        let waited = waiting.iter().all(|one| !guest.is_answered(*one));
        unlease(&lease);
        drop(lease);
        assert!(waited, "{what} was answered under the lease, or before an OPEN of another file");
        for one in waiting {
            guest.result(one).unwrap_or_else(|errno| panic!("{what}: {errno}"));
        }
        let flags = host_flags(&host, "leased");
        assert!(flags.iter().all(|flags| flags & libc::O_NONBLOCK == 0), "{what}: {flags:x?}");
    }
}

/// A daemon with a memory limit of 72 MiB.
fn with_little_memory() -> FsHost {
    use std::os::unix::process::CommandExt;

    let extra = ["--thread-pool-size", "4"].map(String::from).to_vec();
    FsHost::prepared(FsOptions { extra, ..FsOptions::default() }, |command| {
        let limit = || {
            use nix::sys::resource::{Resource, setrlimit};
            Ok(setrlimit(Resource::RLIMIT_DATA, 72 << 20, 72 << 20)?)
        };
        // SAFETY: one system call.
        unsafe { command.pre_exec(limit) };
    })
}

/// Must hold: a guest that forgets no inode can't make the daemon's memory grow without a limit.
/// Requests for known inodes are served; a request for one more inode is ENFILE and leaves no file.
#[test]
fn a_guest_that_forgets_nothing() {
    const FILES: usize = 15_000;
    let host = with_little_memory();
    std::fs::create_dir(host.path("many")).unwrap();
    (0..FILES).for_each(|i| host.put(&format!("many/f{i}"), b""));
    host.put("beside", b"x");
    let mut guest = host.boot();
    let many = guest.node("many");
    let mut known = Vec::new();
    let full = (0..FILES).find_map(|i| match guest.lookup(many, &format!("f{i}")) {
        Ok(entry) => {
            known.push(entry.nodeid);
            None
        }
        Err(errno) => Some(errno),
    });
    assert_eq!(full, Some(libc::ENFILE), "{} inodes, {} KiB", known.len(), host.own_kib());
    assert!(known.len() > 10_000, "{} inodes", known.len());
    let warnings = host.said().lines().filter(|line| line.contains("inodes")).count();
    assert_eq!(warnings, 1, "{}", host.said());

    // Each request that needs one more inode is refused, and creates nothing.
    let mode = libc::S_IFREG | 0o644;
    let both = ENTRY_OUT + OPEN_OUT;
    let makes: [(&str, u32, Arg, usize); 5] = [
        ("CREATE", op::CREATE, abi::create("new", libc::O_RDWR, 0o644), both),
        ("CREATE, O_EXCL", op::CREATE, abi::create("new", libc::O_EXCL | 2, 0o644), both),
        ("MKNOD", op::MKNOD, Arg::new().u32s(&[mode, 0, 0, 0]).name("new"), ENTRY_OUT),
        ("MKDIR", op::MKDIR, Arg::new().u32s(&[0o755, 0]).name("new"), ENTRY_OUT),
        ("SYMLINK", op::SYMLINK, Arg::new().name("new").name("target"), ENTRY_OUT),
    ];
    for (what, opcode, arg, out) in &makes {
        assert_eq!(guest.call(*opcode, ROOT, arg, *out), Err(libc::ENFILE), "{what}");
        assert!(!host.path("new").exists(), "{what}");
    }
    assert_eq!(guest.lookup(ROOT, "beside"), Err(libc::ENFILE));
    let named = guest.names().unwrap();
    assert!(named.iter().any(|(name, node)| name == "beside" && *node == 0), "a name alone");

    // Requests for known inodes are served.
    assert_eq!(guest.lookup(many, "f7").unwrap().nodeid, known[7]);
    let existing = abi::create("f7", libc::O_RDWR, 0o644);
    let body = guest.call(op::CREATE, many, &existing, both).unwrap();
    assert_eq!(abi::u64_at(&body, 0), known[7]);
    guest.call(op::LINK, ROOT, &Arg::new().u64s(&[known[7]]).name("link"), ENTRY_OUT).unwrap();

    // A FORGET of all look-ups of an inode frees its room.
    guest.forget(known[7], 1);
    assert_eq!(guest.lookup(ROOT, "beside"), Err(libc::ENFILE), "known by three other look-ups");
    guest.forget(known[7], 3);
    guest.lookup(ROOT, "beside").unwrap();
    assert_eq!(guest.lookup(many, "f7"), Err(libc::ENFILE));
    guest.forget(known[8], 1);
    for (what, opcode, arg, out) in &makes[..1] {
        guest.call(*opcode, ROOT, arg, *out).unwrap_or_else(|errno| panic!("{what}: {errno}"));
    }
    // A new mount begins with no inode.
    guest.init();
    let many = guest.node("many");
    for i in 0..1000 {
        guest.lookup(many, &format!("f{i}")).unwrap();
    }
}

/// Must hold: a file that the daemon can't open for writing is read by READ, and no guest writes to
/// it. A guest that lets the daemon choose gets no FUSE_ATTR_DAX for it.
#[test]
fn a_program_that_runs_on_the_host() {
    const ATTR_DAX: u32 = 1 << 1;
    let extra = vec!["--dax-threshold".into(), "4096".into()];
    let host = FsHost::with(FsOptions { dax: "inode", extra, ..FsOptions::default() });
    std::fs::copy("/bin/sleep", host.path("busy")).unwrap();
    let mut program = std::process::Command::new(host.path("busy")).arg("1000").spawn().unwrap();
    let mut guest = host.boot();
    let node = guest.node("busy");
    let before = host.descriptors();
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags), Err(libc::ETXTBSY));
    }
    assert_eq!(guest.set_size(node, 0).map(drop), Err(libc::ETXTBSY));
    for flags in [MAP_READ, BOTH] {
        assert_eq!(guest.setup(node, 0, RANGE, flags, 0), Err(libc::ETXTBSY));
    }
    assert_eq!(guest.vmm.live_maps(), 0);
    let real = std::fs::read("/bin/sleep").unwrap();
    assert_eq!(guest.read(node, fh, 0, 4096).unwrap(), real[..4096]);
    // The next inode of the guest for this file has no DAX, so it is read by READ.
    assert_eq!(guest.lookup(ROOT, "busy").unwrap().attr.flags & ATTR_DAX, 0);
    assert_eq!(guest.getattr(node).unwrap().flags & ATTR_DAX, 0);
    guest.release(node, fh).unwrap();
    guest.forget(node, 2);
    let node = guest.node("busy");
    assert_eq!(guest.getattr(node).unwrap().flags & ATTR_DAX, 0, "also for another node id");
    host.wait_descriptors(&before);

    program.kill().unwrap();
    program.wait().unwrap();
    guest.setup(node, 0, RANGE, MAP_READ, 0).unwrap();
    assert_eq!(guest.vmm.fetch(0, 16).unwrap(), real[..16]);
    assert_ne!(guest.getattr(node).unwrap().flags & ATTR_DAX, 0, "it could be mapped");
    guest.open(node, libc::O_RDWR).unwrap();
}
