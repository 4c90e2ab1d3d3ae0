// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that FSYNC is answered after its file was synced and not before, that each FSYNC fails
//! after a failed one while the file is open, and that stores through the window are synced, too.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, MAP_READ, MAP_WRITE, op};
use testkit::slow::{DELAY, SYNCS, Strace, skip};

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// All system calls that write a file's bytes to its disk.
const ALL_SYNCS: &str = "fsync,fdatasync,syncfs,msync,sync_file_range";

/// Whether a sync of the file `name` has returned success, by the lines of strace.
fn synced(strace: &mut Strace, name: &str) -> bool {
    let end = format!("{name}>");
    let text = strace.text();
    // strace prints one line, or two with the thread's number.
    text.lines().any(|line| {
        let begins = line.contains("sync(") && line.contains(&end);
        begins && (line.contains(" = 0") || line.contains("<unfinished"))
    }) && text.contains(" = 0")
}

/// Shows that each kind of change is synced before the reply: a WRITE, a store through the window,
/// a store to a range that was removed since, a growth.
#[test]
fn fsync_syncs_what_was_changed_in_any_way() {
    if !Strace::is_here() {
        return skip("fsync_syncs_what_was_changed_in_any_way", "no strace");
    }
    let host = FsHost::new();
    let mut guest = host.boot();
    let names = ["written", "stored", "removed", "grown"];
    let files = names.map(|name| {
        host.put(name, &vec![1; RANGE as usize]);
        guest.opened(name)
    });
    for (i, (node, fh)) in files.into_iter().enumerate() {
        match names[i] {
            "written" => assert_eq!(guest.write(node, fh, 0, b"dirty"), Ok(5)),
            "grown" => assert_eq!(guest.set_size(node, 2 * RANGE).unwrap().size, 2 * RANGE),
            _ => {
                guest.setup(node, 0, RANGE, BOTH, i as u64 * RANGE).unwrap();
                assert!(guest.vmm.store(i as u64 * RANGE, b"dirty"));
            }
        }
        if names[i] == "removed" {
            guest.remove(&[(i as u64 * RANGE, RANGE)]).unwrap();
        }
        let mut strace = Strace::attach(host.pid(), ALL_SYNCS, "");
        guest.fsync(node, fh).unwrap();
        assert!(synced(&mut strace, names[i]), "{}: not synced: {}", names[i], strace.text());
    }
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that fsync(2) and fdatasync(2) of the guest wait for a slow disk, after a store through
/// the window and after a WRITE.
#[test]
fn fsync_waits_for_the_disk() {
    if !Strace::is_here() {
        return skip("fsync_waits_for_the_disk", "no strace");
    }
    let host = FsHost::new();
    host.put("file", &vec![1; RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let mut pending = Vec::new();
    for datasync in [false, true] {
        assert!(guest.vmm.store(0, &[2]));
        pending.push(guest.send(op::FSYNC, node, &abi::fsync(fh, datasync), 0));
    }
    strace.wait_begun(1);
    for (i, pending) in pending.into_iter().enumerate() {
        guest.result(pending).unwrap();
        assert!(strace.ended() >= 1, "FSYNC {i} was answered before any sync had ended");
    }
    drop(strace);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that a sync that began before a store does not answer the FSYNC sent after the store.
#[test]
fn a_sync_that_began_before_is_not_enough() {
    if !Strace::is_here() {
        return skip("a_sync_that_began_before_is_not_enough", "no strace");
    }
    let host = FsHost::new();
    host.put("file", &vec![1; RANGE as usize]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"first"));
    let mut strace = Strace::attach(host.pid(), SYNCS, DELAY);
    let first = guest.send_fsync(node, fh);
    strace.wait_begun(1);
    assert!(guest.vmm.store(4096, b"second"));
    let second = guest.send_fsync(node, fh);
    guest.result(first).unwrap();
    guest.result(second).unwrap();
    assert!(strace.begun() >= 2 && strace.ended() >= 2, "one sync for both: {}", strace.text());
    drop(strace);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that after a failed sync each FSYNC of that file is EIO while the file is open, through
/// each handle, and that other files are not affected.
#[test]
fn a_failed_fsync_is_not_forgotten() {
    if !Strace::is_here() {
        return skip("a_failed_fsync_is_not_forgotten", "no strace");
    }
    let host = FsHost::without_filter();
    host.put("bad", &vec![1; RANGE as usize]);
    host.put("good", &vec![1; RANGE as usize]);
    let mut guest = host.boot();
    let (bad, bad_fh) = guest.opened("bad");
    let (good, good_fh) = guest.opened("good");
    guest.setup(bad, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"lost"));
    let strace = Strace::attach(host.pid(), SYNCS, "error=EIO");
    assert_eq!(guest.fsync(bad, bad_fh), Err(libc::EIO));
    drop(strace);
    // The disk works again, but the bytes may be lost.
    assert_eq!(guest.fsync(bad, bad_fh), Err(libc::EIO), "a failed sync was forgotten");
    let datasync = guest.call(op::FSYNC, bad, &abi::fsync(bad_fh, true), 0);
    assert_eq!(datasync, Err(libc::EIO));
    guest.write(bad, bad_fh, 0, b"again").unwrap();
    assert_eq!(guest.fsync(bad, bad_fh), Err(libc::EIO), "a WRITE made it forgotten");
    guest.remove(&[(0, RANGE)]).unwrap();
    assert_eq!(guest.fsync(bad, bad_fh), Err(libc::EIO), "REMOVEMAPPING made it forgotten");
    let second = guest.open(bad, libc::O_RDWR).unwrap();
    assert_eq!(guest.fsync(bad, second), Err(libc::EIO), "a second handle");
    guest.release(bad, bad_fh).unwrap();
    assert_eq!(guest.fsync(bad, second), Err(libc::EIO), "while it is open");
    assert_eq!(guest.fsync(good, good_fh), Ok(()), "another file");
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that lost pages are reported, by whichever of the two open files the kernel reports them.
/// It does so once for each open file, and the guest's handle or the window's own file may be the
/// only one that was open at the loss.
#[test]
fn an_error_of_either_open_file_is_an_error() {
    if !Strace::is_here() {
        return skip("an_error_of_either_open_file_is_an_error", "no strace");
    }
    for (call, datasync) in [
        ("fsync", false),
        ("fdatasync", true),
        ("sync_file_range", false),
        ("sync_file_range", true),
    ] {
        let host = FsHost::without_filter();
        host.put("file", &vec![1; RANGE as usize]);
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        assert!(guest.vmm.store(0, b"dirty"));
        let mut strace = Strace::attach(host.pid(), call, "error=EIO:when=1");
        let fsync = |guest: &mut FsGuest| {
            guest.call(op::FSYNC, node, &abi::fsync(fh, datasync), 0).map(drop)
        };
        assert_eq!(fsync(&mut guest), Err(libc::EIO), "{call}, {datasync}: {}", strace.text());
        drop(strace);
        assert_eq!(fsync(&mut guest), Err(libc::EIO), "{call}, {datasync}: forgotten");
        guest.power_off();
        assert!(host.ended().success());
    }
}

/// A medium error is ENODATA, a path error ENOLINK, a time-out ETIMEDOUT (blk_status_to_errno). The
/// kernel reports it once, to a caller with WAIT_BEFORE, so the daemon must keep it like EIO.
#[test]
fn a_loss_by_any_name_is_remembered() {
    if !Strace::is_here() {
        return skip("a_loss_by_any_name_is_remembered", "no strace");
    }
    let mut forgotten = Vec::new();
    for errno in ["EIO", "ENODATA", "ENOLINK", "ETIMEDOUT", "EILSEQ"] {
        let host = FsHost::without_filter();
        let (mut guest, node, fh) = host.boot_with_stored_file();
        assert!(guest.vmm.store(0, &[3]));
        let strace =
            Strace::attach(host.pid(), "sync_file_range", &format!("error={errno}:when=1"));
        assert_eq!(guest.flush(node, fh), Err(libc::EIO), "{errno}");
        drop(strace);
        // A handle that was opened too late for the kernel to report the loss through it.
        let late = guest.open(node, libc::O_RDWR).unwrap();
        if guest.fsync(node, late).is_ok() {
            forgotten.push(errno);
        }
    }
    assert!(forgotten.is_empty(), "FSYNC succeeds after a loss of pages: {forgotten:?}");
}

/// An ext4 on a loop device, whose blocks fail if they were never written. A guest stores, closes
/// and unmaps; another program opens the file and syncs it. One of them must get the error (Linux
/// reports it to the first one).
#[test]
fn a_loss_that_a_close_has_met_is_reported_to_a_sync() {
    let script = "mkdir \"$SHARE.t\" && mount -t tmpfs -o size=24M tmpfs \"$SHARE.t\" \
        && truncate -s 128M \"$SHARE.t/img\" \
        && mkfs.ext4 -q -F -O ^has_journal -E lazy_itable_init=0 \"$SHARE.t/img\" \
        && mount -o loop \"$SHARE.t/img\" \"$SHARE\"";
    let options = FsOptions { below: std::env::temp_dir(), ..FsOptions::default() };
    let Some(host) = FsHost::with_mounts(options, script) else {
        return skip("a_loss_that_a_close_has_met_is_reported_to_a_sync", "no mounts");
    };
    // The first half is written to the disk.
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
    // The disk begins to fail.
    let filler = host.dir.path().join("share.t/filler");
    let filler = filler.strip_prefix("/").unwrap();
    let filler = PathBuf::from(format!("/proc/{}/root", host.parent_pid())).join(filler);
    let mut filler = File::create(filler).unwrap();
    while filler.write(&[1; 4096]).is_ok() {}
    assert!(guest.vmm.store(RANGE / 2 + 4096, b"lost"));
    // The first FLUSH writes the page out. A later FLUSH waits for it, and reports the loss.
    let mut told = Ok(());
    for round in 0..8 {
        told = told.and(guest.flush(node, fh));
        assert!(guest.vmm.store(0, &[round]));
    }
    assert_eq!(told, Err(libc::EIO));
    guest.release(node, fh).unwrap();
    guest.remove(&[(0, RANGE)]).unwrap();
    let late = guest.open(node, libc::O_RDWR).unwrap();
    assert_eq!(
        guest.fsync(node, late),
        Err(libc::EIO),
        "pages were lost, and no call has reported it"
    );
}

/// docs/durability.md: after a failed sync each sync fails until all processes have closed the
/// file. A Linux guest keeps its ranges when it closes a file.
#[test]
fn a_failed_sync_ends_with_the_last_close() {
    if !Strace::is_here() {
        return skip("a_failed_sync_ends_with_the_last_close", "no strace");
    }
    let host = FsHost::without_filter();
    let (mut guest, node, fh) = host.boot_with_stored_file();
    assert!(guest.vmm.store(0, &[3]));
    let strace = Strace::attach(host.pid(), "fsync,fdatasync", "error=EIO:when=1");
    assert_eq!(guest.fsync(node, fh), Err(libc::EIO));
    drop(strace);
    guest.release(node, fh).unwrap();
    let again = guest.open(node, libc::O_RDWR).unwrap();
    guest.write(node, again, 0, &[1; 4096]).unwrap();
    assert_eq!(guest.fsync(node, again), Ok(()), "all handles were closed");
}
