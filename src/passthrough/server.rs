// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The thread that answers the kernel. It makes no system call but `poll`, `read` and `write` on
//! the connection, and takes one lock, under which nobody makes any: so it can't be made to wait.

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

/// How long the kernel may take for its first word, which it says before the mount exists.
const HANDSHAKE_MS: u16 = 10_000;

/// One inode's number, which is its name, too. Never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct NodeId(u64);

impl NodeId {
    pub(super) fn name(self) -> String {
        self.0.to_string()
    }

    fn named(name: &[u8]) -> Option<Self> {
        let id = std::str::from_utf8(name).ok()?.parse().ok()?;
        // One name each: "2" is one, "02" and "+2" are not.
        (Self(id).name().as_bytes() == name).then_some(Self(id))
    }
}

/// The connection, and which inodes may be opened. Both locks are leaves: nothing is taken, and no
/// system call made, under them.
pub(super) struct Connection {
    /// None when nobody serves it any more.
    device: Mutex<Option<Arc<File>>>,
    next: AtomicU64,
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
    /// As [`BackingId::open`].
    pub(super) fn add(&self, file: BorrowedFd<'_>) -> io::Result<NodeId> {
        let device = self.device().ok_or(Errno::ENOTCONN)?;
        let backing = self.privilege.open(&device, file)?;
        // Relaxed: only that it is another number each time matters.
        let node = NodeId(self.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.backings).insert(node, backing);
        Ok(node)
    }

    /// From here on it can't be opened; what is open stays.
    pub(super) fn close(&self, node: NodeId) {
        let backing = lock(&self.backings).remove(&node);
        self.close_backing(backing);
    }

    /// As [`close`](Self::close), each one that is left.
    pub(super) fn close_all(&self) {
        let all = mem::take(&mut *lock(&self.backings));
        all.into_values().for_each(|backing| self.close_backing(Some(backing)));
    }

    /// The last reference to a deleted file may go with it, so this is never the server's to do.
    fn close_backing(&self, backing: Option<BackingId>) {
        if let (Some(backing), Some(device)) = (backing, self.device())
            && let Err(e) = self.privilege.close(&device, backing)
        {
            warn!("a backing id can't be closed, and stays until the mount goes: {e}");
        }
    }

    /// The kernel keeps an inode for its name until memory is short, also a name that it may not
    /// believe; without it, the inode goes with its last descriptor. This waits for lookups that
    /// the server has still to answer, so it is never the server's to do, either.
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
                // It was dropped, and its descriptor is opened anew through /proc.
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
    // ENOENT: nobody waits for it, or knows the name, any more. Whatever else it is, there is no
    // one to tell.
    if let Err(e) = to.write_all(reply.bytes())
        && e.raw_os_error() != Some(Errno::ENOENT as i32)
    {
        debug!("the kernel does not take a reply: {e}");
    }
}

/// Agrees with the kernel on passthrough.
///
/// # Errors
/// When the kernel has none.
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

/// Closes the connection with its thread, also when that panics: the kernel then fails what is
/// asked, where it would wait for ever.
struct Served<'a> {
    connection: &'a Connection,
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        *lock(&self.connection.device) = None;
        self.connection.privilege.unmount();
    }
}

/// Answers until `stopped`'s other end is closed, or the connection is aborted.
pub(super) fn serve(connection: &Connection, stopped: &PipeReader) {
    let Some(device) = connection.device() else { return };
    // Declared after `device`, so dropped before it: the last reference is never dropped under the
    // lock.
    let _served = Served { connection };
    if let Err(e) = answer_all(connection, &device, stopped) {
        // Whoever wants the next file makes a new mount, and says so.
        warn!("a private FUSE mount is no longer served: {e}");
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
        // Looked at before each request, so that no front-end can keep us from stopping.
        let [stop, _] = &waiting;
        if stop.any() == Some(true) {
            return Ok(());
        }
        let mut from = device;
        let length = match from.read(&mut buffer) {
            Ok(length) => length,
            Err(e) => match Errno::from_raw(e.raw_os_error().unwrap_or(0)) {
                // ENOENT: whoever asked has gone.
                Errno::EAGAIN | Errno::EINTR | Errno::ENOENT => continue,
                // ENODEV: someone aborted the connection.
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

    /// Shows: an inode has one name, and what is no name of one is refused.
    #[test]
    fn one_name_each() {
        assert_eq!(NodeId::named(b"2"), Some(NodeId(2)));
        for no in [&b""[..], b"02", b"+2", b"-2", b"x", b"\xff", b"99999999999999999999"] {
            assert_eq!(NodeId::named(no), None);
        }
    }
}
