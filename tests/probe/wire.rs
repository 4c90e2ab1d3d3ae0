// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Encodes and decodes vhost-user messages. It does not check the rules of the protocol, because
//! the probe also sends what a correct library would refuse to send.

use std::fs::File;
use std::io::{self, ErrorKind, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Protocol version 1, in the two lowest bits of the flags.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
const HEADER_BYTES: usize = 12;
/// Above the largest message of the protocol: GET_SHMEM_CONFIG with 256 sizes and 8 more bytes.
const MAX_PAYLOAD_BYTES: usize = 4096;
/// Above the largest number of descriptors that QEMU attaches, 8 (VHOST_MEMORY_BASELINE_NREGIONS).
const MAX_FDS: usize = 32;

/// Front-end messages that the back-end answers or counts.
pub mod front_end {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const GET_VRING_BASE: u32 = 11;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const GET_SHMEM_CONFIG: u32 = 44;
}

/// Back-end messages.
pub mod back_end {
    pub const SHMEM_MAP: u32 = 9;
    pub const SHMEM_UNMAP: u32 = 10;
}

pub struct Message {
    pub request: u32,
    flags: u32,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

impl Message {
    pub fn needs_reply(&self) -> bool {
        self.flags & NEED_REPLY != 0
    }

    /// The payload's `index`th 64-bit number; 0 if the payload is too short.
    pub fn u64_at(&self, index: usize) -> u64 {
        let bytes = self.payload.get(index * 8..index * 8 + 8);
        bytes.and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
    }

    pub fn u32_at(&self, index: usize) -> u32 {
        let bytes = self.payload.get(index * 4..index * 4 + 4);
        bytes.and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    }
}

/// The position of a map in SHMEM_MAP and SHMEM_UNMAP.
#[derive(Clone, Copy)]
pub struct Range {
    pub shm_offset: u64,
    pub fd_offset: u64,
    pub len_bytes: u64,
    pub writable: bool,
}

impl Range {
    /// A writable map of the first `len_bytes` of a file.
    pub fn new(shm_offset: u64, len_bytes: u64) -> Self {
        Self { shm_offset, fd_offset: 0, len_bytes, writable: true }
    }

    /// Encodes `{shmid: u8, padding, fd_offset, shm_offset, len, flags}`; shmid is 0.
    pub fn payload(&self) -> Vec<u8> {
        let flags = u64::from(self.writable);
        [0, self.fd_offset, self.shm_offset, self.len_bytes, flags]
            .iter()
            .flat_map(|n| n.to_le_bytes())
            .collect()
    }
}

fn header(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap();
    [request, flags | VERSION, size].iter().flat_map(|n| n.to_le_bytes()).collect()
}

fn encode(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = header(request, flags, payload);
    bytes.extend_from_slice(payload);
    bytes
}

pub fn send_reply(stream: &mut UnixStream, request: u32, payload: &[u8]) -> io::Result<()> {
    stream.write_all(&encode(request, REPLY, payload))
}

/// Sends a request of the back-end to the front-end.
pub fn send_request(
    channel: &UnixStream,
    request: u32,
    need_reply: bool,
    payload: &[u8],
    file: Option<&File>,
) -> io::Result<()> {
    let flags = if need_reply { NEED_REPLY } else { 0 };
    let bytes = encode(request, flags, payload);
    let fds: Vec<RawFd> = file.iter().map(|file| file.as_raw_fd()).collect();
    let sent = channel.send_with_fds(&[bytes.as_slice()], &fds).map_err(io::Error::from)?;
    if sent == bytes.len() { Ok(()) } else { Err(ErrorKind::WriteZero.into()) }
}

/// Receives one message and its descriptors.
pub fn receive(mut stream: &UnixStream) -> io::Result<Message> {
    let mut header = [0; HEADER_BYTES];
    let (mut got, fds) = receive_first(stream, &mut header)?;
    while got < HEADER_BYTES {
        got += match stream.read(&mut header[got..])? {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            n => n,
        };
    }
    let word = |i: usize| u32::from_le_bytes(header[i * 4..i * 4 + 4].try_into().unwrap());
    let size = word(2) as usize;
    if size > MAX_PAYLOAD_BYTES {
        return Err(io::Error::other(format!("message {} of {size} bytes", word(0))));
    }
    let mut payload = vec![0; size];
    stream.read_exact(&mut payload)?;
    Ok(Message { request: word(0), flags: word(1), payload, fds })
}

#[allow(unsafe_code)]
fn receive_first(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    use std::os::fd::FromRawFd;
    let mut control = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
    let mut fds = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = message {
            // SAFETY: recvmsg(2) has just opened these descriptors; no other code has their
            // numbers.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    match received.bytes {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        n => Ok((n, fds)),
    }
}
