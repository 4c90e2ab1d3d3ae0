// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon as a process: its command line, start, end and signals, and the storage of its files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod bad_disk;
mod cli;
mod direct_access;
mod sandbox;
mod slow_disk;
mod start;
