// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random programs of engine calls, run on the engine and on a simple model.
//!
//! `VUD_SEED=n` replays one program; `VUD_STEPS` sets its number of steps. A program that fails is
//! reduced to as few steps as possible, and printed.

mod calls;
mod check;
mod guest;
pub mod op;
mod pages;
mod world;

pub use world::World;
