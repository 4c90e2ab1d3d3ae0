// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a request to its reply: checks the head of a FUSE message, calls the operation, and
//! completes the request.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use log::{debug, error};
use nix::errno::Errno;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::Opcode;

use crate::device::request::Request;

use super::dax::Dax;
use super::descriptors::Descriptors;
use super::inodes::Inodes;
use super::lives::{Life, Lives};
use super::message::{Args, Message, OUT_HEADER_BYTES, Reply};
use super::message::{in_ram, out_header, room, takes_no_reply, valid_id, writable};
use super::open_flags::OpenFlags;
use super::serve::{Blocking, Metrics, Serve};
use super::sync_errors::WritebackErrors;

/// Whether a request creates an inode, which the ids of the request's header will own.
fn makes(opcode: Opcode) -> bool {
    use Opcode::*;
    matches!(opcode, Create | Mknod | Mkdir | Symlink)
}

fn would_wait(done: &io::Result<Reply>) -> bool {
    done.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

/// One device's file system, its open files, and its window.
pub(crate) struct Server<F> {
    pub(crate) fs: F,
    pub(crate) dax: Option<Arc<Dax>>,
    pub(crate) opened: WritebackErrors,
    /// Flags of an open that are passed on to the host.
    pub(crate) open_flags: OpenFlags,
    pub(crate) descriptors: Descriptors,
    pub(crate) inodes: Inodes,
    /// FUSE options that INIT has enabled (flags, and flags2 in the upper 32 bits).
    pub(crate) options: AtomicU64,
    pub(crate) lives: Lives,
    pub(crate) metrics: Metrics,
}

impl<F> Serve for Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    fn serve(
        &self,
        mut request: Request,
        message: Message,
        blocking: Blocking,
    ) -> Option<(Request, Message)> {
        let header = message.header;
        debug!("{:?} nodeid={} unique={}", message.opcode(), header.nodeid, header.unique);
        let dispatch = || self.dispatch(&mut request, &message, blocking);
        let done = catch_unwind(AssertUnwindSafe(dispatch));
        let done = done.unwrap_or_else(|_| {
            error!("{:?} made its thread panic: this is a bug in the daemon", message.opcode());
            Err(Errno::EIO.into())
        });
        if blocking.gives_back(message.opcode()) && would_wait(&done) {
            request.unpin();
            return Some((request, message));
        }
        self.metrics.requests.add(1);
        if let Err(e) = &done {
            self.metrics.errors.add(1);
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
        self.inodes.clear();
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
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
        blocking: Blocking,
    ) -> io::Result<Reply> {
        let opcode = message.opcode().ok_or(Errno::ENOSYS)?;
        if let Some(fault) = message.fault {
            return Err(fault.into());
        }
        if makes(opcode) {
            // Linux sends -1 in requests that need no ids (FUSE_ALLOW_IDMAP); these requests need
            // them.
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
            Opcode::Read => self.read(request, message, &mut args, blocking),
            Opcode::Write => self.write(request, message, &mut args, blocking),
            _ => self.operate(opcode, message, room(request), blocking),
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
            // The guest has given less room than the message needs, or room outside of its RAM.
            return answer_error(request, unique, if fits { libc::EFAULT } else { libc::EINVAL });
        }
        request.complete_with(Some(out_header(unique, 0, bytes.len())), bytes, 0);
    }
}

fn answer_error(request: Request, unique: u64, errno: i32) {
    request.complete_with(Some(out_header(unique, -errno, 0)), Vec::new(), 0);
}
