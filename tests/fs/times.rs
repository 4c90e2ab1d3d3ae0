// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that a store through the window, which makes no request, gives its file new times by the
//! next close, fsync, msync or stat. A file without a store keeps its times, and so does a file
//! whose times the guest has set. A guest caches no attributes of a file that it may map. Each test
//! runs on the file system of TMPDIR, and in memory.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, Arg, MAP_READ, MAP_WRITE, op, u32_at, u64_at};
use testkit::slow::skip;

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// The time to which the host, or the guest, sets mtime, in seconds since the epoch.
const OLD: u64 = 1000;

/// A file of four ranges that is open for writing; the first two ranges are granted for writing.
struct Fixture {
    guest: FsGuest,
    host: FsHost,
    node: u64,
    fh: u64,
    in_memory: bool,
    /// Number of bytes of one store.
    bytes: usize,
}

impl Fixture {
    fn new(below: PathBuf, in_memory: bool, bytes: usize) -> Self {
        // A reset with live maps ends QEMU if its memory table has slots (Q12).
        let host = FsHost::with(FsOptions { below, mem_slots: false, ..FsOptions::default() });
        host.put("file", &vec![1; 4 * RANGE as usize]);
        File::open(host.path("file")).unwrap().sync_all().unwrap();
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        guest.setup(node, RANGE, RANGE, BOTH, RANGE).unwrap();
        Self { guest, host, node, fh, in_memory, bytes }
    }

    /// A store of the guest to the first range.
    fn store(&mut self) {
        assert!(self.guest.vmm.store(0, &vec![7; self.bytes]));
    }

    /// Two stores, of which the second meets dirty pages, so that the host's kernel changes no
    /// time.
    fn store_to_dirty(&mut self) {
        self.store();
        self.make_old();
        self.store();
        assert!(self.is_old(), "the host's kernel has changed mtime");
    }

    /// The host sets mtime to `OLD`.
    fn make_old(&self) {
        let file = File::options().write(true).open(self.host.path("file")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(OLD)).unwrap();
    }

    fn times(&self) -> [(i64, i64); 2] {
        let found = fs::metadata(self.host.path("file")).unwrap();
        [(found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec())]
    }

    fn is_old(&self) -> bool {
        self.times()[0] == (OLD as i64, 0)
    }

    fn flush(&mut self) {
        self.guest.flush(self.node, self.fh).unwrap();
    }

    fn close(&mut self) {
        self.flush();
        self.guest.release(self.node, self.fh).unwrap();
    }

    fn open(&mut self) {
        self.fh = self.guest.open(self.node, libc::O_RDWR).unwrap();
    }

    fn set(&mut self, arg: &Arg) {
        self.guest.call(op::SETATTR, self.node, arg, abi::ATTR_OUT).unwrap();
    }

    /// mtime from GETATTR.
    fn seen(&mut self) -> (u64, u32) {
        let body = self.guest.call(op::GETATTR, self.node, &abi::getattr(), abi::ATTR_OUT).unwrap();
        (u64_at(&body, 16 + 32), u32_at(&body, 16 + 52))
    }
}

/// Runs a test with stores of 4 KiB and 2 MiB, on a disk and in memory.
fn everywhere(case: impl Fn(&mut Fixture)) {
    for (below, in_memory) in [(std::env::temp_dir(), false), ("/dev/shm".into(), true)] {
        let is_memory = below.starts_with("/dev/shm");
        if is_memory != in_memory {
            continue; // TMPDIR is in memory: one run there is enough.
        }
        for bytes in [4096, RANGE as usize] {
            let mut fixture = Fixture::new(below.clone(), in_memory, bytes);
            case(&mut fixture);
        }
    }
}

/// Shows: a store, to a clean page or to a dirty one, has changed mtime and ctime when the next
/// FLUSH or FSYNC returns.
#[test]
fn a_close_and_a_sync_have_new_times() {
    everywhere(|fixture| {
        for way in 0..3 {
            let before = fixture.times();
            fixture.store();
            fixture.flush();
            let first = fixture.times();
            assert!(first > before && first[1] > before[1], "the first store: {before:?}");
            fixture.store_to_dirty();
            let before = fixture.times();
            match way {
                0 => fixture.flush(),
                1 => fixture.guest.fsync(fixture.node, fixture.fh).unwrap(),
                _ => {
                    let datasync = abi::fsync(fixture.fh, true);
                    fixture.guest.call(op::FSYNC, fixture.node, &datasync, 0).unwrap();
                }
            }
            let after = fixture.times();
            assert!(!fixture.is_old() && after[1] > before[1], "way {way}: {before:?}, {after:?}");
        }
    });
}

/// Shows: a store changes the times though the host's kernel has written its page out before the
/// close.
#[test]
fn a_store_that_was_written_out_has_new_times() {
    everywhere(|fixture| {
        fixture.store();
        fixture.flush();
        let before = fixture.times();
        fixture.store();
        File::open(fixture.host.path("file")).unwrap().sync_all().unwrap();
        fixture.flush();
        assert!(fixture.times()[0] > before[0]);
        // Another store, to the page that is clean now.
        fixture.make_old();
        fixture.store();
        fixture.flush();
        assert!(!fixture.is_old());
    });
}

/// Shows: a stat after a store has new times; the next stat has the same times.
#[test]
fn a_stat_has_new_times_once() {
    everywhere(|fixture| {
        fixture.store();
        let first = fixture.seen();
        assert!(first.0 > OLD && fixture.seen() == first);
        assert_eq!(fixture.guest.node("file"), fixture.node);
        assert_eq!(fixture.seen(), first);
        if fixture.in_memory {
            return; // A store to a dirty page changes the times at the next close.
        }
        // A stat starts the write-out of pages. A store to a page under writeback changes the times
        // twice.
        let at_rest =
            |fixture: &mut Fixture| fixture.guest.fsync(fixture.node, fixture.fh).unwrap();
        at_rest(fixture);
        fixture.store_to_dirty();
        let second = fixture.seen();
        assert!(second > first && fixture.seen() == second, "{first:?}, {second:?}");
        at_rest(fixture);
        fixture.store_to_dirty();
        let body =
            fixture.guest.call(op::LOOKUP, abi::ROOT, &Arg::new().name("file"), abi::ENTRY_OUT);
        assert!(u64_at(&body.unwrap(), 40 + 32) > OLD, "LOOKUP");
        at_rest(fixture);
        fixture.store_to_dirty();
        fixture.guest.names().unwrap();
        assert!(!fixture.is_old(), "READDIRPLUS");
        at_rest(fixture);
        let third = fixture.seen();
        fixture.flush();
        assert_eq!(fixture.seen(), third, "a close after the stat");
    });
}

/// Shows: a file that is opened for writing, closed, synced and looked at, but not stored to, keeps
/// its times.
#[test]
fn an_unwritten_file_keeps_its_times() {
    everywhere(|fixture| {
        fixture.store();
        fixture.close();
        fixture.make_old();
        // Opened for reading: no handle can write.
        let reader = fixture.guest.open(fixture.node, libc::O_RDONLY).unwrap();
        assert_eq!(fixture.seen(), (OLD, 0));
        fixture.guest.flush(fixture.node, reader).unwrap();
        fixture.guest.fsync(fixture.node, reader).unwrap();
        fixture.guest.release(fixture.node, reader).unwrap();
        assert!(fixture.is_old(), "read");
        // The host writes to the file, and sets its times.
        fixture.host.put("other", b"");
        File::options()
            .write(true)
            .open(fixture.host.path("file"))
            .unwrap()
            .set_len(3 * RANGE)
            .unwrap();
        fixture.make_old();
        if fixture.in_memory {
            return; // In memory the daemon can't know that nothing was stored.
        }
        for _ in 0..2 {
            fixture.open();
            fixture.seen();
            fixture.guest.fsync(fixture.node, fixture.fh).unwrap();
            fixture.close();
            assert!(fixture.is_old(), "opened for writing");
        }
        fixture.open();
        fixture.guest.remove(&[(0, RANGE)]).unwrap();
        fixture.guest.remove(&[(RANGE, RANGE)]).unwrap();
        fixture.close();
        assert!(fixture.is_old(), "its grant was removed");
    });
}

/// Shows: an mtime that the guest sets stays, as cp -p, tar and rsync set it before they close;
/// also after changes of other attributes, and after REMOVEMAPPING. A later store changes it.
#[test]
fn a_time_that_the_guest_sets_stays() {
    everywhere(|fixture| {
        for _ in 0..2 {
            fixture.store();
            fixture.set(&abi::set_mtime(OLD));
            fixture.flush();
            assert!(fixture.is_old(), "a close");
            fixture.set(&abi::set_mode(0o640));
            fixture.guest.rename("file", "file.new").unwrap();
            fixture.guest.rename("file.new", "file").unwrap();
            fixture.guest.fsync(fixture.node, fixture.fh).unwrap();
            assert_eq!(fixture.seen(), (OLD, 0));
            fixture.guest.remove(&[(RANGE, RANGE)]).unwrap();
            fixture.close();
            assert!(fixture.is_old(), "chmod, rename, fsync, REMOVEMAPPING, close");
            fixture.open();
            fixture.guest.setup(fixture.node, RANGE, RANGE, BOTH, RANGE).unwrap();
            fixture.set(&abi::set_mtime(OLD));
            if fixture.in_memory {
                // In memory, only an open or a grant announces later stores.
                fixture.close();
                fixture.open();
            }
            fixture.store();
            fixture.flush();
            assert!(!fixture.is_old(), "a store after it");
        }
    });
}

/// Shows: a change of other attributes does not hide an earlier store.
#[test]
fn a_chmod_behind_a_store_has_new_times() {
    everywhere(|fixture| {
        if fixture.in_memory {
            return;
        }
        fixture.store_to_dirty();
        fixture.set(&abi::set_mode(0o600));
        assert!(!fixture.is_old());
        fixture.store();
        fixture.make_old();
        fixture.set(&abi::set_mode(0o640));
        fixture.flush();
        assert!(!fixture.is_old());
    });
}

/// Shows: a store changes the times when its range is removed, as the last one or before that, and
/// when the guest unmounts, resets the device, or ends.
#[test]
fn the_end_of_a_grant_has_new_times() {
    everywhere(|fixture| {
        fixture.store_to_dirty();
        fixture.guest.remove(&[(0, RANGE)]).unwrap();
        fixture.flush();
        assert!(!fixture.is_old(), "one of two");
        assert!(fixture.guest.vmm.store(RANGE, &[1]));
        fixture.make_old();
        assert!(fixture.guest.vmm.store(RANGE, &[2]));
        fixture.guest.remove(&[(RANGE, RANGE)]).unwrap();
        assert!(!fixture.is_old(), "the last one");
        fixture.guest.setup(fixture.node, 0, RANGE, BOTH, 0).unwrap();
        fixture.store_to_dirty();
        fixture.guest.init();
        assert!(!fixture.is_old(), "INIT");
    });
    everywhere(|fixture| {
        fixture.store_to_dirty();
        fixture.guest.reset();
        fixture.guest.init();
        assert!(!fixture.is_old(), "a reset");
    });
}

/// Shows: the same if the VM is killed.
#[test]
fn the_end_of_the_vm_has_new_times() {
    for below in [std::env::temp_dir(), "/dev/shm".into()] {
        let mut fixture = Fixture::new(below, false, 4096);
        fixture.store_to_dirty();
        let Fixture { guest, mut host, .. } = fixture;
        guest.kill();
        host.wait_end();
        let found = fs::metadata(host.path("file")).unwrap();
        assert!(found.mtime() > OLD as i64);
    }
}

/// Shows: with two handles, each close changes the times for stores before it, and the second one
/// for no others. RELEASE changes them for a store by mmap after the last FLUSH.
#[test]
fn two_handles() {
    everywhere(|fixture| {
        let first = fixture.fh;
        fixture.open();
        fixture.store_to_dirty();
        fixture.guest.flush(fixture.node, first).unwrap();
        assert!(!fixture.is_old());
        let before = fixture.times();
        fixture.guest.release(fixture.node, first).unwrap();
        assert_eq!(fixture.times(), before, "RELEASE after FLUSH");
        if fixture.in_memory {
            return; // In memory each close of a file that is open for writing counts as a store.
        }
        fixture.flush();
        assert_eq!(fixture.times(), before, "nothing was stored");
        fixture.store_to_dirty();
        fixture.guest.release(fixture.node, fixture.fh).unwrap();
        assert!(!fixture.is_old(), "RELEASE");
    });
}

/// Shows: a hole that the daemon punches by stores of zeros (`--persist=cacheline`) changes the
/// times.
#[test]
fn a_hole_past_the_cache_has_new_times() {
    let options =
        FsOptions { persist: "cacheline".into(), below: "/dev/shm".into(), ..FsOptions::default() };
    let host = FsHost::with(options);
    host.put("file", &vec![1; 2 * RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    for at in [5, 4100] {
        let file = File::options().write(true).open(host.path("file")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(OLD)).unwrap();
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        guest.fallocate(node, fh, at, 100, mode).unwrap();
        assert_eq!(guest.vmm.fetch(at, 100).unwrap(), vec![0; 100]);
        assert!(fs::metadata(host.path("file")).unwrap().mtime() > OLD as i64, "{at}");
    }
}

/// Shows: attributes have a timeout of 0 for all regular files if the guest maps all files, else
/// for the files with FUSE_ATTR_DAX. Attributes of other files have their usual timeout.
#[test]
fn attributes_of_mapped_files_are_valid_for_no_time() {
    for (inode_dax, small_too) in [(false, true), (true, false)] {
        let options = FsOptions { dax: "inode", ..FsOptions::default() };
        let host = FsHost::told(options, &["--cache", "always"]);
        host.put("large", &vec![1; 2 * RANGE as usize]);
        host.put("small", b"small");
        let mut guest = host.plug();
        guest.start();
        let flags = abi::MAP_ALIGNMENT | if inode_dax { abi::HAS_INODE_DAX } else { 0 };
        guest.init_with(flags);
        for (name, valid) in [("large", false), ("small", !small_too)] {
            let arg = Arg::new().name(name);
            let body = guest.call(op::LOOKUP, abi::ROOT, &arg, abi::ENTRY_OUT).unwrap();
            assert!(u64_at(&body, 16) > 0, "{name}: the name itself is valid");
            assert_eq!(u64_at(&body, 24) > 0, valid, "{name}: LOOKUP, {inode_dax}");
            let node = u64_at(&body, 0);
            let body = guest.call(op::GETATTR, node, &abi::getattr(), abi::ATTR_OUT).unwrap();
            assert_eq!(u64_at(&body, 0) > 0, valid, "{name}: GETATTR, {inode_dax}");
            let body = guest.call(op::SETATTR, node, &abi::set_mode(0o644), abi::ATTR_OUT).unwrap();
            assert_eq!(u64_at(&body, 0) > 0, valid, "{name}: SETATTR, {inode_dax}");
        }
        let body = guest.call(op::GETATTR, abi::ROOT, &abi::getattr(), abi::ATTR_OUT).unwrap();
        assert!(u64_at(&body, 0) > 0, "a directory");
        // A large file that was mapped and has become small keeps DAX.
        let (large, fh) = guest.opened("large");
        guest.setup(large, 0, RANGE, BOTH, 0).unwrap();
        let body = guest.call(op::SETATTR, large, &abi::set_size(5), abi::ATTR_OUT).unwrap();
        assert_eq!(u64_at(&body, 0), 0, "SETATTR");
        guest.remove(&[(0, RANGE)]).unwrap();
        guest.release(large, fh).unwrap();
        let body = guest.call(op::GETATTR, large, &abi::getattr(), abi::ATTR_OUT).unwrap();
        assert_eq!(u64_at(&body, 0), 0, "it has become small");
    }
}

/// Shows: a guest with a window clears setuid and setgid bits itself, since its stores make no
/// request. The daemon logs a warning at start.
#[test]
fn no_killpriv_v2_beside_a_window() {
    const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    for (window_bytes, offered) in [(16 * RANGE, false), (0, true)] {
        let options = FsOptions { window_bytes, dax: "inode", ..FsOptions::default() };
        let host = FsHost::told(options, &["--killpriv-v2"]);
        let mut guest = host.plug();
        guest.start();
        let flags = guest.init_with(abi::MAP_ALIGNMENT | HANDLE_KILLPRIV_V2).flags;
        assert_eq!(flags & HANDLE_KILLPRIV_V2 != 0, offered);
        let said = host.said().matches("killpriv").count();
        assert_eq!(said, usize::from(!offered), "{}", host.said());
    }
}

/// Shows: a guest that maps files gets no writeback cache: it would keep mtime itself, and not see
/// the mtime of its stores through the window. A guest that maps no files gets it.
#[test]
fn no_writeback_cache_beside_a_window() {
    const WRITEBACK_CACHE: u64 = 1 << 16;
    let host = FsHost::told(FsOptions::default(), &["--writeback"]);
    assert_eq!(host.said().matches("--writeback has no effect").count(), 1, "{}", host.said());
    let mut guest = host.plug();
    guest.start();
    for (more, offered) in [(abi::MAP_ALIGNMENT, false), (0, true)] {
        let flags = guest.init_with(more | WRITEBACK_CACHE).flags;
        assert_eq!(flags & WRITEBACK_CACHE != 0, offered);
    }
}

/// Logs that a second file system to test is missing.
#[test]
fn memory_and_a_disk_are_tried() {
    if std::env::temp_dir().starts_with("/dev/shm") {
        skip("fs_times on a disk", "TMPDIR is in memory");
    }
}
