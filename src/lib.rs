// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A vhost-user daemon that maps host files into virtual machines: virtio-pmem, and virtio-fs with
//! a DAX window.
//!
//! The modules are listed in the order of a request's path. A module imports only modules below it:
//!
//! 1. [`session`]: the socket, one session per front-end, the stop order. `backend`: answers
//!    vhost-user messages: features, config space, window size. `lifecycle`: whether the device is
//!    started. `listener`: the socket, and front-ends that connect while another one is served.
//!    `signals`: SIGTERM and SIGINT. [`session::config`]: settings that are refused before anything
//!    is created.
//! 2. [`ring`]: drains one ring into requests. [`device::request`]: one request and its chain,
//!    checked. `device::memory`: the guest's RAM.
//! 3. [`device`]: the trait of a device. [`pmem`]: virtio-pmem, the flush. [`fs`]: virtio-fs, FUSE
//!    and its DAX window.
//! 4. [`dax`]: the engine: entries, grants, writeback.
//! 5. [`window`]: the trait `Mapper`: SHMEM_MAP and SHMEM_UNMAP, and the front-end's rules.
//! 6. [`persist`]: `Persist`: cache line writeback, or one fdatasync for all waiting flushes.
//!
//! Beside the path: [`passthrough`] (files whose reported length is larger than any map of them),
//! [`sandbox`] (processes, namespaces, capabilities, system call filters), [`support`] (locks, units,
//! the log).

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
