// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random programs of calls, done on the engine and on a small obvious model beside it.
//!
//! `VUD_SEED=n` replays one program, `VUD_STEPS` sets how long it is. A program that fails is made
//! as short as it can be, and printed.

mod calls;
mod check;
mod guest;
pub mod op;
mod pages;
mod world;

pub use world::World;
