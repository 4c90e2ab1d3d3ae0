// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: extracts the back-end channel's socket from the vhost library, whose API does not
//! give access to it. Knows no request but one that changes nothing.
//!
//! The socket is one of this process's descriptors in `/proc/self/fd`: a connected Unix stream
//! socket without a name. It is found by messages that the library is made to send: right after a
//! message, the channel's socket has data that the peer has not read yet, and the other candidates
//! have none. As a check, the library's handle is then dropped, which must close one of the
//! descriptor numbers of the socket that was found.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{SockType, getsockopt, sockopt};
use vhost::vhost_user::message::VhostUserSharedMsg;
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};

use crate::support::fd_table;
use crate::support::lock::{Mutex, MutexGuard, try_lock};
use crate::window::channel::raw::{duplicate, unread};

/// Number of volleys by which the best candidate must lead the second best. A volley is a hit for
/// each candidate that has unread data only after it.
const ENOUGH: usize = 2;

/// Number of messages in a volley. After a single message, the peer may have read it before this
/// thread looks.
const VOLLEY: usize = 4;

/// Largest number of volleys: 192 messages. They fit into the send buffer of a socket whose peer
/// reads nothing, so no send blocks. The buffer has room for about 270 small messages
/// (net.core.wmem_default is 212992 bytes, and each message takes 768 bytes).
const MOST: u32 = 48;

/// Pause after the first volley; the pause after volley n is n times as long, 0.5 s in all. A
/// volley is useful only if the peer has read the one before.
const PAUSE: Duration = Duration::from_micros(400);

/// Longest wait for the search of another session. A search takes 0.5 s at most, unless its
/// front-end reads nothing and has a smaller socket buffer, so that a send blocks.
const PATIENCE: Duration = Duration::from_secs(10);

/// The socket could not be extracted.
pub(super) struct Failed {
    /// The library's channel. None if it was closed already.
    pub(super) library: Option<Backend>,
    /// The cause, for the log.
    pub(super) why: String,
}

/// A socket of this process that may be the channel's.
struct Candidate {
    /// A duplicate of it.
    copy: UnixStream,
    /// The descriptor numbers that refer to it, without that of `copy`.
    numbers: Vec<RawFd>,
}

/// Extracts the socket of `library`, which must be the only handle to it. The front-end must be
/// known to ack; `harmless` is a shared object that it does not know.
///
/// # Errors
/// [`Failed`]: another session's search takes too long, `/proc/self/fd` can't be read, no candidate
/// leads clearly, or the wrong socket was found.
pub(super) fn take_over(
    library: Backend,
    harmless: &VhostUserSharedMsg,
) -> Result<UnixStream, Failed> {
    let Some(_turn) = turn(PATIENCE) else {
        let why = "another session's search for its socket takes too long".to_string();
        return Err(Failed { library: Some(library), why });
    };

    let found = candidates().and_then(|mut candidates| {
        // Without NEED_REPLY, the library does not wait for an ack of the messages that follow.
        library.set_reply_ack_flag(false);
        let found = find(&library, harmless, &candidates);
        library.set_reply_ack_flag(true);
        candidates.remove(&found?).ok_or_else(|| io::ErrorKind::NotFound.into())
    });
    match found {
        Err(e) => Err(Failed { library: Some(library), why: e.to_string() }),
        Ok(Candidate { copy, numbers }) => {
            drop(library);
            let is_it = inode(&copy)
                .is_ok_and(|inode| numbers.iter().any(|fd| inode_behind(*fd) != Some(inode)));
            let why = "the search found a socket that is not the channel's".to_string();
            if is_it { Ok(copy) } else { Err(Failed { library: None, why }) }
        }
    }
}

/// The lock that permits one search at a time: two sessions would take each other's copies for
/// candidates. None if another session holds it for longer than `patience`.
fn turn(patience: Duration) -> Option<MutexGuard<'static, ()>> {
    // Of rank `Rank::Leaf`.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let deadline = Instant::now() + patience;
    loop {
        match try_lock(&ONE_AT_A_TIME) {
            None if Instant::now() < deadline => thread::sleep(PAUSE),
            turn => return turn,
        }
    }
}

/// The inode of the socket on which the library sends its messages.
fn find(
    library: &Backend,
    harmless: &VhostUserSharedMsg,
    candidates: &BTreeMap<u64, Candidate>,
) -> io::Result<u64> {
    // The newest sockets first, since the channel is new: the peer may read the messages before
    // this thread has looked at all candidates.
    let mut ranking: Vec<_> = candidates.iter().rev().map(|(inode, c)| (0, *inode, c)).collect();
    for round in 1..=MOST {
        let quiet: Vec<bool> = ranking.iter().map(|(.., c)| !has_unread(&c.copy)).collect();
        if quiet.contains(&true) {
            for _ in 0..VOLLEY {
                library.shared_object_remove(harmless)?;
            }
            for ((hits, _, c), quiet) in ranking.iter_mut().zip(quiet) {
                *hits += usize::from(quiet && has_unread(&c.copy));
            }
            ranking.sort_by_key(|(hits, ..)| Reverse(*hits));
            // Sockets of other sessions may have had unread data by chance: the best candidate must
            // lead the second best.
            let second = ranking.get(1).map_or(0, |(hits, ..)| *hits);
            if let Some((hits, inode, _)) = ranking.first()
                && *hits >= ENOUGH + second
            {
                return Ok(*inode);
            }
        }
        thread::sleep(PAUSE * round);
    }
    let text = format!("the channel's socket was not found among {} sockets", candidates.len());
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

/// The connected Unix stream sockets of this process whose both ends have no name, by inode.
fn candidates() -> io::Result<BTreeMap<u64, Candidate>> {
    let mut found: BTreeMap<u64, Candidate> = BTreeMap::new();
    for fd in fd_table::numbers()? {
        // An error: another thread has closed the descriptor meanwhile.
        let Ok(copy) = duplicate(fd).map(UnixStream::from) else { continue };
        let Ok(inode) = inode(&copy) else { continue };
        if !may_be_a_channel(&copy) {
            continue;
        }
        found.entry(inode).or_insert(Candidate { copy, numbers: Vec::new() }).numbers.push(fd);
    }
    Ok(found)
}

fn may_be_a_channel(socket: &UnixStream) -> bool {
    let unnamed = |name: io::Result<std::os::unix::net::SocketAddr>| {
        // An error: the descriptor is no Unix socket, or is not connected.
        name.is_ok_and(|name| name.is_unnamed())
    };
    unnamed(socket.local_addr())
        && unnamed(socket.peer_addr())
        && getsockopt(socket, sockopt::SockType) == Ok(SockType::Stream)
}

fn has_unread(socket: &UnixStream) -> bool {
    unread(socket).is_ok_and(|unread| unread > 0)
}

fn inode(socket: &UnixStream) -> io::Result<u64> {
    Ok(nix::sys::stat::fstat(socket)?.st_ino)
}

fn inode_behind(fd: RawFd) -> Option<u64> {
    inode(&UnixStream::from(duplicate(fd).ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    fn library() -> (Backend, UnixStream, u64) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let inode = inode(&ours).unwrap();
        let library = Backend::from_stream(ours);
        library.set_reply_ack_flag(true);
        library.set_shared_object_flag(true);
        (library, theirs, inode)
    }

    /// A front-end that reads all messages. Returns the number of bytes that it has read.
    fn reads(mut peer: UnixStream) -> thread::JoinHandle<usize> {
        thread::spawn(move || peer.read_to_end(&mut Vec::new()).unwrap())
    }

    /// Shows: the channel's socket is found, also while another thread creates, uses and closes
    /// sockets.
    #[test]
    fn finds_the_socket_among_busy_ones() {
        let over = Arc::new(AtomicBool::new(false));
        let busy: Vec<_> = (0..1)
            .map(|_| {
                let over = over.clone();
                thread::spawn(move || {
                    while !over.load(Ordering::Relaxed) {
                        use std::io::Write;
                        let (mut a, mut b) = UnixStream::pair().unwrap();
                        for _ in 0..50 {
                            a.write_all(b"x").unwrap();
                            thread::yield_now();
                            b.read_exact(&mut [0]).unwrap();
                        }
                    }
                })
            })
            .collect();
        for _ in 0..8 {
            let (library, peer, expected) = library();
            let peer = reads(peer);
            let socket = take_over(library, &VhostUserSharedMsg::default());
            let socket = socket.unwrap_or_else(|failed| panic!("{}", failed.why));
            assert_eq!(inode(&socket).unwrap(), expected);
            drop(socket);
            // The peer has seen the end of the stream, so no other descriptor of the socket is
            // open. Each message was complete: a header of 12 bytes and a body of 16.
            let bytes = peer.join().unwrap();
            assert!(bytes >= ENOUGH * VOLLEY * 28 && bytes.is_multiple_of(28), "{bytes}");
        }
        over.store(true, Ordering::Relaxed);
        busy.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// Shows: if the front-end does not read, or has closed the channel, the library's channel is
    /// returned.
    #[test]
    fn gives_the_channel_back() {
        let (library, peer, _) = library();
        let failed = take_over(library, &VhostUserSharedMsg::default()).unwrap_err();
        let library = failed.library.expect("the library's channel is returned");
        drop(peer);
        let failed = take_over(library, &VhostUserSharedMsg::default()).unwrap_err();
        assert!(failed.library.is_some());
    }

    /// Shows: the wait for another session's search has a limit.
    #[test]
    fn a_turn_is_not_waited_for_for_ever() {
        let held = turn(PATIENCE).unwrap();
        assert!(turn(Duration::ZERO).is_none());
        drop(held);
        assert!(turn(PATIENCE).is_some());
    }

    /// Shows: a channel with a second handle in the library is not extracted.
    #[test]
    fn the_only_handle_is_needed() {
        let (library, peer, _) = library();
        let peer = reads(peer);
        let other = library.clone();
        let failed = take_over(library, &VhostUserSharedMsg::default()).unwrap_err();
        assert!(failed.library.is_none(), "{}", failed.why);
        drop(other);
        peer.join().unwrap();
    }
}
