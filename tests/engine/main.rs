// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The DAX engine against doubles of its seams, and against real files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod fakes;
mod model;
mod rows;
mod stress;
