// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: gets the back-end channel's socket out of the library, which gives it to nobody.
//! Knows no request but one that changes nothing.
//!
//! The socket is one of ours in `/proc/self/fd`: a connected Unix stream without a name. Which one,
//! a message tells that the library is made to send: right behind it, this socket alone has
//! something that the peer has not read yet. And when the library lets go of it, its number is
//! free.

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

/// Number of volleys that must point at the same socket; each that pointed at another adds one.
const ENOUGH: usize = 2;

/// Messages in a volley: of a single one, the peer may have read all before we look.
const VOLLEY: usize = 4;

/// Largest number of volleys. A peer that reads none must not make the daemon wait: a socket takes
/// some 270 small messages (net.core.wmem_default, 212992 bytes; 768 for each).
const MOST: u32 = 48;

/// Between two volleys, and a little more each time: the peer should have read the first, or the
/// second says nothing. 0.5 s in all.
const PAUSE: Duration = Duration::from_micros(400);

/// A session holds its turn for 0.5 s at most, unless the front-end reads nothing and has made the
/// socket's send buffer smaller.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why the library keeps its socket.
pub(super) struct Failed {
    /// The library's channel, unless it was let go of already: then there is none any more.
    pub(super) library: Option<Backend>,
    pub(super) why: String,
}

/// A socket of this process that may be the channel's.
struct Candidate {
    copy: UnixStream,
    /// The numbers that it had before we copied it.
    numbers: Vec<RawFd>,
}

/// Takes the socket of `library`, which must be the only handle to it. The front-end must be one
/// that acks, and `harmless` a shared object that it does not know.
pub(super) fn take_over(
    library: Backend,
    harmless: &VhostUserSharedMsg,
) -> Result<UnixStream, Failed> {
    let Some(_turn) = turn(PATIENCE) else {
        let why = "another session does not find its own".to_string();
        return Err(Failed { library: Some(library), why });
    };

    let found = candidates().and_then(|mut candidates| {
        // The messages that follow are not answered.
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
            let why = "a socket that is not the channel's was taken for it".to_string();
            if is_it { Ok(copy) } else { Err(Failed { library: None, why }) }
        }
    }
}

/// Two sessions at a time would take each other's copies for sockets. None if another session held
/// its turn for `patience`.
fn turn(patience: Duration) -> Option<MutexGuard<'static, ()>> {
    // A leaf.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let deadline = Instant::now() + patience;
    loop {
        match try_lock(&ONE_AT_A_TIME) {
            None if Instant::now() < deadline => thread::sleep(PAUSE),
            turn => return turn,
        }
    }
}

/// The inode of the socket that the library's messages go out on.
fn find(
    library: &Backend,
    harmless: &VhostUserSharedMsg,
    candidates: &BTreeMap<u64, Candidate>,
) -> io::Result<u64> {
    // The newest first: the peer may read before we have looked at all of them.
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
            // Other sessions of this process, if there are any, are at work, too.
            let second = ranking.get(1).map_or(0, |(hits, ..)| *hits);
            if let Some((hits, inode, _)) = ranking.first()
                && *hits >= ENOUGH + second
            {
                return Ok(*inode);
            }
        }
        thread::sleep(PAUSE * round);
    }
    let text = format!("not found among {} sockets", candidates.len());
    Err(io::Error::new(io::ErrorKind::NotFound, text))
}

/// Every connected Unix stream socket without names, by its inode.
fn candidates() -> io::Result<BTreeMap<u64, Candidate>> {
    let mut found: BTreeMap<u64, Candidate> = BTreeMap::new();
    for fd in fd_table::numbers()? {
        // Other threads open and close theirs meanwhile.
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
        // An error: not a Unix socket, or not connected.
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

    /// A front-end that reads whatever comes.
    fn reads(mut peer: UnixStream) -> thread::JoinHandle<usize> {
        thread::spawn(move || peer.read_to_end(&mut Vec::new()).unwrap())
    }

    /// Shows: the right socket is found, also while others are made, used and closed all the time.
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
            // Nobody else has it any more, and the messages were whole (header 12, body 16).
            let bytes = peer.join().unwrap();
            assert!(bytes >= ENOUGH * VOLLEY * 28 && bytes.is_multiple_of(28), "{bytes}");
        }
        over.store(true, Ordering::Relaxed);
        busy.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// Shows: a front-end that does not read, or is gone, leaves the library its socket.
    #[test]
    fn gives_the_channel_back() {
        let (library, peer, _) = library();
        let failed = take_over(library, &VhostUserSharedMsg::default()).unwrap_err();
        let library = failed.library.expect("the library's channel is given back");
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

    /// Shows: a channel that somebody else has a handle to, too, is not taken.
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
