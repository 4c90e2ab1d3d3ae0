// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The front-end's end of the back-end channel, read as QEMU's `backend_read` reads it. A message
//! may arrive in parts, its descriptor arrives with the first part, and an unknown request is
//! skipped. (vhost's `FrontendReqHandler` is not used: it fails on a message in parts.)

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::VhostUserMMap;
use vm_memory::ByteValued;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::machine::SharedMachine;

/// Length of a vhost-user header, in bytes.
const HEADER_BYTES: usize = 12;
/// Limit on a payload, in bytes. VHOST_USER_PAYLOAD_SIZE is slightly larger; no request comes near.
const MAX_PAYLOAD: usize = 4096;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// VHOST_USER_BACKEND_SHARED_OBJECT_ADD, _REMOVE, _LOOKUP.
const SHARED_OBJECT: std::ops::RangeInclusive<u32> = 6..=8;
const SHMEM_MAP: u32 = 9;
const SHMEM_UNMAP: u32 = 10;

/// One request of the back-end.
struct Message {
    request: u32,
    flags: u32,
    payload: Vec<u8>,
    file: Option<File>,
}

/// The front-end's end of the channel.
pub(super) struct Channel {
    ours: UnixStream,
    theirs: UnixStream,
    readable: Epoll,
    machine: Arc<SharedMachine>,
    /// REPLY_ACK was negotiated.
    pub reply_ack: bool,
    /// The connection has failed or was closed.
    pub broken: bool,
}

impl Channel {
    /// A channel with a time limit of `limit` on the rest of a message after its first part.
    pub fn new(machine: Arc<SharedMachine>, limit: Duration) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(limit)).unwrap();
        let readable = Epoll::new().unwrap();
        let event = EpollEvent::new(EventSet::IN, 0);
        readable.ctl(ControlOperation::Add, ours.as_raw_fd(), event).unwrap();
        Self { ours, theirs, readable, machine, reply_ack: false, broken: false }
    }

    /// The back-end's end.
    pub fn theirs(&self) -> RawFd {
        self.theirs.as_raw_fd()
    }

    /// A duplicate of the back-end's end, for a test that acts as the back-end.
    pub fn play_back_end(&self) -> UnixStream {
        self.theirs.try_clone().unwrap()
    }

    /// The front-end's end, to wait for a request with epoll.
    pub fn as_raw_fd(&self) -> RawFd {
        self.ours.as_raw_fd()
    }

    /// Shuts the connection down.
    pub fn cut(&self) {
        let _ = self.ours.shutdown(Shutdown::Both);
    }

    /// Whether the first byte of a request has arrived.
    pub fn has_request(&self) -> bool {
        let mut events = [EpollEvent::default()];
        !self.broken && self.readable.wait(0, &mut events).is_ok_and(|n| n > 0)
    }

    /// Serves the requests that have arrived, as one turn of QEMU's main loop does. Waits for the
    /// rest of an incomplete request with the big lock held, as QEMU does.
    pub fn serve_pending(&mut self) {
        self.serve_since(Instant::now());
    }

    /// Like [`serve_pending`](Self::serve_pending), for a thread that woke at `began` for the first
    /// request; the time of a request counts from there.
    pub fn serve_since(&mut self, mut began: Instant) {
        while self.has_request() {
            let served = self.read().and_then(|message| self.answer(message, began));
            self.broken = served.is_err();
            began = Instant::now();
        }
    }

    fn read(&mut self) -> io::Result<Message> {
        let mut header = [0u8; HEADER_BYTES];
        let (got, file) = self.ours.recv_with_fd(&mut header).map_err(io::Error::from)?;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.rest(&mut header[got..])?;
        let word = |i: usize| u32::from_ne_bytes(header[i * 4..i * 4 + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(1), word(2) as usize);
        if flags & 3 != VERSION || flags & REPLY != 0 || size > MAX_PAYLOAD {
            self.violation(&format!("bad header: flags {flags:#x}, size {size}"));
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut payload = vec![0u8; size];
        self.rest(&mut payload)?;
        Ok(Message { request, flags, payload, file })
    }

    fn rest(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        self.ours.read_exact(buffer).inspect_err(|e| {
            if e.kind() == io::ErrorKind::WouldBlock {
                self.violation("QEMU would hang with its lock held: half a message");
            }
        })
    }

    fn violation(&self, what: &str) {
        self.machine.machine.lock().unwrap().violations.push(format!("channel: {what}"));
        self.machine.served.notify_all();
    }

    fn answer(&mut self, message: Message, began: Instant) -> io::Result<()> {
        let mut machine = self.machine.machine.lock().unwrap();
        if message.request == SHMEM_MAP && machine.misbehaviour.hang_in_map {
            machine.map_requests += 1;
            self.machine.served.notify_all();
            drop(self.machine.served.wait_while(machine, |m| m.misbehaviour.hang_in_map).unwrap());
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let result = match message.request {
            SHMEM_MAP | SHMEM_UNMAP if message.payload.len() != size_of::<VhostUserMMap>() => {
                machine.violations.push(format!("channel: {} bytes", message.payload.len()));
                Err(io::ErrorKind::InvalidData.into())
            }
            SHMEM_MAP => match message.file {
                Some(file) => machine.map(&mmap_body(&message.payload), file),
                None => machine.refuse("Q5", "Bad fd for map", libc::EBADF),
            },
            SHMEM_UNMAP => machine.unmap(&mmap_body(&message.payload)),
            // The lookup of an object that was never added.
            request if SHARED_OBJECT.contains(&request) => Err(io::ErrorKind::NotFound.into()),
            _ => {
                // QEMU prints "Received unexpected msg type: %d.", and serves the next request.
                machine.unknown_requests += 1;
                Err(io::ErrorKind::Unsupported.into())
            }
        };
        machine.spent += began.elapsed();
        drop(machine);
        self.machine.served.notify_all();
        if !self.reply_ack || message.flags & NEED_REPLY == 0 {
            return Ok(());
        }
        let mut reply = Vec::with_capacity(HEADER_BYTES + 8);
        for word in [message.request, VERSION | REPLY, 8] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        reply.extend_from_slice(&u64::from(result.is_err()).to_ne_bytes());
        self.ours.write_all(&reply)
    }
}

fn mmap_body(payload: &[u8]) -> VhostUserMMap {
    let mut body = VhostUserMMap::default();
    body.as_mut_slice().copy_from_slice(payload);
    body
}
