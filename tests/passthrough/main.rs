// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Passthrough files against the real kernel: what a map of one shows, and what is left behind.
//!
//! Needs root and Linux >= 6.9. What can't be had here is a loud SKIPPED line.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod coherence;
mod life;
mod map;
mod places;
mod refusals;
mod roles;

use std::fs::File;
use std::io::Write;
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use vhost_user_dax::passthrough::{PassthroughMount, Unavailable};

/// What the guests of QEMU always ask for.
const RANGE_BYTES: u64 = 2 << 20;

/// Held by tests that count this process's threads, descriptors or mounts, and shared by the
/// others.
static PROCESS: RwLock<()> = RwLock::new(());

fn among_others() -> RwLockReadGuard<'static, ()> {
    PROCESS.read().unwrap_or_else(|e| e.into_inner())
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    PROCESS.write().unwrap_or_else(|e| e.into_inner())
}

/// Past the harness, which would keep it to itself, and in one piece, on a line of its own.
fn skipped(what: &str) {
    let _ = std::io::stderr().write_all(format!("\nSKIPPED passthrough: {what}\n").as_bytes());
}

/// None, and said so, where the host can't.
fn mount() -> Option<PassthroughMount> {
    match PassthroughMount::new() {
        Ok(mount) => Some(mount),
        Err(e @ (Unavailable::NoPassthrough { .. } | Unavailable::NotPermitted(_))) => {
            skipped(&e.to_string());
            None
        }
        Err(e) if !nix::unistd::geteuid().is_root() => {
            skipped(&e.to_string());
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// A file on the repository's own file system, with no name.
fn file_here(bytes: u64) -> File {
    let file = tempfile::tempfile_in(".").unwrap();
    file.set_len(bytes).unwrap();
    file
}
