// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Utilities for every step. Imports no step.

pub mod counter;
pub(crate) mod failpoint;
pub(crate) mod fd_table;
pub(crate) mod file_id;
pub(crate) mod lock;
pub(crate) mod log_limit;
pub mod size;
pub mod stderr;
pub mod units;
