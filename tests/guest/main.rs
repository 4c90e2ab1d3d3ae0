// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock QEMU and a stock Linux guest see of the daemon.
//!
//! Each test starts the real daemon and a real VM, runs cases of `guest-tests/` in
//! it, and judges the bytes on the host, in the backing file itself.
//!
//! `images/build` must have run before. `VUD_GUEST=skip` leaves these tests out,
//! `VUD_GUEST_JOBS` is how many VMs may run at once (one a core unless set), `VUD_ACCEL` is QEMU's
//! accelerator (`tcg` unless set).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)]

mod daemon;
mod disk;
mod images;
mod output;
mod qmp;
mod report;
mod vm;

mod devices;
mod filesystems;
mod flushes;
mod pauses;
mod survives;
