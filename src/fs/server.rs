// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a request to its reply: reads the head of a FUSE message, has it done, and answers.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use log::{debug, error};
use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{InHeader, Opcode, WriteIn};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::device::chain::{Chain, Segment};
use crate::device::request::Request;
use crate::support::counter::Counter;

use super::buffers::copy_in;
use super::dax::Dax;
use super::descriptors::Descriptors;
use super::lives::{Life, Lives};
use super::message::{Args, IN_HEADER_BYTES, OUT_HEADER_BYTES, Reply};
use super::message::{most_args, object, out_header, request_bytes, too_much, valid_id};
use super::open_flags::OpenFlags;
use super::pool::Pace;
use super::sync_errors::Opened;

/// So much of a request is copied before its length is known.
const SHORT_BYTES: usize = 256;

/// What has been asked and answered.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    pub(crate) requests: Counter,
    pub(crate) errors: Counter,
    pub(crate) malformed: Counter,
}

/// The head of a message, copied out of the guest's memory: what it says can't change any more.
pub(crate) struct Message {
    pub(crate) header: InHeader,
    /// The header and what follows it, of a WRITE without its data. Empty if there is a fault.
    copied: Vec<u8>,
    /// How many bytes the whole request has.
    pub(crate) bytes: usize,
    /// Of the driver that sent it.
    pub(crate) life: Life,
    /// It lies about its length, or is longer than such a request can be.
    fault: Option<Errno>,
}

impl Message {
    /// Reads it. Called under the ring's lock, when the ring runs: what is read later might be another
    /// driver's memory by then; and so `life` is that of the driver which sent it.
    pub(crate) fn read(request: &Request, life: Life) -> Result<Self, Unanswerable> {
        let chain = request.chain().map_err(|_| Unanswerable)?;
        let ram = request.ram();
        let room = bytes_of(chain.writable());
        // The head of a reply goes to the first buffers.
        if !in_ram(&ram, chain.writable(), OUT_HEADER_BYTES) {
            return Err(Unanswerable);
        }
        let readable = bytes_of(chain.readable());
        // Most requests are short, and copied at once; what is none of it may lie in the window.
        let begin = copy_in(&ram, chain.readable(), SHORT_BYTES.min(readable))
            .or_else(|_| copy_in(&ram, chain.readable(), IN_HEADER_BYTES));
        let begin = begin.map_err(|_| Unanswerable)?;
        let header: InHeader = object(&begin).ok_or(Unanswerable)?;
        if room < OUT_HEADER_BYTES && !takes_no_reply(header.opcode) {
            return Err(Unanswerable);
        }
        let (bytes, head) = match extent(&header, readable) {
            Ok(extent) => extent,
            Err(fault) => return Ok(Self::faulty(header, life, fault)),
        };
        let copied = match begin.get(..head) {
            Some(_) => Ok(begin),
            None => copy_in(&ram, chain.readable(), head),
        };
        match copied {
            Ok(mut copied) if copied.len() >= head => {
                copied.truncate(head);
                Ok(Self { header, copied, bytes, life, fault: None })
            }
            _ => Ok(Self::faulty(header, life, Errno::EINVAL)),
        }
    }

    fn faulty(header: InHeader, life: Life, fault: Errno) -> Self {
        Self { header, copied: Vec::new(), bytes: 0, life, fault: Some(fault) }
    }

    /// What follows the header; of a WRITE without its data.
    fn args(&self) -> &[u8] {
        self.copied.get(IN_HEADER_BYTES..).unwrap_or_default()
    }

    pub(crate) fn opcode(&self) -> Option<Opcode> {
        Opcode::try_from(self.header.opcode).ok()
    }

    pub(crate) fn context(&self) -> Context {
        Context::from(self.header)
    }

    pub(crate) fn nodeid(&self) -> u64 {
        self.header.nodeid
    }
}

/// How many bytes a request has, and how many of them are kept until it is served.
fn extent(header: &InHeader, readable: usize) -> Result<(usize, usize), Errno> {
    let bytes = request_bytes(header, readable).map_err(|_| Errno::EINVAL)?;
    let opcode = Opcode::try_from(header.opcode).ok();
    if matches!(opcode, Some(Opcode::Write)) {
        return Ok((bytes, bytes.min(IN_HEADER_BYTES + size_of::<WriteIn>())));
    }
    match most_args(opcode) {
        None => Ok((bytes, IN_HEADER_BYTES)),
        Some(most) if bytes - IN_HEADER_BYTES <= most => Ok((bytes, bytes)),
        Some(_) => Err(too_much(opcode)),
    }
}

fn bytes_of(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.bytes as usize).sum()
}

/// Whether the first `bytes` of `segments` are RAM, as far as they go.
fn in_ram(ram: &GuestMemoryMmap, segments: &[Segment], bytes: usize) -> bool {
    let mut left = bytes;
    for segment in segments {
        let now = left.min(segment.bytes as usize);
        if now > 0 && !GuestMemoryBackend::check_range(ram, segment.at, now) {
            return false;
        }
        left -= now;
    }
    true
}

/// Whether a request makes something that belongs to whoever asks for it.
fn makes(opcode: Opcode) -> bool {
    use Opcode::*;
    matches!(opcode, Create | Mknod | Mkdir | Symlink)
}

/// A chain that holds no message: it goes back as it came.
pub(crate) struct Unanswerable;

fn moves_data(opcode: Option<Opcode>) -> bool {
    matches!(opcode, Some(Opcode::Read | Opcode::Write))
}

fn would_wait(done: &io::Result<Reply>) -> bool {
    done.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

fn takes_no_reply(opcode: u32) -> bool {
    [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt].iter().any(|o| *o as u32 == opcode)
}

/// How long a request may take: what waits for no disk does not wait for those that do.
pub(crate) fn pace(opcode: Option<Opcode>) -> Pace {
    use Opcode::*;
    match opcode {
        Some(
            Fsync | Fsyncdir | Flush | Fallocate | Syncfs | CopyFileRange | Open | Opendir | Create
            | Release | Releasedir | Setattr | Unlink | Rmdir | Rename | Rename2 | Read | Write
            | Destroy,
        ) => Pace::Slow,
        _ => Pace::Quick,
    }
}

/// Whether a request may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// As long as it likes.
    Any,
    /// READ and WRITE must not wait for what can be known to keep them waiting.
    None,
    /// Nor for what nothing can be known of.
    Least,
}

/// More data than this is better moved beside other requests than before them.
const MUCH_DATA: usize = 64 << 10;

/// Whether a request is served sooner by the thread that took it than by another one, which must be woken
/// first. `more` requests wait behind it.
pub(crate) fn is_quick(message: &Message, request: &Request, more: bool) -> bool {
    use Opcode::*;
    match message.opcode() {
        Some(Fsync | Fsyncdir | Syncfs | Fallocate | CopyFileRange | Destroy) => false,
        Some(SetupMapping | RemoveMapping | Setattr | Readdirplus) => !more,
        Some(Read) => !more || !is_copy(message, request),
        _ => true,
    }
}

/// Whether a request is one of those that do little else than copy, if what they copy is in memory.
pub(crate) fn is_copy(message: &Message, request: &Request) -> bool {
    matches!(message.opcode(), Some(Opcode::Read)) && room(request) > MUCH_DATA
}

/// One device's file system, its open files, and its window.
pub(crate) struct Server<F> {
    pub(crate) fs: F,
    pub(crate) dax: Option<Arc<Dax>>,
    pub(crate) opened: Opened,
    /// What may be asked of the host when a file is opened.
    pub(crate) open_flags: OpenFlags,
    pub(crate) descriptors: Descriptors,
    /// The options that INIT agreed on (FUSE flags and flags2).
    pub(crate) options: AtomicU64,
    pub(crate) lives: Lives,
    pub(crate) tally: Tally,
}

/// A [`Server`], whatever its file system.
pub(crate) trait Serve: Send + Sync {
    /// Does what the message asks for, and answers it; or gives it back, if it has no patience to wait.
    fn serve(
        &self,
        request: Request,
        message: Message,
        patience: Patience,
    ) -> Option<(Request, Message)>;

    /// That of the driver whose requests are taken now.
    fn life(&self) -> Life;

    /// A driver has begun anew. None of its requests is taken before this returns.
    fn restarted(&self);

    /// The session is over.
    fn ended(&self);

    fn tally(&self) -> &Tally;
}

impl<F> Serve for Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    fn serve(
        &self,
        mut request: Request,
        message: Message,
        patience: Patience,
    ) -> Option<(Request, Message)> {
        let header = message.header;
        debug!("{:?} nodeid={} unique={}", message.opcode(), header.nodeid, header.unique);
        let dispatch = || self.dispatch(&mut request, &message, patience);
        let done = catch_unwind(AssertUnwindSafe(dispatch));
        let done = done.unwrap_or_else(|_| {
            error!("{:?} made its thread panic: this is a bug", message.opcode());
            Err(Errno::EIO.into())
        });
        if patience != Patience::Any && moves_data(message.opcode()) && would_wait(&done) {
            request.unpin();
            return Some((request, message));
        }
        self.tally.requests.add(1);
        if let Err(e) = &done {
            self.tally.errors.add(1);
            debug!("{:?} unique={}: {e}", message.opcode(), header.unique);
        }
        self.answer(request, header.unique, done);
        None
    }

    fn life(&self) -> Life {
        self.lives.current()
    }

    fn restarted(&self) {
        self.lives.begin();
        if let Some(dax) = &self.dax {
            dax.forget();
        }
    }

    fn ended(&self) {
        self.lives.begin();
        if let Some(dax) = &self.dax {
            dax.session_ended();
        }
        self.opened.clear();
        self.fs.destroy();
    }

    fn tally(&self) -> &Tally {
        &self.tally
    }
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    fn dispatch(
        &self,
        request: &mut Request,
        message: &Message,
        patience: Patience,
    ) -> io::Result<Reply> {
        let opcode = message.opcode().ok_or(Errno::ENOSYS)?;
        if let Some(fault) = message.fault {
            return Err(fault.into());
        }
        if makes(opcode) {
            // Linux sends -1 where ids don't matter (FUSE_ALLOW_IDMAP): not here.
            valid_id(message.header.uid)?;
            valid_id(message.header.gid)?;
        }
        let before_init = matches!(opcode, Opcode::Init | Opcode::Destroy);
        if !before_init && !self.lives.is_mounted(message.life) {
            return if takes_no_reply(opcode as u32) {
                Ok(Reply::None)
            } else {
                Err(Errno::EIO.into())
            };
        }
        let mut args = Args::new(message.args());
        match opcode {
            Opcode::Read => self.read(request, message, &mut args, patience),
            Opcode::Write => self.write(request, message, &mut args, patience),
            _ => self.operate(opcode, message, &mut args, room(request)),
        }
    }

    fn answer(&self, request: Request, unique: u64, done: io::Result<Reply>) {
        match done {
            Ok(Reply::None) => request.complete_with(None, Vec::new(), 0),
            Ok(Reply::Bytes(bytes)) => self.answer_bytes(request, unique, bytes),
            Ok(Reply::Data(bytes)) => {
                request.complete_with(
                    Some(out_header(unique, 0, bytes as usize)),
                    Vec::new(),
                    bytes,
                );
            }
            Err(e) => {
                let errno = e.raw_os_error().filter(|errno| *errno > 0).unwrap_or(libc::EIO);
                answer_error(request, unique, errno);
            }
        }
    }

    fn answer_bytes(&self, request: Request, unique: u64, bytes: Vec<u8>) {
        let fits = bytes.len() <= room(&request);
        let whole = OUT_HEADER_BYTES + bytes.len();
        let in_memory = in_ram(&request.ram(), writable(&request), whole);
        if !fits || !in_memory {
            // Less room than the message asks for, or room that no driver gives to it.
            return answer_error(request, unique, if fits { libc::EFAULT } else { libc::EINVAL });
        }
        request.complete_with(Some(out_header(unique, 0, bytes.len())), bytes, 0);
    }
}

fn answer_error(request: Request, unique: u64, errno: i32) {
    request.complete_with(Some(out_header(unique, -errno, 0)), Vec::new(), 0);
}

fn writable(request: &Request) -> &[Segment] {
    request.chain().map(Chain::writable).unwrap_or_default()
}

/// The room behind the header of the reply.
pub(crate) fn room(request: &Request) -> usize {
    bytes_of(writable(request)).saturating_sub(OUT_HEADER_BYTES)
}
