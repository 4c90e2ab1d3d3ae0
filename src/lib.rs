// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host files, mapped straight into virtual machines: a vhost-user daemon.
//!
//! The path of one request is the layout. An arrow runs down this list, never up:
//!
//! 1. [`session`]: one session per front-end, the stop order. `backend`: what the front-end asks:
//!    features, config space, window size. `lifecycle`: whether the device is started.
//!    `listener`: the socket, and front-ends that come while one is served. `signals`: what ends
//!    the daemon, at any time. [`session::config`]: all that is refused before anything is made.
//! 2. [`ring`]: drains one ring into requests. [`device::request`]: one chain, checked.
//!    `device::memory`: the memory that they may be in.
//! 3. [`device`]: the seam a device stands behind. [`pmem`]: virtio-pmem, the flush.
//!    [`fs`]: virtio-fs, FUSE and its DAX window.
//! 4. [`dax`]: the engine: entries, grants, writeback.
//! 5. [`window`]: the `Mapper` seam: SHMEM_MAP, and the front-end's rules.
//! 6. [`persist`]: the `Persist` seam: fdatasync, shared by all that wait for it, or cache lines.
//!
//! Beside the path: [`passthrough`] (files that claim to be longer than any map of them),
//! [`sandbox`] (processes, and what each of them is left with), [`support`] (locks, numbers of bytes, and what is said on stderr).

#![warn(missing_docs)]

pub mod dax;
pub mod device;
pub mod fs;
pub mod passthrough;
pub mod persist;
pub mod pmem;
pub mod ring;
pub mod sandbox;
pub mod session;
pub mod support;
pub mod window;
