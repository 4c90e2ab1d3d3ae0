// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that a file's times are right when two threads of a guest, two VMs, or a guest and the
//! daemon's end meet: the next close changes the times for each store, a stat alone changes none,
//! and no request waits for the disk of another one.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op, u32_at, u64_at};
use testkit::slow::{DELAY, Strace, skip};

const BOTH: u64 = MAP_READ | MAP_WRITE;
const OLD: u64 = 1000;

type Stamp = (i64, i64);

fn mtime(host: &FsHost, name: &str) -> Stamp {
    let found = fs::metadata(host.path(name)).unwrap();
    (found.mtime(), found.mtime_nsec())
}

fn make_old(host: &FsHost, name: &str) {
    let file = File::options().write(true).open(host.path(name)).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(OLD)).unwrap();
}

fn seen(guest: &mut FsGuest, node: u64) -> (u64, u32) {
    let body = guest.call(op::GETATTR, node, &abi::getattr(), abi::ATTR_OUT).unwrap();
    (u64_at(&body, 16 + 32), u32_at(&body, 16 + 52))
}

/// Runs `work` while another processor of the guest stores to the first byte of the window without
/// a pause.
fn beside_stores<T>(guest: &mut FsGuest, work: impl FnOnce(&mut FsGuest) -> T) -> T {
    let at = guest.vmm.view(0, 1, |first| first.ptr_guard_mut().as_ptr().addr());
    let (stop, stopped) = channel::<()>();
    let (begin, begun) = channel();
    let stores = thread::spawn(move || {
        let mut rounds = 0_u64;
        while stopped.try_recv().is_err() {
            // SAFETY: the test owns the map, which stays; no other thread of the test accesses the
            // byte.
            #[allow(unsafe_code)]
            unsafe {
                std::ptr::with_exposed_provenance_mut::<u8>(at).write_volatile(4)
            };
            rounds += 1;
            if rounds == 1000 {
                let _ = begin.send(());
            }
        }
    });
    begun.recv().unwrap();
    let done = work(guest);
    stop.send(()).unwrap();
    stores.join().unwrap();
    done
}

/// One processor of the guest sets mtime while another one stores. A store after the reply changes
/// mtime at the next close.
#[test]
fn a_store_after_utimens_beside_stores_has_new_times() {
    let host = FsHost::on_a_disk();
    let (mut guest, node, fh) = host.boot_with_stored_file();
    let mut stale = Vec::new();
    const ROUNDS: u32 = 50;
    for round in 0..ROUNDS {
        assert!(guest.vmm.store(0, &[3]));
        beside_stores(&mut guest, |guest| {
            guest.call(op::SETATTR, node, &abi::set_mtime(OLD), abi::ATTR_OUT).unwrap();
        });
        assert!(guest.vmm.store(0, &[5]), "no map to store to");
        guest.flush(node, fh).unwrap();
        if mtime(&host, "file").0 == OLD as i64 {
            stale.push(round);
        }
    }
    assert!(stale.is_empty(), "stored, closed, and old in {} of {ROUNDS} rounds", stale.len());
}

/// One processor of the guest closes the file while another one stores. A store after the reply
/// changes mtime at the next close.
#[test]
fn a_store_after_a_close_beside_stores_has_new_times() {
    let host = FsHost::on_a_disk();
    let (mut guest, node, fh) = host.boot_with_stored_file();
    let mut stale = Vec::new();
    const ROUNDS: u32 = 300;
    for round in 0..ROUNDS {
        // A slow disk.
        assert!(guest.vmm.store(0, &vec![round as u8; RANGE as usize]));
        beside_stores(&mut guest, |guest| guest.flush(node, fh).unwrap());
        let before = mtime(&host, "file");
        assert!(guest.vmm.store(0, &[5]), "no map to store to");
        guest.flush(node, fh).unwrap();
        if mtime(&host, "file") == before {
            stale.push(round);
        }
        guest.fsync(node, fh).unwrap();
    }
    assert!(stale.is_empty(), "stored, closed, and old in {} of {ROUNDS} rounds", stale.len());
}

/// A close waits for the disk. A stat at the same time does not wait for pages under writeback, and
/// the next driver's start does not wait either.
#[test]
fn no_request_waits_for_a_slow_close() {
    if !Strace::is_here() {
        return skip("no_request_waits_for_a_slow_close", "no strace");
    }
    for reset in [false, true] {
        let host = FsHost::with(FsOptions {
            below: std::env::temp_dir(),
            mem_slots: false,
            ..FsOptions::default()
        });
        let (mut guest, node, fh) = host.boot_with_stored_file();
        assert!(guest.vmm.store(0, &[3]));
        // The first call is the one that waits for the disk.
        let delay = "delay_enter=4000000:when=1";
        let mut strace = Strace::attach(host.pid(), "sync_file_range", delay);
        let flush = guest.send(op::FLUSH, node, &abi::flush(fh), 0);
        strace.wait_begun(1);
        if reset {
            guest.reset();
            guest.init();
        } else {
            guest.getattr(node).unwrap();
        }
        let ended = strace.text().contains("WAIT_BEFORE) = 0");
        assert!(!ended, "reset {reset}: it waited for another one's disk: {}", strace.text());
        drop(strace);
        if !reset {
            guest.result(flush).unwrap();
        }
    }
}

/// Two VMs have a file mapped and open for writing, and none stores: its times stay.
#[test]
fn two_vms_that_only_look_leave_the_times() {
    let host = FsHost::on_a_disk();
    let (mut first, node, fh) = host.boot_with_stored_file();
    let shared = host.path("");
    let other = FsHost::prepared(
        FsOptions { below: std::env::temp_dir(), ..FsOptions::default() },
        |command| {
            let share = command.get_args().find(|arg| arg.to_string_lossy().ends_with("/share"));
            let share = PathBuf::from(share.unwrap());
            fs::remove_dir(&share).unwrap();
            symlink(&shared, &share).unwrap();
        },
    );
    let mut second = other.boot();
    let (its_node, its_fh) = second.opened("file");
    second.setup(its_node, 0, RANGE, BOTH, 0).unwrap();
    assert!(second.vmm.store(0, &[9]));
    // All earlier stores are durable and have changed the times.
    for _ in 0..2 {
        first.fsync(node, fh).unwrap();
        second.fsync(its_node, its_fh).unwrap();
    }
    let before = mtime(&host, "file");
    let mut seen_times = Vec::new();
    for _ in 0..5 {
        seen_times.push(seen(&mut first, node));
        seen_times.push(seen(&mut second, its_node));
    }
    assert_eq!(mtime(&host, "file"), before, "nothing was stored; seen: {seen_times:?}");
}

/// At SIGTERM the daemon settles the times of mapped files: stores have changed them.
#[test]
fn the_end_of_the_daemon_has_new_times() {
    let mut host = FsHost::on_a_disk();
    let (mut guest, node, _) = host.boot_with_stored_file();
    assert!(guest.vmm.store(0, &[3]));
    make_old(&host, "file");
    assert!(guest.vmm.store(0, &[4]));
    let _ = (node, &mut guest);
    kill(Pid::from_raw(host.pid() as i32), Signal::SIGTERM).unwrap();
    assert!(host.wait_end().success());
    assert!(mtime(&host, "file").0 > OLD as i64, "a store that changed no time");
}

/// A stat that runs during a close has the times of all stores before it was sent.
#[test]
fn a_stat_beside_a_close_has_new_times() {
    if !Strace::is_here() {
        return skip("a_stat_beside_a_close_has_new_times", "no strace");
    }
    let host = FsHost::on_a_disk();
    let (mut guest, node, fh) = host.boot_with_stored_file();
    assert!(guest.vmm.store(0, &[3]));
    make_old(&host, "file");
    assert!(guest.vmm.store(0, &[4]));
    assert_eq!(mtime(&host, "file").0, OLD as i64, "the host's kernel has changed mtime");
    let mut strace = Strace::attach(host.pid(), "sync_file_range", DELAY);
    let flush = guest.send(op::FLUSH, node, &abi::flush(fh), 0);
    strace.wait_begun(1);
    let during = seen(&mut guest, node);
    guest.result(flush).unwrap();
    assert!(
        during.0 > OLD,
        "stored, stat, and old: {during:?}; on the host {:?}",
        mtime(&host, "file")
    );
}
