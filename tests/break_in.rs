// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attacks on durability, times and the front-end's side: each of these tests failed when it was written.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(dead_code)] // Each test crate uses a part of common.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use common::Host;
use common::driver::Answer;
use common::fs::{FsHost, FsOptions, RANGE};
use common::fuse::FsGuest;
use common::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op, u32_at, u64_at};
use common::slow::{Strace, skip};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

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

/// A file of a range on a disk, granted for writing, opened for writing, stored to and settled.
fn rig(host: &FsHost) -> (FsGuest, u64, u64) {
    host.put("file", &vec![1; RANGE as usize]);
    File::open(host.path("file")).unwrap().sync_all().unwrap();
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, &[2]));
    guest.flush(node, fh).unwrap();
    guest.fsync(node, fh).unwrap();
    (guest, node, fh)
}

fn on_a_disk() -> FsHost {
    FsHost::with(FsOptions { below: std::env::temp_dir(), ..FsOptions::default() })
}

// --- times ---

/// Another processor of the guest, which stores to the first byte of the window without a pause while `work`
/// goes on.
fn beside_stores<T>(guest: &mut FsGuest, work: impl FnOnce(&mut FsGuest) -> T) -> T {
    let at = guest.vmm.view(0, 1, |first| first.ptr_guard_mut().as_ptr().addr());
    let (stop, stopped) = channel::<()>();
    let (begin, begun) = channel();
    let stores = thread::spawn(move || {
        let mut rounds = 0_u64;
        while stopped.try_recv().is_err() {
            // SAFETY: the map is the test's own, and stays; nothing else of the test looks at the byte.
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

/// One processor of the guest sets mtime while another one stores: what is stored when that has
/// returned is in mtime at the next close.
#[test]
fn a_store_behind_utimens_that_met_stores_is_told_of() {
    let host = on_a_disk();
    let (mut guest, node, fh) = rig(&host);
    let mut stale = Vec::new();
    const ROUNDS: u32 = 50;
    for round in 0..ROUNDS {
        assert!(guest.vmm.store(0, &[3]));
        beside_stores(&mut guest, |guest| {
            guest.call(op::SETATTR, node, &abi::set_mtime(OLD), abi::ATTR_OUT).unwrap();
        });
        assert!(guest.vmm.store(0, &[5]), "it is stored behind the answer");
        guest.flush(node, fh).unwrap();
        if mtime(&host, "file").0 == OLD as i64 {
            stale.push(round);
        }
    }
    assert!(stale.is_empty(), "stored, closed, and old in {} of {ROUNDS} rounds", stale.len());
}

/// One processor of the guest stores while another one closes: what is stored when that has returned is in
/// mtime at the next close.
#[test]
fn a_store_behind_a_close_that_met_stores_is_told_of() {
    let host = on_a_disk();
    let (mut guest, node, fh) = rig(&host);
    let mut stale = Vec::new();
    const ROUNDS: u32 = 300;
    for round in 0..ROUNDS {
        // A long way to the disk.
        assert!(guest.vmm.store(0, &vec![round as u8; RANGE as usize]));
        beside_stores(&mut guest, |guest| guest.flush(node, fh).unwrap());
        let before = mtime(&host, "file");
        assert!(guest.vmm.store(0, &[5]), "it is stored behind the answer");
        guest.flush(node, fh).unwrap();
        if mtime(&host, "file") == before {
            stale.push(round);
        }
        guest.fsync(node, fh).unwrap();
    }
    assert!(stale.is_empty(), "stored, closed, and old in {} of {ROUNDS} rounds", stale.len());
}

/// A close waits for the disk; a stat "waits for no page that is on its way" there, nor does a driver that
/// begins anew.
#[test]
fn nobody_waits_behind_a_slow_close() {
    if !Strace::is_here() {
        return skip("nobody_waits_behind_a_slow_close", "no strace");
    }
    let mut waited = Vec::new();
    for reset in [false, true] {
        let host = FsHost::with(FsOptions {
            below: std::env::temp_dir(),
            mem_slots: false,
            ..FsOptions::default()
        });
        let (mut guest, node, fh) = rig(&host);
        assert!(guest.vmm.store(0, &[3]));
        let delay = "delay_enter=4000000";
        let mut strace = Strace::attach(host.pid(), "sync_file_range", delay);
        let flush = guest.send(op::FLUSH, node, &abi::flush(fh), 0);
        strace.wait_begun(1);
        let began = Instant::now();
        if reset {
            guest.reset();
            guest.init();
        } else {
            guest.getattr(node).unwrap();
        }
        if began.elapsed() > Duration::from_secs(2) {
            // Whose calls were held back: all of one thread, the one that closes.
            eprintln!("{}", strace.text());
            waited.push((if reset { "a reset and INIT" } else { "a stat" }, began.elapsed()));
        }
        drop(strace);
        if !reset {
            guest.result(flush).unwrap();
        }
    }
    assert!(waited.is_empty(), "waited for another one's disk: {waited:?}");
}

/// Two VMs have a file mapped and open for writing, and nobody stores: its times stay.
#[test]
fn two_vms_that_only_look_leave_the_times() {
    let host = on_a_disk();
    let (mut first, node, fh) = rig(&host);
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
    // All is told of, and durable.
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

/// The host writes a file and sets its time (cp -p, rsync, tar); a guest that has it mapped and open for
/// writing only looks.
#[test]
fn a_time_that_the_host_sets_outlives_a_stat() {
    let host = on_a_disk();
    let (mut guest, node, _) = rig(&host);
    let file = File::options().write(true).open(host.path("file")).unwrap();
    file.write_all_at(b"by the host", 4096).unwrap();
    drop(file);
    make_old(&host, "file");
    seen(&mut guest, node);
    assert_eq!(mtime(&host, "file"), (OLD as i64, 0), "the guest has stored nothing");
}

/// A WRITE moves mtime by itself; a stat behind it tells of that, and of nothing else.
#[test]
fn a_write_is_told_of_once() {
    let host = on_a_disk();
    let (mut guest, node, fh) = rig(&host);
    guest.write(node, fh, 0, b"by request").unwrap();
    let written = mtime(&host, "file");
    thread::sleep(Duration::from_millis(20));
    seen(&mut guest, node);
    assert_eq!(mtime(&host, "file"), written, "a stat is no write");
}

/// At SIGTERM the mappings end, as far as the daemon is concerned: what was stored is told of.
#[test]
fn the_end_of_the_daemon_has_new_times() {
    let mut host = on_a_disk();
    let (mut guest, node, _) = rig(&host);
    assert!(guest.vmm.store(0, &[3]));
    make_old(&host, "file");
    assert!(guest.vmm.store(0, &[4]));
    let _ = (node, &mut guest);
    kill(Pid::from_raw(host.pid() as i32), Signal::SIGTERM).unwrap();
    assert!(host.wait_end().success());
    assert!(mtime(&host, "file").0 > OLD as i64, "stored, and never told of");
}

// --- durability ---

/// A medium error is ENODATA, a path error ENOLINK, a time-out ETIMEDOUT (blk_status_to_errno): who asks for
/// it with WAIT_BEFORE is the last who is told, so it must be remembered like EIO.
#[test]
fn a_loss_by_any_name_is_remembered() {
    if !Strace::is_here() {
        return skip("a_loss_by_any_name_is_remembered", "no strace");
    }
    let mut forgotten = Vec::new();
    for errno in ["EIO", "ENODATA", "ENOLINK", "ETIMEDOUT", "EILSEQ"] {
        let host = on_a_disk();
        let (mut guest, node, fh) = rig(&host);
        assert!(guest.vmm.store(0, &[3]));
        let strace =
            Strace::attach(host.pid(), "sync_file_range", &format!("error={errno}:when=1"));
        guest.flush(node, fh).unwrap();
        drop(strace);
        // One that is too new for the kernel to tell it anything.
        let late = guest.open(node, libc::O_RDWR).unwrap();
        if guest.fsync(node, late).is_ok() {
            forgotten.push(errno);
        }
    }
    assert!(forgotten.is_empty(), "pages were lost, and the fsync succeeds: {forgotten:?}");
}

/// An ext4 on a loop device whose blocks fail that were never written: a guest stores, closes, unmaps; another
/// program opens the file and syncs it. Somebody must be told (Linux tells the first who asks).
#[test]
fn a_loss_that_a_close_has_seen_is_told_to_who_syncs() {
    let script = "mkdir \"$SHARE.t\" && mount -t tmpfs -o size=24M tmpfs \"$SHARE.t\" \
        && truncate -s 128M \"$SHARE.t/img\" \
        && mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=0 \"$SHARE.t/img\" \
        && mount -o loop \"$SHARE.t/img\" \"$SHARE\"";
    for daemon in [false, true] {
        let options = FsOptions { below: std::env::temp_dir(), ..FsOptions::default() };
        let Some(host) = FsHost::with_mounts(options, script) else {
            return skip("a_loss_that_a_close_has_seen_is_told_to_who_syncs", "no mounts");
        };
        // The first half is on the disk.
        let file = File::create(host.path("file")).unwrap();
        file.write_all_at(&vec![1; RANGE as usize / 2], 0).unwrap();
        file.set_len(RANGE).unwrap();
        file.sync_all().unwrap();
        drop(file);
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        assert!(guest.vmm.store(0, &[2]));
        guest.fsync(node, fh).unwrap();
        // The disk breaks.
        let t = PathBuf::from(format!("/proc/{}/root", host.pid()))
            .join(host.dir.path().join("share.t/filler").strip_prefix("/").unwrap());
        let mut filler = File::create(t).unwrap();
        while filler.write(&[1; 4096]).is_ok() {}
        let bad = RANGE / 2 + 4096;
        if daemon {
            assert!(guest.vmm.store(bad, b"lost"));
            guest.flush(node, fh).unwrap(); // Sends it out.
            thread::sleep(Duration::from_millis(500));
            assert!(guest.vmm.store(0, b"good"));
            guest.flush(node, fh).unwrap(); // Hears of the loss.
            guest.release(node, fh).unwrap();
            guest.remove(&[(0, RANGE)]).unwrap();
        } else {
            // What Linux does: the same by a program of the host.
            guest.release(node, fh).unwrap();
            guest.remove(&[(0, RANGE)]).unwrap();
            let file = OpenOptions::new().write(true).open(host.path("file")).unwrap();
            file.write_all_at(b"lost", bad).unwrap();
            start_writing(&file);
            thread::sleep(Duration::from_millis(500));
            file.write_all_at(b"good", 0).unwrap();
            start_writing(&file);
            drop(file);
        }
        let late = guest.open(node, libc::O_RDWR).unwrap();
        let told = guest.fsync(node, late);
        assert!(told.is_err(), "by the daemon: {daemon}: pages were lost, and nobody was told");
    }
}

fn start_writing(file: &File) {
    use std::os::fd::AsRawFd;
    // SAFETY: an open descriptor and three numbers.
    #[allow(unsafe_code)]
    let done =
        unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
    assert_eq!(done, 0);
}

/// README: a sync that failed fails again "until everybody in the guest has closed it". A Linux guest keeps its
/// ranges when it closes a file.
#[test]
fn a_failed_sync_ends_with_the_last_close() {
    if !Strace::is_here() {
        return skip("a_failed_sync_ends_with_the_last_close", "no strace");
    }
    let host = on_a_disk();
    let (mut guest, node, fh) = rig(&host);
    assert!(guest.vmm.store(0, &[3]));
    let strace = Strace::attach(host.pid(), "fsync,fdatasync", "error=EIO:when=1");
    assert_eq!(guest.fsync(node, fh), Err(libc::EIO));
    drop(strace);
    guest.release(node, fh).unwrap();
    let again = guest.open(node, libc::O_RDWR).unwrap();
    guest.write(node, again, 0, &[1; 4096]).unwrap();
    assert_eq!(guest.fsync(node, again), Ok(()), "everybody has closed it");
}

// --- front-ends ---

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

/// A front-end that keeps the maps over a reset (crosvm does): the next driver's maps come where old ones are.
#[test]
fn a_reset_that_keeps_the_maps() {
    let host = FsHost::with(FsOptions { mem_slots: false, ..FsOptions::default() });
    host.put("file", &vec![1; RANGE as usize]);
    host.put("other", &vec![2; RANGE as usize]);
    let mut guest = host.boot();
    let node = guest.node("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    guest.vmm.keep_maps();
    guest.reset();
    guest.init();
    let node = guest.node("other");
    assert_eq!(guest.setup(node, 0, RANGE, BOTH, 0), Ok(()));
    assert_eq!(guest.vmm.fetch(0, 1).unwrap(), [2]);
}

/// The same of pmem, where the table of the start shows the map, also if the guest has moved the BAR meanwhile.
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

/// A map that was refused for another reason than that it is there, of a VM in which another device shows the
/// same file: no flush succeeds, since what the guest stores is nowhere.
#[test]
fn a_refusal_beside_another_devices_map_is_no_window() {
    use common::driver::DriverOptions;
    use common::memory::{GuestMem, RAM_REGION_BYTES, guest_ram};
    use common::strict_vmm::VmmOptions;
    use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

    for mem_slots in [false, true] {
        let host = if mem_slots { Host::with_mem_slots() } else { Host::new() };
        let ram = guest_ram(1);
        let rings = ram.iter().next().unwrap().file_offset().unwrap().file().try_clone().unwrap();
        let theirs = FileOffset::new(host.file.try_clone().unwrap(), 0);
        let ram = GuestMem::from_ranges_with_files(&[
            (GuestAddress(0), RAM_REGION_BYTES as usize, Some(FileOffset::new(rings, 0))),
            (GuestAddress(1 << 33), common::FILE_BYTES as usize, Some(theirs)),
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

/// A stat that comes while another one closes: what was stored before it was sent is in its times.
#[test]
fn a_stat_beside_a_close_has_new_times() {
    if !Strace::is_here() {
        return skip("a_stat_beside_a_close_has_new_times", "no strace");
    }
    let host = on_a_disk();
    let (mut guest, node, fh) = rig(&host);
    assert!(guest.vmm.store(0, &[3]));
    make_old(&host, "file");
    assert!(guest.vmm.store(0, &[4]));
    assert_eq!(mtime(&host, "file").0, OLD as i64, "the host's kernel sees it after all");
    let mut strace = Strace::attach(host.pid(), "sync_file_range", "delay_enter=500000");
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

/// A driver that has sent no flush is bound anew, the front-end drops the map, and does not say so at the start: no
/// flush succeeds while nothing is mapped.
#[test]
fn a_reset_of_an_unused_ring_that_goes_untold() {
    let host = Host::with_mem_slots();
    let mut guest = host.plug_with(
        common::driver::DriverOptions::default(),
        common::strict_vmm::VmmOptions::default(),
        common::memory::guest_ram(2),
    );
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
