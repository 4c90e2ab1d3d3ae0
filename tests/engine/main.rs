// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The DAX engine on test doubles of its seams, on real files, and beside the kernel.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod model;
mod oracle;
mod rows;
mod stress;
