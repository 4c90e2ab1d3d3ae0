// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: back-end requests on the channel, sent so that QEMU never handles one for a stopped
//! device (docs/front-ends.md Q1). Knows no device, only whether it is started.
//!
//! QEMU crashes when it handles SHMEM_MAP or SHMEM_UNMAP for a device that it has stopped, and a
//! request that was sent can't be withdrawn. But QEMU's main loop reads and handles a request
//! without releasing its big lock, and a stop needs that lock. So a request is sent in two parts:
//!
//! 1. The requesting thread sends the first byte, with the descriptor.
//! 2. Once QEMU has read that byte, QEMU is inside its handler, holds its big lock, and waits for
//!    the rest. If the device is still started now, it stays started until the request is done, and
//!    the requesting thread sends the rest.
//! 3. If the device was stopped before QEMU read the byte, the requesting thread sends another
//!    rest, which makes the message an unknown request without a body: QEMU prints a line, closes
//!    the descriptor, and changes nothing.
//!
//! A front-end without such a lock receives an ordinary request in two pieces.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use vhost::vhost_user::message::VhostUserMMap;
use vm_memory::ByteValued;

use crate::support::lock::{Mutex, MutexGuard, Rank, lock};
use crate::window::MapError;
use crate::window::channel::raw::unread;

/// Flags of a message header (vhost-user specification, "Header"). A header is {request, flags,
/// size of the body in bytes}, each a u32 in the host's byte order. The version is in the two
/// lowest bits of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// Length of a message header in bytes.
const HEADER_BYTES: usize = 12;
/// Length of the body of an ack in bytes: a u64, 0 for success.
const ACK_BYTES: u32 = 8;

/// The three higher bytes of a request number that QEMU does not know, whatever its lowest byte is
/// (known requests are below 256).
const UNKNOWN: u8 = 0xff;

/// How long the requesting thread polls without a pause whether the peer has read: the kernel has
/// no event for that. QEMU's main loop reads within 50 us (median), and then stands still until the
/// window thread sees it.
const AWAKE: Duration = Duration::from_micros(100);
/// Longest pause between two later polls. The pause is a quarter of the time waited so far.
const LONGEST_PAUSE: Duration = Duration::from_micros(500);

/// The two requests that QEMU may see only while the device is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// VHOST_USER_BACKEND_SHMEM_MAP.
    Map = 9,
    /// VHOST_USER_BACKEND_SHMEM_UNMAP.
    Unmap = 10,
}

fn header(request: [u8; 4], flags: u32, size: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    for (to, from) in
        header.chunks_exact_mut(4).zip([request, flags.to_ne_bytes(), size.to_ne_bytes()])
    {
        to.copy_from_slice(&from);
    }
    header
}

/// A complete message, cut after its first byte.
struct Cut {
    first: [u8; 1],
    rest: Vec<u8>,
    /// The bytes to send after the first byte instead of `rest` if the device was stopped: they
    /// make the message an unknown request without a body.
    harmless: [u8; HEADER_BYTES - 1],
}

impl Cut {
    fn new(request: Request, body: &VhostUserMMap) -> Self {
        let body = body.as_slice();
        let number = (request as u32).to_ne_bytes();
        let [first, ..] = number;
        let [_, rest @ ..] = header(number, VERSION | NEED_REPLY, body.len() as u32);
        let [_, harmless @ ..] = header([first, UNKNOWN, UNKNOWN, UNKNOWN], VERSION, 0);
        Self { first: [first], rest: [&rest[..], body].concat(), harmless }
    }
}

/// The back-end channel of a front-end that acks. One request at a time is under way.
pub(super) struct CommittedChannel {
    socket: UnixStream,
    /// Held over the whole round trip. No lock is taken under it: `started` reads an atomic.
    turn: Mutex<()>,
    closed: AtomicBool,
}

impl CommittedChannel {
    /// The channel over a connected socket, on which no other code reads or writes.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, turn: Mutex::ranked(Rank::Channel, ()), closed: AtomicBool::new(false) }
    }

    /// Sends a request of a started device, and waits until the front-end has acked it.
    ///
    /// If `started` becomes false before QEMU has read the first byte, returns
    /// [`MapError::Stopped`] at once: the thread that stops the device may wait for this one. After
    /// QEMU has read the byte, no stop can come before the ack, and the ack comes after the memory
    /// update (docs/front-ends.md Q3).
    ///
    /// # Errors
    /// See [`MapError`]. The front-end has not carried out a request that was refused or stopped.
    pub(super) fn request(
        &self,
        request: Request,
        body: &VhostUserMMap,
        file: Option<&File>,
        started: &dyn Fn() -> bool,
    ) -> Result<(), MapError> {
        let _turn = self.turn();
        // The wait for the turn may have been long: the device may be stopped now.
        if !started() {
            return Err(MapError::Stopped);
        }
        let done = self.round_trip(request, body, file, started);
        if let Err(MapError::Broken(_)) = &done {
            // The stream may be in the middle of a message, so the channel can't be used again.
            self.close();
        }
        done
    }

    /// Closes the channel: waiting and later requests return [`MapError::Broken`].
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        // An error: the peer has closed the channel already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    fn round_trip(
        &self,
        request: Request,
        body: &VhostUserMMap,
        file: Option<&File>,
        started: &dyn Fn() -> bool,
    ) -> Result<(), MapError> {
        let cut = Cut::new(request, body);
        self.send_first(&cut.first, file).map_err(MapError::Broken)?;
        if !self.wait_committed(started).map_err(MapError::Broken)? {
            self.send(&cut.harmless).map_err(MapError::Broken)?;
            return Err(MapError::Stopped);
        }
        self.send(&cut.rest).map_err(MapError::Broken)?;
        match self.read_ack(request).map_err(MapError::Broken)? {
            0 => Ok(()),
            _ => Err(MapError::Refused),
        }
    }

    /// Waits until the peer has read the first byte, and returns true; or returns false as soon as
    /// the device is not started.
    fn wait_committed(&self, started: &dyn Fn() -> bool) -> io::Result<bool> {
        let began = Instant::now();
        loop {
            let all_read = unread(&self.socket)? == 0;
            // Read after `all_read`, never before. Otherwise: this thread sees the device started,
            // the front-end thread stops it, QEMU reads the byte, this thread sees that and sends
            // the rest to a stopped device (Q1).
            if !started() {
                return Ok(false);
            }
            if self.closed.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::NotConnected.into());
            }
            if all_read {
                return Ok(true);
            }
            let waited = began.elapsed();
            if waited < AWAKE {
                thread::yield_now();
            } else {
                self.assert_connected()?;
                thread::sleep((waited / 4).min(LONGEST_PAUSE));
            }
        }
    }

    /// Checks that the peer has not closed the channel: unread data of a closed channel stays
    /// unread.
    fn assert_connected(&self) -> io::Result<()> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.as_raw_fd(), &mut [0], peek) {
            Err(Errno::EAGAIN) => Ok(()),
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            // The peer has sent an ack before it has read the request.
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(e) => Err(e.into()),
        }
    }

    /// Sends the first byte with the descriptor of `file`. One byte is never sent in part, so the
    /// descriptor is sent exactly once.
    fn send_first(&self, first: &[u8; 1], file: Option<&File>) -> io::Result<()> {
        let fds: Vec<_> = file.iter().map(|file| file.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let rights = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let (socket, bytes) = (self.socket.as_raw_fd(), [IoSlice::new(first)]);
        loop {
            match sendmsg::<()>(socket, &bytes, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Err(Errno::EINTR) => {}
                sent => return Ok(sent.map(drop)?),
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.socket).write_all(bytes)
    }

    fn read_ack(&self, request: Request) -> io::Result<u64> {
        let mut ack = [0; HEADER_BYTES + ACK_BYTES as usize];
        (&self.socket).read_exact(&mut ack)?;
        let (header, body) = ack.split_at(HEADER_BYTES);
        let mut words = header.chunks_exact(4).filter_map(|word| word.try_into().ok());
        let mut next = || words.next().map(u32::from_ne_bytes).unwrap_or_default();
        let (answered, flags, size) = (next(), next(), next());
        if answered != request as u32
            || flags & (VERSION_MASK | REPLY) != VERSION | REPLY
            || size != ACK_BYTES
        {
            let text = format!("not an ack: request {answered}, flags {flags:#x}, {size} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        Ok(body.try_into().map(u64::from_ne_bytes).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use std::io::IoSliceMut;
    use std::os::unix::fs::MetadataExt;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc::channel as events;

    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    /// The body on the wire of a map of 0x2000 bytes of the file from 0x1000 on, at 0x3000.
    #[rustfmt::skip]
    const BODY: [u8; 40] = [
        0, 0, 0, 0, 0, 0, 0, 0, // shmid, padding
        0, 0x10, 0, 0, 0, 0, 0, 0, // fd_offset
        0, 0x30, 0, 0, 0, 0, 0, 0, // shm_offset
        0, 0x20, 0, 0, 0, 0, 0, 0, // len
        1, 0, 0, 0, 0, 0, 0, 0, // flags: writable
    ];
    /// The bytes after the first byte that make the message an unknown request.
    const HARMLESS: [u8; 11] = [0xff, 0xff, 0xff, 1, 0, 0, 0, 0, 0, 0, 0];

    fn body() -> VhostUserMMap {
        VhostUserMMap {
            shmid: 0,
            padding: [0; 7],
            fd_offset: 0x1000,
            shm_offset: 0x3000,
            len: 0x2000,
            flags: 1,
        }
    }

    fn pair() -> (Arc<CommittedChannel>, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Arc::new(CommittedChannel::new(ours)), theirs)
    }

    fn ack(request: Request, flags: u32, value: u64) -> Vec<u8> {
        let header = header((request as u32).to_ne_bytes(), flags, ACK_BYTES);
        [&header[..], &value.to_ne_bytes()].concat()
    }

    fn read(mut peer: &UnixStream, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; bytes];
        peer.read_exact(&mut buffer).unwrap();
        buffer
    }

    /// The bytes and descriptors of one recvmsg(2), as QEMU's first one.
    fn receive(peer: &UnixStream) -> (Vec<u8>, Vec<i32>) {
        let mut buffer = [0; 64];
        let mut space = nix::cmsg_space!([i32; 8]);
        let mut iov = [IoSliceMut::new(&mut buffer)];
        let flags = MsgFlags::empty();
        let got = recvmsg::<()>(peer.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        let mut fds = Vec::new();
        for message in got.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(more) = message {
                fds.extend(more);
            }
        }
        let bytes = got.bytes;
        (buffer[..bytes].to_vec(), fds)
    }

    /// Sends a request from another thread. The test plays the front-end.
    fn ask(
        channel: &Arc<CommittedChannel>,
        request: Request,
        file: Option<File>,
    ) -> thread::JoinHandle<Result<(), MapError>> {
        let channel = channel.clone();
        thread::spawn(move || channel.request(request, &body(), file.as_ref(), &|| true))
    }

    /// Shows: without a stop, the message is that of the specification, the descriptor comes with
    /// the first byte alone, and the rest does not come before the first byte was read.
    #[test]
    fn bytes_on_the_wire() {
        let (channel, mut peer) = pair();
        let file = tempfile::tempfile().unwrap();
        let inode = file.metadata().unwrap().ino();
        let asked = ask(&channel, Request::Map, Some(file));
        let (first, fds) = receive(&peer);
        assert_eq!((first, fds.len()), (vec![9], 1));
        let behind = std::fs::metadata(format!("/proc/self/fd/{}", fds[0])).unwrap();
        assert_eq!(behind.ino(), inode);
        assert_eq!(read(&peer, 11), [0, 0, 0, 1 | 8, 0, 0, 0, 40, 0, 0, 0]);
        assert_eq!(read(&peer, 40), BODY);
        peer.write_all(&ack(Request::Map, VERSION | REPLY, 0)).unwrap();
        assert!(asked.join().unwrap().is_ok());

        let asked = ask(&channel, Request::Unmap, None);
        assert_eq!(receive(&peer), (vec![10], vec![]));
        assert_eq!(read(&peer, 11), [0, 0, 0, 1 | 8, 0, 0, 0, 40, 0, 0, 0]);
        assert_eq!(read(&peer, 40), BODY);
        peer.write_all(&ack(Request::Unmap, VERSION | REPLY, 0)).unwrap();
        assert!(asked.join().unwrap().is_ok());
    }

    /// Q1: shows that a stop before the peer reads the first byte ends the request at once, with an
    /// unknown request as message, and that the channel can be used again.
    #[test]
    fn a_stop_before_the_peer_reads() {
        for request in [Request::Map, Request::Unmap] {
            let (channel, mut peer) = pair();
            let file = (request == Request::Map).then(|| tempfile::tempfile().unwrap());
            let looks = AtomicUsize::new(0);
            let started = || looks.fetch_add(1, Ordering::Relaxed) < 3;
            let done = channel.request(request, &body(), file.as_ref(), &started);
            assert!(matches!(done, Err(MapError::Stopped)));
            assert_eq!(looks.into_inner(), 4, "the stop is seen at the next poll");

            let asked = ask(&channel, Request::Unmap, None);
            assert_eq!(read(&peer, 1), [request as u8]);
            assert_eq!(read(&peer, 11), HARMLESS);
            assert_eq!(read(&peer, 52)[0], 10);
            peer.write_all(&ack(Request::Unmap, VERSION | REPLY, 0)).unwrap();
            assert!(asked.join().unwrap().is_ok());
        }
    }

    /// Q1: shows that a stop right after the peer has read the first byte also leads to an unknown
    /// request.
    #[test]
    fn a_stop_after_the_first_byte() {
        let (channel, peer) = pair();
        let looks = AtomicUsize::new(0);
        // At the second poll the byte is unread; at the third it was read.
        let started = || match looks.fetch_add(1, Ordering::Relaxed) {
            0 => true,
            1 => read(&peer, 1) == [9],
            _ => false,
        };
        let file = tempfile::tempfile().unwrap();
        let done = channel.request(Request::Map, &body(), Some(&file), &started);
        assert!(matches!(done, Err(MapError::Stopped)));
        assert_eq!(looks.into_inner(), 3);
        drop(channel);
        let mut rest = Vec::new();
        (&peer).read_to_end(&mut rest).unwrap();
        assert_eq!(rest, HARMLESS);
    }

    /// Q1: shows that the device's state is read after the socket's. The byte is read and the
    /// device is stopped between two polls: in the other order the request would be sent.
    #[test]
    fn the_look_at_the_device_comes_last() {
        let (channel, peer) = pair();
        let looks = AtomicUsize::new(0);
        // The peer reads the byte and the device is stopped before the loop sees the byte read.
        let started = || match looks.fetch_add(1, Ordering::Relaxed) {
            0 => true,
            1 => {
                read(&peer, 1);
                false
            }
            _ => unreachable!("the stop was seen at the second poll"),
        };
        let done = channel.request(Request::Unmap, &body(), None, &started);
        assert!(matches!(done, Err(MapError::Stopped)));
        assert_eq!(read(&peer, 11), HARMLESS);
    }

    /// Shows: no byte is sent for a stopped device.
    #[test]
    fn a_stopped_device_sends_nothing() {
        let (channel, mut peer) = pair();
        let done = channel.request(Request::Unmap, &body(), None, &|| false);
        assert!(matches!(done, Err(MapError::Stopped)));
        drop(channel);
        assert_eq!(peer.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    /// Shows: after a refusal the channel works on; a reply that is no ack closes it.
    #[test]
    fn answers_are_checked() {
        let (channel, mut peer) = pair();
        let mut answer = |bytes: &[u8]| {
            let asked = ask(&channel, Request::Unmap, None);
            read(&peer, 52);
            peer.write_all(bytes).unwrap();
            asked.join().unwrap()
        };
        let refused = answer(&ack(Request::Unmap, VERSION | REPLY, 1));
        assert!(matches!(refused, Err(MapError::Refused)));
        assert!(answer(&ack(Request::Unmap, VERSION | REPLY, 0)).is_ok());
        for wrong in [
            ack(Request::Map, VERSION | REPLY, 0),
            ack(Request::Unmap, VERSION, 0),
            ack(Request::Unmap, 2 | REPLY, 0),
            [&header(10u32.to_ne_bytes(), VERSION | REPLY, 16)[..], &[0; 16]].concat(),
        ] {
            let (channel, mut peer) = pair();
            let asked = ask(&channel, Request::Unmap, None);
            read(&peer, 52);
            peer.write_all(&wrong).unwrap();
            assert!(matches!(asked.join().unwrap(), Err(MapError::Broken(_))), "{wrong:?}");
            let next = channel.request(Request::Unmap, &body(), None, &|| true);
            assert!(matches!(next, Err(MapError::Broken(_))));
        }
    }

    /// Shows: a front-end that closes or shuts down the channel ends the request, whatever part of
    /// it was read.
    #[test]
    fn a_peer_that_goes() {
        for cut_only in [false, true] {
            for bytes in [0, 1, 12, 52] {
                let (channel, peer) = pair();
                let asked = ask(&channel, Request::Unmap, None);
                read(&peer, bytes);
                let kept = cut_only.then(|| {
                    peer.shutdown(Shutdown::Both).unwrap();
                    peer.try_clone().unwrap()
                });
                drop(peer);
                let done = asked.join().unwrap();
                assert!(matches!(done, Err(MapError::Broken(_))), "{bytes} {cut_only} {done:?}");
                drop(kept);
            }
        }
    }

    /// Shows: close() ends a request that waits for the peer to read or to ack, and later requests.
    #[test]
    fn close_ends_what_waits() {
        let (channel, peer) = pair();
        let (looked, looks) = events();
        let theirs = channel.clone();
        let asked = thread::spawn(move || {
            let started = || looked.send(()).is_ok();
            theirs.request(Request::Unmap, &body(), None, &started)
        });
        // At the second poll the byte is sent, and the peer does not read it.
        looks.recv().unwrap();
        looks.recv().unwrap();
        channel.close();
        assert!(matches!(asked.join().unwrap(), Err(MapError::Broken(_))));
        drop(peer);

        let (channel, peer) = pair();
        let asked = ask(&channel, Request::Unmap, None);
        read(&peer, 52);
        channel.close();
        assert!(matches!(asked.join().unwrap(), Err(MapError::Broken(_))));
        let next = channel.request(Request::Unmap, &body(), None, &|| true);
        assert!(matches!(next, Err(MapError::Broken(_))));
    }

    /// Shows: of eight threads with a request, one at a time is served.
    #[test]
    fn one_at_a_time() {
        let (channel, mut peer) = pair();
        let many: Vec<_> = (0..8).map(|_| ask(&channel, Request::Unmap, None)).collect();
        for _ in &many {
            let message = read(&peer, 52);
            assert_eq!((message[0], &message[12..]), (10, &BODY[..]));
            peer.set_nonblocking(true).unwrap();
            assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
            peer.set_nonblocking(false).unwrap();
            peer.write_all(&ack(Request::Unmap, VERSION | REPLY, 0)).unwrap();
        }
        for asked in many {
            assert!(asked.join().unwrap().is_ok());
        }
    }
}
