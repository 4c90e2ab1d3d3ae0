// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The DAX engine on test doubles of its seams, and on real files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod fakes;
mod model;
mod rows;
mod stress;
