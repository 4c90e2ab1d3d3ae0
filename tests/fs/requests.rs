// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that valid requests are served: each request of the driver once, over one queue and over
//! several, with and without indirect descriptors.

use testkit::fs::{FsHost, FsOptions, RANGE, WINDOW};
use testkit::fuse::{FIRST, FsGuest};
use testkit::fuse_abi::{self as abi, ROOT, op};

/// Each request once, on one file.
fn one_of_each(host: &FsHost, guest: &mut FsGuest, name: &str) {
    let (node, fh) = guest.create(name).unwrap();
    assert_eq!(guest.write(node, fh, 0, b"some bytes"), Ok(10));
    assert_eq!(host.get(name), b"some bytes");
    assert_eq!(guest.read(node, fh, 5, 100).unwrap(), b"bytes");
    assert_eq!(guest.getattr(node).unwrap().size, 10);
    assert_eq!(guest.set_size(node, 4).unwrap().size, 4);
    assert_eq!(host.get(name), b"some");
    guest.fallocate(node, fh, 0, 8192, 0).unwrap();
    assert_eq!(guest.getattr(node).unwrap().size, 8192);
    guest.fsync(node, fh).unwrap();
    guest.flush(node, fh).unwrap();

    let copy = format!("{name}.copy");
    let (to, to_fh) = guest.create(&copy).unwrap();
    let arg = abi::copy_file_range((fh, 0), (to, to_fh, 0), 4);
    let copied = guest.call(op::COPY_FILE_RANGE, node, &arg, 8).unwrap();
    assert_eq!(abi::u32_at(&copied, 0), 4);
    assert_eq!(host.get(&copy), b"some");
    guest.release(to, to_fh).unwrap();

    let moved = format!("{name}.moved");
    guest.rename(&copy, &moved).unwrap();
    assert_eq!(guest.lookup(ROOT, &copy).map(|e| e.nodeid), Err(libc::ENOENT));
    assert_eq!(guest.node(&moved), to);
    let names: Vec<_> = guest.names().unwrap().into_iter().map(|(name, _)| name).collect();
    assert!(names.contains(&moved) && names.contains(&name.to_string()), "{names:?}");
    guest.unlink(&moved).unwrap();
    assert!(!host.path(&moved).exists());
    guest.forget(to, 2);
    assert!(guest.statfs().unwrap() > 0);
    // A daemon may answer that it has no SYNCFS; virtiofsd has it only with an option.
    let pending = guest.send_syncfs();
    assert!(matches!(guest.result(pending), Ok(_) | Err(libc::ENOSYS)));
    guest.release(node, fh).unwrap();
}

/// Shows the reply to each request and its effect on the host, on two request queues.
#[test]
fn each_request_once() {
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    let mut guest = host.boot();
    one_of_each(&host, &mut guest, "first");
    guest.on = FIRST + 1;
    one_of_each(&host, &mut guest, "second");
    guest.destroy();
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows the same for a driver without indirect descriptors.
#[test]
fn every_request_without_indirect_descriptors() {
    let host = FsHost::with(FsOptions { indirect: false, ..FsOptions::default() });
    let mut guest = host.boot();
    one_of_each(&host, &mut guest, "file");
    guest.power_off();
    assert!(host.ended().success());
}

/// Shows that of twenty requests in flight at one time each gets its own reply.
#[test]
fn many_requests_at_once() {
    let host = FsHost::with(FsOptions { request_queues: 3, ..FsOptions::default() });
    host.put("file", &(0..=255).collect::<Vec<u8>>());
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    for _round in 0..50 {
        let mut sent = Vec::new();
        for i in 0..60 {
            guest.on = FIRST + i % 3;
            sent.push((i, guest.send(op::READ, node, &abi::read(fh, i as u64, 1), 1)));
        }
        for (i, pending) in sent {
            assert_eq!(guest.result(pending).unwrap(), [i as u8]);
        }
    }
    guest.kill();
    assert!(host.ended().success());
}

/// Shows the config space (tag, queues), the window's length, and the reply to INIT.
#[test]
fn config_window_and_init() {
    let host = FsHost::with(FsOptions { request_queues: 3, ..FsOptions::default() });
    let mut guest = host.plug();
    let offer = guest.vmm.offer().clone();
    let mut tag = [0u8; 36];
    tag[..5].copy_from_slice(b"share");
    assert_eq!(offer.config[..36], tag);
    assert_eq!(abi::u32_at(&offer.config, 36), 3);
    assert_eq!(offer.windows.first(), Some(&WINDOW));
    assert!(offer.queues >= 4, "{}", offer.queues);
    guest.start();
    let init = guest.init();
    assert_ne!(init.flags & abi::MAP_ALIGNMENT, 0, "{:#x}", init.flags);
    assert!((12..=RANGE.ilog2() as u16).contains(&init.map_alignment), "{}", init.map_alignment);
    assert!(init.max_write >= 4096);
    guest.kill();
    assert!(host.ended().success());
}
