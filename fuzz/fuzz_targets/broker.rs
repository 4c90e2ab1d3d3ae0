// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any bytes as packets to the broker, with any number of descriptors: the broker never panics,
//! each answer is a whole message, and no descriptor is left open.

#![no_main]

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;

use libfuzzer_sys::fuzz_target;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recvmsg, sendmsg,
    shutdown, socketpair,
};
use vhost_user_dax::passthrough::broker::serve_unprivileged;

/// Packets of one input: the answers to them fit into the socket.
const MOST_PACKETS: usize = 32;

/// Bytes of an answer.
const ANSWER_BYTES: usize = 16;

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

fuzz_target!(|data: &[u8]| {
    let before = open_descriptors();
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
    let files = [
        File::open("/dev/null").unwrap(),
        File::options().read(true).write(true).open("/dev/null").unwrap(),
        File::open("/").unwrap(),
    ];
    let mut rest = data;
    for _ in 0..MOST_PACKETS {
        // One byte: the number of descriptors, and the length, which is mostly right.
        let Some((&head, body)) = rest.split_first() else { break };
        let length = if head & 0xf0 == 0xf0 { usize::from(head & 0xc) * 5 } else { ANSWER_BYTES };
        let (packet, after) = body.split_at(length.min(body.len()));
        rest = after;
        let count = usize::from(head & 0x3);
        let fds: Vec<_> =
            (0..count).map(|i| files[(i + usize::from(head >> 4)) % 3].as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights };
        sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(packet)], rights, MsgFlags::empty(), None)
            .unwrap();
    }
    shutdown(ours.as_raw_fd(), Shutdown::Write).unwrap();
    serve_unprivileged(&theirs);
    drop(theirs);
    let mut answer = [0; 2 * ANSWER_BYTES];
    loop {
        let mut parts = [IoSliceMut::new(&mut answer)];
        let got = recvmsg::<()>(ours.as_raw_fd(), &mut parts, None, MsgFlags::MSG_DONTWAIT);
        match got.map(|got| got.bytes) {
            Ok(0) | Err(_) => break,
            Ok(length) => assert_eq!(length, ANSWER_BYTES),
        }
    }
    drop((ours, files));
    assert_eq!(open_descriptors(), before, "descriptors stay open");
});
