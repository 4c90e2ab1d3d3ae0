// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The seam between the threads that serve requests and the file system.

use virtiofsd::fuse::Opcode;

use super::lives::Life;
use super::message::Message;
use crate::device::request::Request;
use crate::support::counter::Counter;

/// Counters of one process: requests served, replies with an error, chains without a FUSE message.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) requests: Counter,
    pub(crate) errors: Counter,
    pub(crate) malformed: Counter,
}

/// What a request may wait for in the thread that serves it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocking {
    /// In the pool: anything except a lease of a host process.
    Allowed,
    /// Inline: nothing. A READ or WRITE still blocks on a file system that does not support
    /// RWF_NOWAIT (EOPNOTSUPP).
    IfUnknown,
    /// In the pool, as [`JobClass::Lease`](super::pool::JobClass::Lease): anything.
    Lease,
}

impl Blocking {
    /// Whether a request that ends with EAGAIN is given back, to be served again by a thread that
    /// may wait.
    pub(crate) fn gives_back(self, opcode: Option<Opcode>) -> bool {
        use Opcode::*;
        match opcode {
            Some(Read | Write) => self == Self::IfUnknown,
            Some(Open | Create | Setattr | SetupMapping) => self != Self::Lease,
            _ => false,
        }
    }
}

/// A [`Server`](super::server::Server), whatever file system it serves.
pub(crate) trait Serve: Send + Sync {
    /// Serves the message and answers the request. Returns both instead, unanswered, if the request
    /// would wait for something for which `blocking` forbids to wait.
    fn serve(
        &self,
        request: Request,
        message: Message,
        blocking: Blocking,
    ) -> Option<(Request, Message)>;

    /// The life of the driver whose requests are taken from the rings now.
    fn life(&self) -> Life;

    /// The driver has reset the device: drops all state of the last life. No request of the new
    /// life is taken before this returns.
    fn restarted(&self);

    /// The session has ended: drops all state of its driver, and closes the guest's files.
    fn ended(&self);

    fn metrics(&self) -> &Metrics;
}
