// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which thread serves a request, and what the request may wait for. The whole policy is in this
//! file.
//!
//! A request that is expected to be quick is served inline, by the thread that took it from the
//! ring: for most requests, waking another thread would take longer than the request. Other
//! requests are served by the pool. An inline READ or WRITE that would block is moved to the pool.
//! A request that would wait for a lease of a host process (OPEN, CREATE, SETATTR, SETUPMAPPING) is
//! served again by a thread of the pool that may wait for leases.
//!
//! | request | inline | in the pool |
//! |---|---|---|
//! | FSYNC, FSYNCDIR, SYNCFS, FALLOCATE, COPY_FILE_RANGE, DESTROY | never | slow |
//! | REMOVEMAPPING, READDIRPLUS | if no other request waits in the ring | quick |
//! | SETUPMAPPING (opens a file), SETATTR | if no other request waits in the ring | slow |
//! | READ | if no other request waits in the ring, or it has up to 64 KiB | slow |
//! | WRITE, OPEN, CREATE, FLUSH, RELEASE, UNLINK, RENAME ... | always | slow |
//! | LOOKUP, GETATTR, FORGET, and all others | always | quick |

use std::sync::Arc;

use log::debug;
use virtiofsd::fuse::Opcode;

use crate::device::InlineWork;
use crate::device::request::Request;

use super::message::{Message, room};
use super::pool::{self, JobClass, Pool};
use super::serve::{Blocking, Serve};

/// The class of an operation in the pool.
fn class_of(opcode: Option<Opcode>) -> JobClass {
    use Opcode::*;
    match opcode {
        Some(
            Fsync | Fsyncdir | Flush | Fallocate | Syncfs | CopyFileRange | Open | Opendir | Create
            | Release | Releasedir | Setattr | Unlink | Rmdir | Rename | Rename2 | Read | Write
            | Destroy | SetupMapping,
        ) => JobClass::Slow,
        _ => JobClass::Quick,
    }
}

/// Number of bytes above which a READ is served by the pool if other requests wait in the ring.
const MUCH_DATA: usize = 64 << 10;

/// Whether a request is served inline. `more`: further requests wait in the ring.
pub(crate) fn is_inline(message: &Message, request: &Request, more: bool) -> bool {
    use Opcode::*;
    match message.opcode() {
        Some(Fsync | Fsyncdir | Syncfs | Fallocate | CopyFileRange | Destroy) => false,
        Some(SetupMapping | RemoveMapping | Setattr | Readdirplus) => !more,
        Some(Read) => !more || room(request) <= MUCH_DATA,
        _ => true,
    }
}

/// Returns a closure that serves `request` in the calling thread, or moves it to the pool if it
/// would block.
pub(crate) fn inline(
    pool: &Arc<Pool>,
    server: &Arc<dyn Serve>,
    request: Request,
    message: Message,
) -> InlineWork {
    let (pool, server, here) = (pool.clone(), server.clone(), pool.here());
    Box::new(move || {
        if let Err(e) = pool::own_directory() {
            debug!("a ring's thread serves no request itself, and gives each to the pool: {e}");
            submit(&pool, &server, request, message);
            return drop(here);
        }
        pool::guarded(|| {
            let left = server.serve(request, message, Blocking::IfUnknown);
            if let Some((request, message)) = left {
                submit(&pool, &server, request, message);
            }
        });
        drop(here);
    })
}

/// Serves `request` in the pool.
pub(crate) fn submit(
    pool: &Arc<Pool>,
    server: &Arc<dyn Serve>,
    request: Request,
    message: Message,
) {
    let (class, server, again) = (class_of(message.opcode()), server.clone(), pool.clone());
    pool.submit(class, move || {
        if let Some((request, message)) = server.serve(request, message, Blocking::Allowed) {
            wait_for_lease(&again, server, request, message);
        }
    });
}

/// Serves `request`, which would wait for a lease, in a thread of the pool that may wait.
fn wait_for_lease(pool: &Pool, server: Arc<dyn Serve>, request: Request, message: Message) {
    pool.submit(JobClass::Lease, move || {
        let left = server.serve(request, message, Blocking::Lease);
        debug_assert!(left.is_none(), "a request that may wait for a lease was given back");
    });
}
