// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of the pmem device, in this process, with the strict front-end of `testkit`; and tests of
//! the strict front-end itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod flush;
mod hostile_ring;
mod mem_slots;
mod pmem_window;
mod strict_frontend;
mod strict_vmm;
