// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that on a full disk a grant for writing is ENOSPC before the guest can store, and that it
//! succeeds after blocks were freed.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::slow::skip;

const BOTH: u64 = MAP_READ | MAP_WRITE;
const DISK: u64 = 8 << 20;
const PAGE: u64 = 4096;

/// Shows a hole that does not fit, and that fits after a deletion.
#[test]
fn a_hole_on_a_full_disk() {
    let Some(host) = FsHost::on_small_tmpfs(FsOptions::default(), DISK) else {
        return skip("a_hole_on_a_full_disk", "no mount namespace (not root?)");
    };
    host.put("big", &vec![b'b'; 7 << 20]);
    File::create(host.path("sparse")).unwrap().set_len(2 * RANGE).unwrap();
    let mut guest = host.boot();
    let (node, fh) = guest.opened("sparse");
    for _again in 0..3 {
        assert_eq!(guest.setup(node, 0, RANGE, BOTH, 0), Err(libc::ENOSPC));
        assert_eq!(guest.vmm.mapped_bytes(), 0, "mapped for writing without blocks");
    }
    // Ranges that have blocks can be granted.
    let big = guest.node("big");
    guest.setup(big, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(0, b"stored"));
    guest.unlink("big").unwrap();
    guest.remove(&[(0, RANGE)]).unwrap();
    guest.forget(big, 1);
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    for page in (0..RANGE).step_by(PAGE as usize) {
        assert!(guest.vmm.store(page, b"every page has its block"));
    }
    assert_eq!(guest.fsync(node, fh), Ok(()));
    assert!(std::fs::metadata(host.path("sparse")).unwrap().blocks() * 512 >= RANGE);
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that on a full disk a read grant can't become a write grant, and stays a read grant.
#[test]
fn an_upgrade_on_a_full_disk() {
    let Some(host) = FsHost::on_small_tmpfs(FsOptions::default(), DISK) else {
        return skip("an_upgrade_on_a_full_disk", "no mount namespace (not root?)");
    };
    let sparse = File::create(host.path("sparse")).unwrap();
    sparse.set_len(RANGE).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"a first page", 0).unwrap();
    host.put("big", &vec![b'b'; 7 << 20]);
    let mut guest = host.boot();
    let (node, fh) = guest.opened("sparse");
    guest.setup(node, 0, RANGE, MAP_READ, 0).unwrap();
    assert_eq!(guest.setup(node, 0, RANGE, BOTH, 0), Err(libc::ENOSPC));
    assert_eq!(guest.vmm.fetch(0, 12).unwrap(), b"a first page");
    // WRITE needs a block, too, and is ENOSPC.
    let mut at = PAGE;
    let errno = loop {
        match guest.write(node, fh, at, &[1; PAGE as usize]) {
            Ok(_) => at += PAGE,
            Err(errno) => break errno,
        }
        assert!(at < RANGE, "the disk was not full");
    };
    assert_eq!(errno, libc::ENOSPC);
    guest.unlink("big").unwrap();
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert!(guest.vmm.store(RANGE - PAGE, b"the last page"));
    guest.power_off();
    assert!(host.ended().success());
}
