// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the DAX engine.

pub mod counters;
mod coverage;
pub mod engine;
pub mod entry;
pub mod extent;
mod fault;
pub mod index;
#[cfg(all(test, loom))]
mod loom_tests;
pub mod resize;
mod rw;
pub mod space;
mod sync;
mod trace;
pub mod wait;
mod writeback;
