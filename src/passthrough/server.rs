// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread "passthrough", which answers the kernel's FUSE requests. It makes no system call but
//! `poll`, `read` and `write` on the connection, and takes only locks under which no thread makes a
//! system call. So no other thread can block it.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use log::{debug, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Privilege;
use super::Unavailable;
use super::backing_id::BackingId;
use super::protocol::{Ask, READ_BUFFER_BYTES, ROOT, Reply, Request};
use crate::support::lock::{Mutex, lock};

/// Longest wait in ms for the kernel's INIT request. The kernel sends it when the mount is made, so
/// it is there already.
const HANDSHAKE_MS: u16 = 10_000;

/// The number of an inode. Its decimal form is the inode's name. A number is never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct NodeId(u64);

impl NodeId {
    pub(super) fn name(self) -> String {
        self.0.to_string()
    }

    fn named(name: &[u8]) -> Option<Self> {
        let id = std::str::from_utf8(name).ok()?.parse().ok()?;
        // Each inode has one name: "2" is a name, "02" and "+2" are not.
        (Self(id).name().as_bytes() == name).then_some(Self(id))
    }
}

/// The connection, and the inodes that can be opened. Both locks have rank `Rank::Leaf`: no lock is
/// taken and no system call is made under them.
pub(super) struct Connection {
    /// `/dev/fuse`. None after the server thread has ended.
    device: Mutex<Option<Arc<File>>>,
    /// The number of the next inode.
    next: AtomicU64,
    /// The inodes that can be opened, with their backing ids.
    backings: Mutex<HashMap<NodeId, BackingId>>,
    privilege: Privilege,
}

impl Connection {
    pub(super) fn new(device: File, privilege: Privilege) -> Self {
        Self {
            privilege,
            device: Mutex::new(Some(Arc::new(device))),
            next: AtomicU64::new(ROOT + 1),
            backings: Mutex::new(HashMap::new()),
        }
    }

    fn device(&self) -> Option<Arc<File>> {
        lock(&self.device).clone()
    }

    /// A new inode, backed by `file`.
    ///
    /// # Errors
    /// ENOTCONN if the server thread has ended; see [`BackingId::open`].
    pub(super) fn add(&self, file: BorrowedFd<'_>) -> io::Result<NodeId> {
        let device = self.device().ok_or(Errno::ENOTCONN)?;
        let backing = self.privilege.open(&device, file)?;
        // Relaxed: each call only needs a different number.
        let node = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.backings).insert(node, backing);
        Ok(node)
    }

    /// Closes the backing id of an inode. The inode can't be opened from then on; its open files
    /// stay open.
    pub(super) fn close(&self, node: NodeId) {
        let backing = lock(&self.backings).remove(&node);
        self.close_backing(backing);
    }

    /// [Closes](Self::close) all inodes.
    pub(super) fn close_all(&self) {
        let all = mem::take(&mut *lock(&self.backings));
        all.into_values().for_each(|backing| self.close_backing(Some(backing)));
    }

    /// Closes a backing id. Never call it on the server thread: it may drop the last reference to a
    /// deleted file, whose blocks are then freed in this call.
    fn close_backing(&self, backing: Option<BackingId>) {
        if let (Some(backing), Some(device)) = (backing, self.device())
            && let Err(e) = self.privilege.close(&device, backing)
        {
            warn!(
                "the backing id of a passthrough file can't be closed, its host file stays open \
                 until the private FUSE mount is removed: {e}"
            );
        }
    }

    /// Makes the kernel drop the name of an inode, so that the inode is freed with its last
    /// descriptor. Otherwise the kernel keeps the name's dentry, and by it the inode, until memory
    /// is short, although the name's validity has expired. Never call it on the server thread: it
    /// waits for lookups that the server thread has to answer.
    pub(super) fn forget_name(&self, node: NodeId) {
        if let Some(device) = self.device() {
            write(&device, Reply::name_is_gone(&node.name()));
        }
    }

    fn backing(&self, node: NodeId) -> Option<BackingId> {
        lock(&self.backings).get(&node).copied()
    }

    fn answer(&self, request: &Request<'_>) -> Option<Reply> {
        let unique = request.unique;
        let refuse = |errno| Some(Reply::error(unique, errno));
        match request.ask {
            Ask::Forget => None,
            Ask::Lookup { name } => match NodeId::named(name) {
                Some(node) if self.backing(node).is_some() => Some(Reply::entry(unique, node.0)),
                _ => refuse(Errno::ENOENT),
            },
            Ask::Open { node } => match self.backing(NodeId(node)) {
                Some(backing) => Some(Reply::opened(unique, backing.number())),
                // The PassthroughFile was dropped, and a process opens a remaining descriptor of it
                // again through /proc.
                None => refuse(Errno::ESTALE),
            },
            Ask::GetAttr { node } => Some(Reply::attributes(unique, node)),
            Ask::Release => Some(Reply::done(unique)),
            Ask::StatFs => Some(Reply::statfs(unique)),
            Ask::SetAttr => refuse(Errno::EPERM),
            Ask::Fsync => refuse(Errno::EINVAL),
            Ask::Init { .. } => refuse(Errno::EPROTO),
            Ask::Other(_) => refuse(Errno::ENOSYS),
            Ask::Malformed => refuse(Errno::EIO),
        }
    }
}

fn write(device: &File, mut reply: Reply) {
    let mut to = device;
    // ENOENT: the request was interrupted, or the kernel does not know the name any more. Another
    // error is only logged: it concerns no caller.
    if let Err(e) = to.write_all(reply.bytes())
        && e.raw_os_error() != Some(Errno::ENOENT as i32)
    {
        debug!("the kernel refused a reply of the private FUSE mount: {e}");
    }
}

/// Answers the kernel's INIT request, and enables passthrough.
///
/// # Errors
/// [`Unavailable::NoPassthrough`] if the kernel does not offer it; [`Unavailable::Host`] if poll(2)
/// or read(2) fails, no request comes, or the request is not INIT.
pub(super) fn handshake(device: &File) -> Result<(), Unavailable> {
    let at = Unavailable::at("handshake");
    let mut waiting = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
    if poll(&mut waiting, HANDSHAKE_MS).map_err(|e| at(e.into()))? == 0 {
        return Err(at(Errno::ETIMEDOUT.into()));
    }
    let mut buffer = [0; READ_BUFFER_BYTES];
    let mut from = device;
    let length = from.read(&mut buffer).map_err(&at)?;
    match buffer.get(..length).and_then(Request::parse) {
        Some(Request { unique, ask: Ask::Init { major: 7, passthrough: true, .. } }) => {
            write(device, Reply::init(unique, 0));
            Ok(())
        }
        Some(Request { ask: Ask::Init { major, minor, .. }, .. }) => {
            Err(Unavailable::NoPassthrough { major, minor })
        }
        _ => Err(at(Errno::EPROTO.into())),
    }
}

/// Closes the connection when the server thread ends, also by a panic: the kernel then fails all
/// requests, which would wait forever otherwise.
struct Served<'a> {
    connection: &'a Connection,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        *lock(&self.connection.device) = None;
        self.connection.privilege.unmount();
    }
}

/// Answers requests until the other end of `stopped` is closed, or the connection is aborted.
pub(super) fn serve(connection: &Connection, stopped: &PipeReader) {
    let Some(device) = connection.device() else { return };
    // Declared after `device`, so dropped before it. So the drop of `_served`, which holds the lock
    // of the connection, never drops the last reference to the device, which is a system call.
    let _served = Served { connection };
    if let Err(e) = answer_all(connection, &device, stopped) {
        // The next PassthroughMount::open() re-creates the mount and logs that.
        warn!("the private FUSE mount is no longer served, its connection failed: {e}");
    }
}

fn answer_all(connection: &Connection, device: &File, stopped: &PipeReader) -> io::Result<()> {
    let mut buffer = [0; READ_BUFFER_BYTES];
    loop {
        let mut waiting = [
            PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
            PollFd::new(device.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut waiting, PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
        // Checked before each request, so that a front-end with many requests can't delay the stop.
        let [stop, _] = &waiting;
        if stop.any() == Some(true) {
            return Ok(());
        }
        let mut from = device;
        let length = match from.read(&mut buffer) {
            Ok(length) => length,
            Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                // ENOENT: the request was interrupted before it was read.
                Errno::EAGAIN | Errno::EINTR | Errno::ENOENT => continue,
                // ENODEV: the connection was aborted.
                _ => return Err(e),
            },
        };
        let request = buffer.get(..length).and_then(Request::parse).ok_or(Errno::EPROTO)?;
        if let Some(reply) = connection.answer(&request) {
            write(device, reply);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: an inode has one name, and other spellings of its number are refused.
    #[test]
    fn one_name_each() {
        assert_eq!(NodeId::named(b"2"), Some(NodeId(2)));
        for no in [&b""[..], b"02", b"+2", b"-2", b"x", b"\xff", b"99999999999999999999"] {
            assert_eq!(NodeId::named(no), None);
        }
    }
}
