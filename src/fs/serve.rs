// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The seam between the threads that requests run in and the file system that serves them.

use virtiofsd::fuse::Opcode;

use super::lives::Life;
use super::message::Message;
use crate::device::request::Request;
use crate::support::counter::Counter;

/// Counters of requests and replies.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    pub(crate) requests: Counter,
    pub(crate) errors: Counter,
    pub(crate) malformed: Counter,
}

/// What a request may wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Blocking {
    /// In the pool: all but a lease.
    Allowed,
    /// Inline: a READ or WRITE blocks only where the file system can't tell whether it will
    /// (RWF_NOWAIT is EOPNOTSUPP).
    IfUnknown,
    /// In the pool, as [`JobClass::Lease`]: all.
    Lease,
}

impl Blocking {
    /// Whether a request that ends with EAGAIN is to be served anew, by a thread that may wait.
    pub(crate) fn gives_back(self, opcode: Option<Opcode>) -> bool {
        use Opcode::*;
        match opcode {
            Some(Read | Write) => self == Self::IfUnknown,
            Some(Open | Create | Setattr | SetupMapping) => self != Self::Lease,
            _ => false,
        }
    }
}

/// A [`Server`](super::server::Server) over any file system.
pub(crate) trait Serve: Send + Sync {
    /// Does what the message asks for, and answers it; or gives it back, if it has no blocking to
    /// wait.
    fn serve(
        &self,
        request: Request,
        message: Message,
        blocking: Blocking,
    ) -> Option<(Request, Message)>;

    /// That of the driver whose requests are taken now.
    fn life(&self) -> Life;

    /// A driver has begun anew. None of its requests is taken before this returns.
    fn restarted(&self);

    /// The session is over.
    fn ended(&self);

    fn metrics(&self) -> &Metrics;
}
