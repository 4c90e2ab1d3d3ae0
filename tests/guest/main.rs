// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a stock QEMU and a stock Linux guest see of the daemon.
//!
//! Each test starts the real daemon and a real VM, runs cases of `guest-tests/` in
//! it, and judges the bytes on the host, in the backing file itself.
//!
//! `images/build` must have run before. `VUD_GUEST=skip` leaves these tests out, `VUD_GUEST_JOBS`
//! is how many VMs may run at once (one a core unless set), `VUD_ACCEL` is QEMU's accelerator
//! (`tcg` unless set). `VUD_FS_BACKEND=virtiofsd` puts Debian's virtiofsd in the place of our
//! daemon in the tests of shares.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)]

mod daemon;
mod disk;
mod host_disk;
mod images;
mod lossy;
mod machine;
mod output;
#[path = "../../guest-tests/mapio/src/plan.rs"]
mod plan;
mod qmp;
mod report;
mod script;
mod share;
mod vm;

mod crash;
mod crossing;
mod devices;
mod filesystems;
mod flushes;
mod fs_files;
mod fs_full;
mod fs_lives;
mod fs_plain;
mod fs_sides;
mod fs_suites;
mod fs_times;
mod fs_window;
mod lives_matrix;
mod pauses;
mod pmemkv;
mod real_dax;
mod survives;
mod uml;
