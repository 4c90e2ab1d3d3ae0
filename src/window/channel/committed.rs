// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: one back-end request on the channel, sent so that no stop can cross it (Q1).
//! Knows no device, only whether it is started.
//!
//! QEMU crashes when it handles SHMEM_MAP or SHMEM_UNMAP for a device that it has stopped, and what
//! was sent can't be taken back. But QEMU reads a request in one go, in its main loop, with its big
//! lock held, and a stop needs that lock. So a request goes in two parts:
//!
//! 1. its first byte, with the descriptor;
//! 2. when QEMU has read that byte, it is inside its handler and waits there for the rest. If the
//!    device is still started now, it stays started until the request is done: the rest follows.
//! 3. If the device was stopped meanwhile, another rest follows, which makes of that byte an
//!    unknown request without a body: QEMU prints a line, closes the descriptor, and nothing
//!    happens.
//!
//! A front-end without such a lock sees an ordinary request in two pieces.

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

/// Of the vhost-user specification: the header is {request, flags, size of the body}, each an u32
/// in the host's byte order; the version is in the two lowest bits of the flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
/// The body of an ack: a u64, 0 for success.
const ACK_BYTES: u32 = 8;

/// What makes an unknown request of any first byte (the known ones are small numbers).
const UNKNOWN: u8 = 0xff;

/// No event tells that the peer has read: we look again and again, at first without a pause, since
/// QEMU's main loop turns to us within 50 us (median) and stands still from then until we look.
const AWAKE: Duration = Duration::from_micros(100);
/// Later a quarter of the time that we have waited, up to this.
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

/// A complete message, cut behind its first byte.
struct Cut {
    first: [u8; 1],
    rest: Vec<u8>,
    /// What follows the first byte if the request must not be made.
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

/// The back-end channel of a front-end that acks. One request at a time.
pub(super) struct CommittedChannel {
    socket: UnixStream,
    /// Held over the whole round trip. Nothing is taken under it: `started` reads an atomic.
    turn: Mutex<()>,
    closed: AtomicBool,
}

impl CommittedChannel {
    /// The channel over a connected socket that nobody else reads or writes.
    pub(super) fn new(socket: UnixStream) -> Self {
        Self { socket, turn: Mutex::ranked(Rank::Channel, ()), closed: AtomicBool::new(false) }
    }

    /// Makes a request of a started device, and waits until the front-end has done it.
    ///
    /// Returns at once (with [`MapError::Stopped`]) when `started` becomes false before the request
    /// is committed: the thread that stops the device may wait for us. From then on no stop can
    /// come before the ack, and the ack comes after the memory update (Q3).
    ///
    /// # Errors
    /// See [`MapError`]; after any of them, the request was not carried out.
    pub(super) fn request(
        &self,
        request: Request,
        body: &VhostUserMMap,
        file: Option<&File>,
        started: &dyn Fn() -> bool,
    ) -> Result<(), MapError> {
        let _turn = self.turn();
        // Another request may have kept us waiting for long.
        if !started() {
            return Err(MapError::Stopped);
        }
        let done = self.round_trip(request, body, file, started);
        if let Err(MapError::Broken(_)) = &done {
            // Nobody knows any more where in the stream the next message begins.
            self.close();
        }
        done
    }

    /// Ends the channel: what waits on it returns [`MapError::Broken`], and so does what comes.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        // It fails if the peer has closed it already.
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

    /// Whether the peer has read all that was sent while the device was started; false as soon as
    /// it is not started.
    fn wait_committed(&self, started: &dyn Fn() -> bool) -> io::Result<bool> {
        let began = Instant::now();
        loop {
            let all_read = unread(&self.socket)? == 0;
            // After `all_read`, never before: a stop between the two would go unseen (Q1).
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

    /// A peer that has gone without reading leaves what was sent unread for ever.
    fn assert_connected(&self) -> io::Result<()> {
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.as_raw_fd(), &mut [0], peek) {
            Err(Errno::EAGAIN) => Ok(()),
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            // It answers what it was not asked.
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(e) => Err(e.into()),
        }
    }

    /// One byte goes as a whole, so the descriptor goes exactly once.
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
            let text = format!("not an ack: {answered:#x} {flags:#x} {size}");
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

    /// A map of 0x2000 bytes of the file from 0x1000 on, at 0x3000: the body as on the wire.
    #[rustfmt::skip]
    const BODY: [u8; 40] = [
        0, 0, 0, 0, 0, 0, 0, 0, // shmid, padding
        0, 0x10, 0, 0, 0, 0, 0, 0, // fd_offset
        0, 0x30, 0, 0, 0, 0, 0, 0, // shm_offset
        0, 0x20, 0, 0, 0, 0, 0, 0, // len
        1, 0, 0, 0, 0, 0, 0, 0, // flags: writable
    ];
    /// Behind the first byte, what makes nothing of it.
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

    /// What one recvmsg gets, as QEMU's first one does.
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

    /// A request in a thread, with a front-end that the test plays.
    fn ask(
        channel: &Arc<CommittedChannel>,
        request: Request,
        file: Option<File>,
    ) -> thread::JoinHandle<Result<(), MapError>> {
        let channel = channel.clone();
        thread::spawn(move || channel.request(request, &body(), file.as_ref(), &|| true))
    }

    /// Shows: uninterrupted, the bytes are those of the specification, the descriptor comes with
    /// the first of them alone, and the rest does not come before that is read.
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

    /// Q1: shows that a stop before the first byte was read leaves a complete message of which
    /// nothing comes, at once, and that the channel can be used again.
    #[test]
    fn a_stop_before_the_peer_reads() {
        for request in [Request::Map, Request::Unmap] {
            let (channel, mut peer) = pair();
            let file = (request == Request::Map).then(|| tempfile::tempfile().unwrap());
            let looks = AtomicUsize::new(0);
            let started = || looks.fetch_add(1, Ordering::Relaxed) < 3;
            let done = channel.request(request, &body(), file.as_ref(), &started);
            assert!(matches!(done, Err(MapError::Stopped)));
            assert_eq!(looks.into_inner(), 4, "it sees the stop at the next look");

            let asked = ask(&channel, Request::Unmap, None);
            assert_eq!(read(&peer, 1), [request as u8]);
            assert_eq!(read(&peer, 11), HARMLESS);
            assert_eq!(read(&peer, 52)[0], 10);
            peer.write_all(&ack(Request::Unmap, VERSION | REPLY, 0)).unwrap();
            assert!(asked.join().unwrap().is_ok());
        }
    }

    /// Q1: shows that a stop after the first byte was read leaves a harmless message, too.
    #[test]
    fn a_stop_behind_the_first_byte() {
        let (channel, peer) = pair();
        let looks = AtomicUsize::new(0);
        // The second look comes with the byte unread; the third with it read.
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

    /// Q1: shows that a stop seen by the look which follows the read, and not by the one before, is
    /// still seen: had it been looked at in the other order, the request would have gone out.
    #[test]
    fn the_look_at_the_device_comes_last() {
        let (channel, peer) = pair();
        let looks = AtomicUsize::new(0);
        // The byte is read and the device is stopped before the loop sees the byte gone.
        let started = || match looks.fetch_add(1, Ordering::Relaxed) {
            0 => true,
            1 => {
                read(&peer, 1);
                false
            }
            _ => unreachable!("one look was enough"),
        };
        let done = channel.request(Request::Unmap, &body(), None, &started);
        assert!(matches!(done, Err(MapError::Stopped)));
        assert_eq!(read(&peer, 11), HARMLESS);
    }

    /// Shows: not one byte goes to the front-end of a stopped device.
    #[test]
    fn a_stopped_device_sends_nothing() {
        let (channel, mut peer) = pair();
        let done = channel.request(Request::Unmap, &body(), None, &|| false);
        assert!(matches!(done, Err(MapError::Stopped)));
        drop(channel);
        assert_eq!(peer.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    /// Shows: a refusal is one, and the channel goes on; what is no ack ends it.
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

    /// Shows: a front-end that goes after any number of bytes, or cuts the line and keeps its end,
    /// ends the request.
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

    /// Shows: close() ends a request that waits for the peer to read, or for its ack, and all
    /// others.
    #[test]
    fn close_ends_what_waits() {
        let (channel, peer) = pair();
        let (looked, looks) = events();
        let theirs = channel.clone();
        let asked = thread::spawn(move || {
            let started = || looked.send(()).is_ok();
            theirs.request(Request::Unmap, &body(), None, &started)
        });
        // The second look: the byte is sent, and nobody reads it.
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

    /// Shows: requests take turns; a stop lets those that wait for their turn go without a byte.
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
