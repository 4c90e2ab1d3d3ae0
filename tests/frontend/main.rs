// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pmem device in this process before the strict front-end, and the strict front-end itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod flush;
mod hostile_ring;
mod mem_slots;
mod pmem_window;
mod strict_frontend;
mod strict_vmm;
