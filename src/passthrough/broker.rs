// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The broker process: it creates and closes backing ids for the worker, which lacks CAP_SYS_ADMIN.
//! The kernel checks that capability in the initial user namespace at each of these ioctls.
//!
//! The broker has CAP_SYS_ADMIN, no other capability, and an empty root directory. It receives file
//! descriptors from the worker, creates a backing id of each, and closes the descriptor. All
//! messages have one size, in both directions. The number of backing ids that it holds has a limit,
//! set at its fork. It opens no file by a name: the /dev/fuse descriptors of its mounts are opened
//! before it is sandboxed.
//!
//! | request | answer |
//! |---|---|
//! | Mount | the number of a new mount, its device and its root; or a step and an errno |
//! | Open: a mount, a file | a backing id, or an errno |
//! | Close: a mount, a backing id | none |
//! | Unmount: a mount, whose server has ended | none |
//!
//! What it can't understand ends it. When it has ended, what is mapped stays mapped, and what is to
//! be mapped fails with EIO. When the worker has ended, it ends.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use log::error;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::backing_id::BackingId;
use super::mount::{self, Failed, Prepared, Step};
use crate::sandbox::seccomp::LastCall;
use crate::sandbox::tables::Table;
use crate::sandbox::{self, Forked, SeccompMode, capabilities, root, seccomp};
use crate::support::lock::{Mutex, Rank, lock};

/// How many mounts a broker can make: one, and one more each time somebody aborts the last one.
const MOUNTS: usize = 8;

/// Descriptors in one message: a device and a root.
const MOST_FDS: usize = 2;

/// Bytes of a message: four numbers.
const MESSAGE_BYTES: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    Mount = 1,
    Open,
    Close,
    Unmount,
}

/// A request or an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Message {
    kind: Kind,
    /// Which mount.
    mount: u32,
    /// A backing id, or the step that failed.
    number: u32,
    /// 0, if nothing failed.
    errno: i32,
}

impl Message {
    fn new(kind: Kind, mount: u32, number: u32) -> Self {
        Self { kind, mount, number, errno: 0 }
    }

    fn bytes(self) -> [u8; MESSAGE_BYTES] {
        let words = [self.kind as u32, self.mount, self.number, self.errno.cast_unsigned()];
        let mut bytes = [0; MESSAGE_BYTES];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }

    fn parse(bytes: [u8; MESSAGE_BYTES]) -> Option<Self> {
        let [kind, mount, number, errno] = bytes.as_chunks::<4>().0 else { return None };
        let word = |bytes: &[u8; 4]| u32::from_ne_bytes(*bytes);
        let known = [Kind::Mount, Kind::Open, Kind::Close, Kind::Unmount];
        let kind = known.into_iter().find(|known| *known as u32 == word(kind))?;
        let (mount, number, errno) = (word(mount), word(number), word(errno).cast_signed());
        Some(Self { kind, mount, number, errno })
    }
}

fn send(socket: &OwnedFd, message: Message, fds: &[RawFd]) -> nix::Result<()> {
    let bytes = message.bytes();
    let rights = [ControlMessage::ScmRights(fds)];
    let rights = if fds.is_empty() { &[][..] } else { &rights };
    loop {
        let flags = MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], rights, flags, None) {
            Err(Errno::EINTR) => {}
            done => return done.map(drop),
        }
    }
}

/// None at the end: the peer has gone, or what it said was no message.
#[allow(unsafe_code)] // Descriptors come as numbers.
fn receive(socket: &OwnedFd) -> Option<(Message, Vec<OwnedFd>)> {
    let mut bytes = [0; MESSAGE_BYTES];
    let mut space = nix::cmsg_space!([RawFd; MOST_FDS]);
    let (length, fds) = loop {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Err(Errno::EINTR) => {}
            Err(_) => return None,
            Ok(got) => {
                let mut fds = Vec::new();
                for message in got.cmsgs().ok()? {
                    if let ControlMessageOwned::ScmRights(numbers) = message {
                        // SAFETY: the kernel has just put them into this process's table, and
                        // nobody else knows them.
                        fds.extend(
                            numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                        );
                    }
                }
                // A longer packet was cut.
                let is_whole = !got.flags.contains(MsgFlags::MSG_TRUNC);
                break (if is_whole { got.bytes } else { 0 }, fds);
            }
        }
    };
    let message = if length == MESSAGE_BYTES { Message::parse(bytes) } else { None };
    Some((message?, fds))
}

/// The worker's end.
#[derive(Debug)]
pub struct Broker {
    /// Held for a request and its answer.
    socket: Mutex<OwnedFd>,
    /// That it has ended was said.
    is_gone: AtomicBool,
}

impl Broker {
    /// Forks the broker, which holds `most` backing ids at most. To be called before any thread
    /// starts.
    ///
    /// # Errors
    /// The system's.
    pub fn fork(most: usize, seccomp: SeccompMode) -> io::Result<(Self, Forked)> {
        // Of packets: a message is whole, and the search for the back-end channel's socket takes it
        // for no candidate.
        let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
        let (ours, theirs) = socketpair(family, kind, None, SockFlag::SOCK_CLOEXEC)?;
        let forked = sandbox::fork(c"vud-broker", theirs, |socket, last_call| {
            // The worker hears of a failure as of an end.
            match serve(&socket, most, seccomp, last_call) {
                Ok(()) => 0,
                Err(_) => 1,
            }
        })?;
        Ok((
            Self { socket: Mutex::ranked(Rank::Broker, ours), is_gone: AtomicBool::new(false) },
            forked,
        ))
    }

    fn ask(&self, message: Message, fds: &[RawFd]) -> io::Result<(Message, Vec<OwnedFd>)> {
        let socket = lock(&self.socket);
        let answered = send(&socket, message, fds).ok().and_then(|()| receive(&socket));
        drop(socket);
        answered.filter(|(answer, _)| answer.kind == message.kind).ok_or_else(|| self.gone())
    }

    fn tell(&self, message: Message) {
        if send(&lock(&self.socket), message, &[]).is_err() {
            self.gone();
        }
    }

    fn gone(&self) -> io::Error {
        if !self.is_gone.swap(true, Ordering::Relaxed) {
            error!(
                "the broker process has ended: what is mapped stays mapped, and no other file can be \
                 mapped until the daemon is started again"
            );
        }
        Errno::EIO.into()
    }

    /// A new mount: its number, its device and its root.
    pub(super) fn mount(&self) -> Result<(u32, File, OwnedFd), Failed> {
        let gone = Failed::at::<io::Error>(Step::Broker);
        let (answer, fds) = self.ask(Message::new(Kind::Mount, 0, 0), &[]).map_err(&gone)?;
        if answer.errno != 0 {
            let step = Step::numbered(answer.number).unwrap_or(Step::Spare);
            return Err(Failed { step, cause: io::Error::from_raw_os_error(answer.errno) });
        }
        match <[OwnedFd; MOST_FDS]>::try_from(fds) {
            Ok([device, root]) => Ok((answer.mount, device.into(), root)),
            Err(_) => Err(gone(self.gone())),
        }
    }

    /// A backing id of `file`.
    ///
    /// # Errors
    /// As [`BackingId::open`]; ENFILE for more than there are slots for; EIO without a broker.
    pub(super) fn open(&self, mount: u32, file: BorrowedFd<'_>) -> io::Result<BackingId> {
        let (answer, _) = self.ask(Message::new(Kind::Open, mount, 0), &[file.as_raw_fd()])?;
        match answer.errno {
            0 => Ok(BackingId::numbered(answer.number)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }

    pub(super) fn close(&self, mount: u32, backing: BackingId) {
        self.tell(Message::new(Kind::Close, mount, backing.number()));
    }

    pub(super) fn unmount(&self, mount: u32) {
        self.tell(Message::new(Kind::Unmount, mount, 0));
    }
}

/// The broker's state.
struct Held {
    spare: VecDeque<Result<Prepared, Failed>>,
    /// By their numbers, which begin at 1.
    mounts: BTreeMap<u32, (File, BTreeSet<u32>)>,
    made: u32,
    /// How many backing ids there may be.
    most: usize,
}

/// The process.
fn serve(socket: &OwnedFd, most: usize, mode: SeccompMode, last_call: LastCall) -> io::Result<()> {
    let mut spare = VecDeque::with_capacity(MOUNTS);
    for _ in 0..MOUNTS {
        spare.push_back(mount::prepare());
        if spare.back().is_some_and(Result::is_err) {
            break; // The others would fail, too.
        }
    }
    // Where that is not permitted, there is nothing that it opens by a name all the same.
    let _ = root::leave_namespaces(UnshareFlags::NEWNET).and_then(|()| root::enter_empty());
    sandbox::close_standard();
    capabilities::keep(CapabilitySet::SYS_ADMIN)?;
    seccomp::apply(mode, Table::Broker, last_call)?;
    Held { spare, mounts: BTreeMap::new(), made: 0, most }.answer_all(socket)
}

impl Held {
    /// Answers until the worker has gone.
    ///
    /// # Errors
    /// As [`answer`](Self::answer).
    fn answer_all(&mut self, socket: &OwnedFd) -> io::Result<()> {
        while let Some((message, fds)) = receive(socket) {
            self.answer(socket, message, &fds)?;
        }
        Ok(())
    }

    /// # Errors
    /// The worker has gone, or has sent what it never sends.
    fn answer(&mut self, socket: &OwnedFd, message: Message, fds: &[OwnedFd]) -> io::Result<()> {
        let confused = || io::Error::from(Errno::EPROTO);
        match (message.kind, fds) {
            (Kind::Mount, []) => match self.mount() {
                Ok((number, device, root)) => {
                    let answer = Message::new(Kind::Mount, number, 0);
                    send(socket, answer, &[device, root.as_raw_fd()])?;
                }
                Err(Failed { step, cause }) => {
                    let answer = Message::new(Kind::Mount, 0, step as u32);
                    send(socket, Message { errno: errno(&cause), ..answer }, &[])?;
                }
            },
            (Kind::Open, [file]) => {
                let answer = Message::new(Kind::Open, message.mount, 0);
                let answer = match self.open(message.mount, file.as_fd()) {
                    Ok(number) => Message { number, ..answer },
                    Err(e) => Message { errno: errno(&e), ..answer },
                };
                send(socket, answer, &[])?;
            }
            (Kind::Close, []) => {
                let (device, ids) = self.mounts.get_mut(&message.mount).ok_or_else(confused)?;
                if ids.remove(&message.number) {
                    let _ = BackingId::numbered(message.number).close(device);
                }
            }
            (Kind::Unmount, []) => {
                let (device, ids) = self.mounts.remove(&message.mount).ok_or_else(confused)?;
                // The kernel closes them with the connection, which a worker that was taken over
                // can keep: no more backing ids than `most` exist at any time.
                for number in ids {
                    let _ = BackingId::numbered(number).close(&device);
                }
            }
            _ => return Err(confused()),
        }
        Ok(())
    }

    fn mount(&mut self) -> Result<(u32, RawFd, OwnedFd), Failed> {
        let spent = || Failed { step: Step::Spare, cause: Errno::ENOENT.into() };
        let prepared = self.spare.pop_front().ok_or_else(spent)??;
        let root = prepared.mount()?;
        self.made += 1;
        let number = prepared.device.as_raw_fd();
        self.mounts.insert(self.made, (prepared.device, BTreeSet::new()));
        Ok((self.made, number, root))
    }

    fn open(&mut self, mount: u32, file: BorrowedFd<'_>) -> io::Result<u32> {
        let held: usize = self.mounts.values().map(|(_, ids)| ids.len()).sum();
        let (device, ids) = self.mounts.get_mut(&mount).ok_or(Errno::ENOTCONN)?;
        if held >= self.most {
            return Err(Errno::ENFILE.into());
        }
        may_be_backing(file)?;
        let number = BackingId::open(device, file)?.number();
        ids.insert(number);
        Ok(number)
    }
}

/// Whether `file` is open for reading and writing, and not for appending only. The kernel opens a
/// backing file anew, for what the FUSE file is opened for, and checks no permission then. Without
/// this check a worker that was taken over could write to a file that it could only open for
/// reading: an immutable one, for example.
///
/// # Errors
/// EBADF for O_PATH, EACCES.
fn may_be_backing(file: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    if flags.contains(OFlag::O_PATH) {
        return Err(Errno::EBADF.into());
    }
    let is_writable = flags & (OFlag::O_ACCMODE | OFlag::O_APPEND) == OFlag::O_RDWR;
    if is_writable { Ok(()) } else { Err(Errno::EACCES.into()) }
}

fn errno(e: &io::Error) -> i32 {
    e.raw_os_error().unwrap_or(Errno::EIO as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: a message is read as it was written, and what is none is refused.
    #[test]
    fn messages() {
        for kind in [Kind::Mount, Kind::Open, Kind::Close, Kind::Unmount] {
            let message = Message { kind, mount: 3, number: u32::MAX, errno: -1 };
            assert_eq!(Message::parse(message.bytes()), Some(message));
        }
        for kind in [0_u8, 5, 255] {
            let mut bytes = Message::new(Kind::Open, 1, 2).bytes();
            bytes[0] = kind;
            assert_eq!(Message::parse(bytes), None);
        }
        assert!(Step::numbered(Step::Broker as u32).is_some() && Step::numbered(7).is_none());
    }

    /// Shows: more backing ids than it may hold are refused, of a mount that it does not have none
    /// is made, and what is no request ends it.
    #[test]
    fn what_is_refused() {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let null = || OwnedFd::from(File::open("/dev/null").unwrap());
        let mounts = BTreeMap::from([(1, (File::open("/dev/null").unwrap(), BTreeSet::new()))]);
        let mut held = Held { spare: VecDeque::new(), mounts, made: 1, most: 0 };
        for (mount, refused) in [(1, Errno::ENFILE), (2, Errno::ENOTCONN)] {
            held.answer(&theirs, Message::new(Kind::Open, mount, 0), &[null()]).unwrap();
            let (answer, _) = receive(&ours).unwrap();
            assert_eq!((answer.kind, answer.errno), (Kind::Open, refused as i32));
        }
        held.answer(&theirs, Message::new(Kind::Mount, 0, 0), &[]).unwrap();
        assert_eq!(receive(&ours).unwrap().0.number, Step::Spare as u32);
        for (kind, fds) in
            [(Kind::Open, vec![]), (Kind::Close, vec![]), (Kind::Unmount, vec![null()])]
        {
            assert!(held.answer(&theirs, Message::new(kind, 9, 0), &fds).is_err(), "{kind:?}");
        }
        let long = [Message::new(Kind::Mount, 0, 0).bytes(), [0; MESSAGE_BYTES]].concat();
        for packet in [&b"short"[..], &long] {
            let parts = [IoSlice::new(packet)];
            sendmsg::<()>(ours.as_raw_fd(), &parts, &[], MsgFlags::empty(), None).unwrap();
            assert!(receive(&theirs).is_none());
        }
    }

    /// Shows: no backing id is made of what is not open for reading and writing.
    #[test]
    fn what_is_read_only_is_refused() {
        let open = |flags: OFlag| {
            let mode = nix::sys::stat::Mode::empty();
            nix::fcntl::open("/dev/null", flags, mode).unwrap()
        };
        let device = File::open("/dev/null").unwrap();
        let mounts = BTreeMap::from([(1, (device, BTreeSet::new()))]);
        let mut held = Held { spare: VecDeque::new(), mounts, made: 1, most: 9 };
        for (flags, refused) in [
            (OFlag::O_PATH, Errno::EBADF),
            (OFlag::O_RDONLY, Errno::EACCES),
            (OFlag::O_WRONLY, Errno::EACCES),
            (OFlag::O_RDWR | OFlag::O_APPEND, Errno::EACCES),
            // By the ioctl: the device is none.
            (OFlag::O_RDWR, Errno::ENOTTY),
        ] {
            let refusal = held.open(1, open(flags).as_fd()).unwrap_err();
            assert_eq!(refusal.raw_os_error(), Some(refused as i32), "{flags:?}");
        }
    }
}
