// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a request to its reply: reads the head of a FUSE message, has it done, and answers.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use log::{debug, error};
use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{InHeader, Opcode, WriteIn};

use crate::dax::counters::Counter;
use crate::request::{Chain, Request, Segment};

use super::dax::Dax;
use super::descriptors::Descriptors;
use super::guest_io::copy_in;
use super::message::{Args, IN_HEADER_BYTES, OUT_HEADER_BYTES, Reply};
use super::message::{object, out_header, request_bytes};
use super::opened::Opened;
use super::pool::Pace;

/// So much of a request is copied before its length is known.
const SHORT_BYTES: usize = 256;

/// What has been asked and answered.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) requests: Counter,
    pub(super) errors: Counter,
    pub(super) malformed: Counter,
}

/// The head of a message, copied out of the guest's memory: what it says can't change any more.
pub(super) struct Message {
    pub(super) header: InHeader,
    /// The header and what follows it, of a WRITE without its data. Empty if that was not all there.
    copied: Vec<u8>,
    /// How many bytes the whole request has.
    pub(super) bytes: usize,
}

impl Message {
    /// Reads it. Called under the ring's lock, when the ring runs: what is read later might be another
    /// driver's memory by then.
    pub(super) fn read(request: &Request, dax: Option<&Dax>) -> Result<Self, Unanswerable> {
        let chain = request.chain().map_err(|_| Unanswerable)?;
        let mem = request.memory();
        let place = dax.and_then(Dax::place);
        let in_window = |segment| place.is_some_and(|place| place.touches(segment));
        // The head of a reply goes to the first buffers, which must be memory.
        let mut room = 0;
        for segment in chain.writable() {
            if room < OUT_HEADER_BYTES && in_window(*segment) {
                return Err(Unanswerable);
            }
            room += segment.bytes as usize;
        }
        let readable = chain.readable().iter().map(|segment| segment.bytes as usize).sum();
        // Most requests are short, and copied at once; what is none of it may lie in the window.
        let begin = copy_in(&mem, chain.readable(), SHORT_BYTES.min(readable), place)
            .or_else(|_| copy_in(&mem, chain.readable(), IN_HEADER_BYTES, place));
        let begin = begin.map_err(|_| Unanswerable)?;
        let header: InHeader = object(&begin).ok_or(Unanswerable)?;
        let bytes = request_bytes(&header, readable);
        let head = match bytes {
            Ok(bytes) if header.opcode == Opcode::Write as u32 => {
                bytes.min(IN_HEADER_BYTES + size_of::<WriteIn>())
            }
            Ok(bytes) => bytes,
            Err(_) => IN_HEADER_BYTES,
        };
        let copied = match begin.get(..head) {
            Some(_) => Ok(begin),
            None => copy_in(&mem, chain.readable(), head, place),
        };
        if room < OUT_HEADER_BYTES && !takes_no_reply(header.opcode) {
            return Err(Unanswerable);
        }
        // A message that lies about its length is answered with EINVAL: see `is_whole`.
        let whole = copied.ok().filter(|copied| copied.len() >= head).zip(bytes.ok());
        let (mut copied, bytes) = whole.unwrap_or_default();
        copied.truncate(head);
        Ok(Self { header, copied, bytes })
    }

    /// What follows the header; of a WRITE without its data.
    fn args(&self) -> &[u8] {
        self.copied.get(IN_HEADER_BYTES..).unwrap_or_default()
    }

    /// Whether all that the header promises was there.
    pub(super) fn is_whole(&self) -> bool {
        self.bytes > 0
    }

    pub(super) fn opcode(&self) -> Option<Opcode> {
        Opcode::try_from(self.header.opcode).ok()
    }

    pub(super) fn context(&self) -> Context {
        Context::from(self.header)
    }

    pub(super) fn nodeid(&self) -> u64 {
        self.header.nodeid
    }
}

/// A chain that holds no message: it goes back as it came.
pub(super) struct Unanswerable;

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
pub(super) fn pace(opcode: Option<Opcode>) -> Pace {
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
pub(super) enum Patience {
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
pub(super) fn is_quick(message: &Message, request: &Request, more: bool) -> bool {
    use Opcode::*;
    match message.opcode() {
        Some(Fsync | Fsyncdir | Syncfs | Fallocate | CopyFileRange | Destroy) => false,
        Some(SetupMapping | RemoveMapping | Setattr | Readdirplus) => !more,
        Some(Read) => !more || !is_copy(message, request),
        _ => true,
    }
}

/// Whether a request is one of those that do little else than copy, if what they copy is in memory.
pub(super) fn is_copy(message: &Message, request: &Request) -> bool {
    matches!(message.opcode(), Some(Opcode::Read)) && room(request) > MUCH_DATA
}

/// One device's file system, its open files, and its window.
pub(super) struct Server<F> {
    pub(super) fs: F,
    pub(super) dax: Option<Arc<Dax>>,
    pub(super) opened: Opened,
    pub(super) descriptors: Descriptors,
    /// The options that INIT agreed on (FUSE flags and flags2).
    pub(super) options: AtomicU64,
    pub(super) initialised: AtomicBool,
    pub(super) tally: Tally,
}

/// A [`Server`], whatever its file system.
pub(super) trait Serve: Send + Sync {
    /// Does what the message asks for, and answers it; or gives it back, if it has no patience to wait.
    fn serve(
        &self,
        request: Request,
        message: Message,
        patience: Patience,
    ) -> Option<(Request, Message)>;

    /// A driver has begun anew.
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
            request.let_go();
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

    fn restarted(&self) {
        self.initialised.store(false, Ordering::Relaxed);
        if let Some(dax) = &self.dax {
            dax.forget();
        }
    }

    fn ended(&self) {
        self.initialised.store(false, Ordering::Relaxed);
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
        if !message.is_whole() {
            return Err(Errno::EINVAL.into());
        }
        let before_init = matches!(opcode, Opcode::Init | Opcode::Destroy);
        if !before_init && !self.initialised.load(Ordering::Relaxed) {
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
        let place = self.dax.as_deref().and_then(Dax::place);
        let fits = bytes.len() <= room(&request);
        let in_memory = place
            .is_none_or(|place| !writable(&request).iter().any(|segment| place.touches(*segment)));
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
pub(super) fn room(request: &Request) -> usize {
    let bytes: usize = writable(request).iter().map(|segment| segment.bytes as usize).sum();
    bytes.saturating_sub(OUT_HEADER_BYTES)
}
