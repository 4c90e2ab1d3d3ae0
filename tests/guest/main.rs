// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests with a stock QEMU and a stock Linux guest.
//!
//! Each test starts the real daemon and a real VM, runs cases of `guest-tests/` in the guest, and
//! compares the bytes in the backing file on the host.
//!
//! `images/build` must have run before. `VUD_GUEST=skip` skips these tests. `VUD_GUEST_JOBS` is the
//! number of VMs that may run at once (default: one per core, at most 4). `VUD_ACCEL` is QEMU's
//! accelerator (default: `tcg`). `VUD_FS_BACKEND=virtiofsd` runs the tests of shares with Debian's
//! virtiofsd instead of our daemon.

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
