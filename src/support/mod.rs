// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every step may use. Knows no step.

pub mod counter;
pub(crate) mod fd_table;
pub(crate) mod lock;
pub(crate) mod log_limit;
pub mod size;
pub mod stderr;
pub mod units;
