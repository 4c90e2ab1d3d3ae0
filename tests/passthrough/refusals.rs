// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which files can't become passthrough files, and which operations a passthrough file refuses.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::process::Command;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use tempfile::NamedTempFile;
use vhost_user_dax::passthrough::{CLAIMED_BYTES, PassthroughMount};

use crate::life::{servers, until};
use crate::map::Map;
use crate::places;
use crate::roles::Player;
use crate::{alone, among_others, file_here, mount, skipped};

fn errno<T>(result: io::Result<T>) -> Errno {
    Errno::from_raw(result.err().expect("an error").raw_os_error().expect("an error of the system"))
}

/// Shows: each file that can't be mapped for writing is refused with a matching errno, although the
/// kernel would accept some of them.
#[test]
fn what_can_not_be_mapped_for_writing_is_refused() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let named = NamedTempFile::new_in(".").unwrap();
    let open = |options: &mut OpenOptions| options.open(named.path()).unwrap();
    let refused = |file: &File| errno(mount.open(file));
    assert_eq!(refused(&open(OpenOptions::new().read(true))), Errno::EACCES);
    assert_eq!(refused(&open(OpenOptions::new().write(true))), Errno::EACCES);
    let by_path = open(OpenOptions::new().read(true).custom_flags(OFlag::O_PATH.bits()));
    assert_eq!(refused(&by_path), Errno::EBADF);
    assert_eq!(refused(&File::open(".").unwrap()), Errno::EACCES);
    let device = OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
    assert_eq!(refused(&device), Errno::EINVAL);

    // A file without write permission can only have been opened for reading.
    fs::set_permissions(named.path(), std::os::unix::fs::PermissionsExt::from_mode(0o444)).unwrap();
    assert_eq!(refused(&open(OpenOptions::new().read(true))), Errno::EACCES);

    // A file that was opened for writing and made immutable or append-only afterwards.
    let writable = open(OpenOptions::new().read(true).write(true));
    for flag in ["i", "a"] {
        let chattr = |sign: &str| {
            let done =
                Command::new("chattr").arg(format!("{sign}{flag}")).arg(named.path()).status();
            done.is_ok_and(|status| status.success())
        };
        if !chattr("+") {
            skipped("immutable files: chattr failed");
            break;
        }
        let error = refused(&writable);
        assert!(chattr("-"));
        assert_eq!(error, Errno::EPERM);
    }
    assert!(mount.open(&writable).is_ok());
}

/// Shows: a file as long as the claimed length is refused, and a file whose file systems are
/// stacked too deep.
#[test]
fn too_long_or_too_deep_is_refused() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let long = tempfile::tempfile_in("/dev/shm").unwrap();
    long.set_len(CLAIMED_BYTES).unwrap();
    assert_eq!(errno(mount.open(&long)), Errno::EFBIG);
    long.set_len(CLAIMED_BYTES - 1).unwrap();
    let passthrough = mount.open(&long).unwrap();
    assert_eq!(errno(mount.open(&passthrough)), Errno::EFBIG);
    match places::overlay().and_then(|below| Ok((places::overlay_over(&below)?, below))) {
        Ok((place, _below)) => {
            assert_eq!(errno(mount.open(&place.create("file"))), Errno::ELOOP);
        }
        Err(e) => skipped(&format!("overlayfs over overlayfs: {e}")),
    }
}

/// Shows: a passthrough descriptor can't resize the file, and a sync of it fails: it would write
/// nothing back, so it must not report success.
#[test]
fn no_resize_and_no_false_sync() {
    let _others = among_others();
    let Some(mount) = mount() else { return };
    let real = file_here(5000);
    let passthrough = mount.open(&real).unwrap();
    // Twice: the kernel remembers which operations are not implemented.
    for _ in 0..2 {
        assert_eq!(errno(passthrough.sync_data()), Errno::EINVAL);
        assert_eq!(errno(passthrough.sync_all()), Errno::EINVAL);
        assert_eq!(errno(passthrough.set_len(10)), Errno::EPERM);
        assert_eq!(errno(passthrough.set_modified(std::time::UNIX_EPOCH)), Errno::EPERM);
        for flags in [
            FallocateFlags::empty(),
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
        ] {
            assert_eq!(fallocate(&*passthrough, flags, 0, 4096), Err(Errno::EOPNOTSUPP));
        }
    }
    assert_eq!(real.metadata().unwrap().len(), 5000);
}

/// Shows: after an abort of the FUSE connection the next `open` makes a new one without a delay,
/// also when several threads call it at once. The thread of the old connection ends, and old maps
/// keep working.
#[test]
fn an_aborted_connection_is_made_anew() {
    let _alone = alone();
    let Some(mount) = mount() else { return };
    let list = places::connections();
    let real = file_here(5000);
    for round in 0..5_u8 {
        let passthrough = mount.open(&real).unwrap();
        let number = nix::sys::stat::minor(passthrough.metadata().unwrap().dev());
        fs::write(list.join(number.to_string()).join("abort"), "1").unwrap();
        let map = Map::of(&passthrough, 4096);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let again = Map::of(&mount.open(&real).unwrap(), 4096);
                    assert_eq!(again.load(1, 1), [0]);
                });
            }
        });
        until("only the thread of the new connection is left", || servers() == 1);
        map.store(0, &[round]);
        let mut seen = [0; 1];
        std::os::unix::fs::FileExt::read_exact_at(&real, &mut seen, 0).unwrap();
        assert_eq!(seen, [round]);
    }
    drop(mount);
    assert_eq!(servers(), 0);
}

/// Shows: without privilege the error names what is missing: /dev/fuse can't be opened, or
/// CAP_SYS_ADMIN.
#[test]
fn without_privilege_the_reason_is_clear() {
    let _others = among_others();
    if mount().is_none() {
        return;
    }
    let mut nobody = Player::start("refused", Some(65534));
    let mut error = String::new();
    nobody.line.read_to_string(&mut error).unwrap();
    nobody.join();
    assert!(
        error.contains("/dev/fuse can't be opened") || error.contains("CAP_SYS_ADMIN"),
        "{error}"
    );

    // All of root's capabilities except CAP_SYS_ADMIN.
    let error = thread_without_sys_admin();
    assert!(error.contains("CAP_SYS_ADMIN is needed (fsopen returned EPERM)"), "{error}");
}

/// Capabilities belong to a thread, so a thread of its own drops one and tries.
fn thread_without_sys_admin() -> String {
    let thread = std::thread::spawn(|| {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(rustix::thread::CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
        PassthroughMount::new().err().unwrap().to_string()
    });
    thread.join().unwrap()
}
