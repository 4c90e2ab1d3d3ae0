// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that cloud-hypervisor's `--fs` is served, by its messages: it has no window, so a daemon
//! with a window serves it without one.

use testkit::cloud_hypervisor::CloudHypervisor;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, HIPRIO};
use testkit::fuse_abi::{self as abi, HAS_INODE_DAX, MAP_ALIGNMENT, MAP_READ, ROOT, op};
use testkit::memory::RAM_REGION_BYTES;
use vhost::vhost_user::VhostUserProtocolFeatures as P;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, GuestUsize};

type Guest = FsGuest<CloudHypervisor>;

/// A guest that has mounted the share, with `-o dax=inode` or without a dax option.
fn boot(host: &FsHost, request_queues: usize) -> Guest {
    let mut guest = host.plug_cloud_hypervisor(request_queues);
    guest.activate();
    let init = guest.init();
    assert_eq!(init.flags & (MAP_ALIGNMENT | HAS_INODE_DAX), 0, "a window that is not there");
    guest
}

/// CREATE, WRITE, READ, FSYNC, LOOKUP, RELEASE, FORGET of one file.
fn one_file(host: &FsHost, guest: &mut Guest, name: &str) {
    let (node, fh) = guest.create(name).unwrap();
    let bytes = name.repeat(1000).into_bytes();
    assert_eq!(guest.write(node, fh, 0, &bytes), Ok(bytes.len() as u32));
    assert_eq!(guest.read(node, fh, 3, 100).unwrap(), bytes[3..103]);
    guest.fsync(node, fh).unwrap();
    assert_eq!(host.get(name), bytes);
    assert_eq!(guest.node(name), node);
    guest.release(node, fh).unwrap();
    guest.forget(node, 2);
}

/// Closes the connection without a stop, as cloud-hypervisor does. The daemon must end with code 0.
fn shut_down(host: FsHost, guest: Guest) {
    drop(guest);
    assert!(host.ended().success());
}

/// Shows a whole session, with a daemon that has a window and one that has none: the negotiated
/// features, the effect of each request, no map, and the end.
#[test]
fn a_session() {
    for window_bytes in [64 << 20, 0] {
        let host = FsHost::with(FsOptions { window_bytes, ..FsOptions::default() });
        let mut guest = boot(&host, 1);
        assert_eq!(guest.vmm.protocol, P::MQ | P::CONFIGURE_MEM_SLOTS | P::REPLY_ACK);
        assert_eq!(guest.vmm.queues, 2);
        one_file(&host, &mut guest, "file");
        // Linux sends it only with a window. It must fail, and disturb no other request.
        let node = guest.node("file");
        guest.setup(node, 0, RANGE, MAP_READ, 0).unwrap_err();
        guest.destroy();
        shut_down(host, guest);
    }
}

/// Shows that all configured queues work, with full rings of 1024 descriptors, and that a guest may
/// use fewer.
#[test]
fn queues() {
    for used in [4, 1] {
        let host = FsHost::with(FsOptions { request_queues: 4, ..FsOptions::default() });
        let mut guest = boot(&host, used);
        for queue in FIRST..FIRST + used {
            guest.on = queue;
            one_file(&host, &mut guest, &format!("file-{queue}"));
            // More requests than the ring has descriptors.
            for _ in 0..2500 {
                guest.getattr(ROOT).unwrap();
            }
        }
        shut_down(host, guest);
    }
}

/// Shows that a paused device answers no new request, and answers all after the resume: those sent
/// before, during and after the pause.
#[test]
fn pause_and_resume() {
    let host = FsHost::new();
    let mut guest = boot(&host, 1);
    let (node, fh) = guest.create("file").unwrap();
    for round in 0..20_u32 {
        let text = format!("round {round}");
        let early = guest.send_fsync(node, fh);
        guest.vmm.pause();
        // The vCPUs still run while cloud-hypervisor pauses the devices one after the other.
        let arg = abi::write(fh, 0, text.len() as u32);
        let late = guest.send_with(op::WRITE, node, &[&arg.0, text.as_bytes()], 8, &[], &[]);
        guest.on = HIPRIO;
        let statfs = guest.send(op::STATFS, ROOT, &abi::Arg::new(), 80);
        guest.on = FIRST;
        guest.vmm.round_trip();
        assert!(!guest.is_answered(late), "a request that came while the rings were disabled");
        guest.vmm.resume();
        assert_eq!(guest.result(late).map(|body| abi::u32_at(&body, 0)), Ok(text.len() as u32));
        guest.result(early).unwrap();
        guest.result(statfs).unwrap();
        assert!(host.get("file").starts_with(text.as_bytes()));
    }
    one_file(&host, &mut guest, "after");
    shut_down(host, guest);
}

/// Shows that a reset drops the guest's handles, and that the device serves the next driver; also
/// after a reset of a paused device, and of one with running requests.
#[test]
fn resets() {
    let host = FsHost::new();
    let mut guest = boot(&host, 1);
    let before = host.descriptors();
    for round in 0..20 {
        let (node, fh) = guest.create(&format!("open-{round}")).unwrap();
        guest.write(node, fh, 0, b"left open").unwrap();
        let _ = guest.send_fsync(node, fh);
        if round % 2 == 1 {
            guest.vmm.pause();
        }
        guest.reset_and_activate();
        assert!(guest.getattr(node).is_err(), "a node of an older life");
        guest.init();
        one_file(&host, &mut guest, &format!("file-{round}"));
    }
    host.wait_descriptors(&before);
    guest.destroy();
    shut_down(host, guest);
}

/// Shows that requests may lie in memory that was added after the start (ADD_MEM_REG).
#[test]
fn memory_hotplug() {
    let host = FsHost::new();
    let mut guest = boot(&host, 1);
    let plugged = guest.ram.iter().nth(1).unwrap();
    assert_eq!(plugged.len(), RAM_REGION_BYTES as GuestUsize);
    let at = plugged.start_addr().0;
    guest.poke(at, b"from new memory");
    let (node, fh) = guest.create("file").unwrap();
    let ram = guest.ram.clone();
    guest.vmm.add_memory(&ram, 1);
    let write = abi::write(fh, 0, 15);
    let pending = guest.send_with(op::WRITE, node, &[&write.0], 8, &[(at, 15)], &[]);
    guest.result(pending).unwrap();
    assert_eq!(host.get("file"), b"from new memory");
    let read = abi::read(fh, 5, 3);
    let pending = guest.send_with(op::READ, node, &[&read.0], 0, &[], &[(at + 4096, 3)]);
    guest.reply_with_data(pending, 3);
    assert_eq!(guest.peek(at + 4096, 3), b"new");
    shut_down(host, guest);
}
