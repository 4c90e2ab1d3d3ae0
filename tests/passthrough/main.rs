// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Passthrough files on the real kernel: what a map of such a file shows, and that nothing leaks.
//!
//! The tests need root and Linux 6.9 or newer. Where the host lacks something, they print a line
//! that begins with SKIPPED.

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

/// The size of the maps that Linux guests ask for, in bytes.
const RANGE_BYTES: u64 = 2 << 20;

/// Write-locked by tests that count this process's threads, descriptors or mounts; read-locked by
/// the other tests.
static PROCESS: RwLock<()> = RwLock::new(());

fn among_others() -> RwLockReadGuard<'static, ()> {
    PROCESS.read().unwrap_or_else(|e| e.into_inner())
}

fn alone() -> RwLockWriteGuard<'static, ()> {
    PROCESS.write().unwrap_or_else(|e| e.into_inner())
}

/// Writes to stderr directly, because the test harness captures `eprintln!`: by one write(2), as a
/// line of its own.
fn skipped(what: &str) {
    let _ = std::io::stderr().write_all(format!("\nSKIPPED passthrough: {what}\n").as_bytes());
}

/// Makes a mount; `None`, with a SKIPPED line, if the host can't.
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

/// An unnamed file on the file system of the current directory.
fn file_here(bytes: u64) -> File {
    let file = tempfile::tempfile_in(".").unwrap();
    file.set_len(bytes).unwrap();
    file
}
