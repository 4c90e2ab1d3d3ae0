// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random programs of calls, run on the engine and on a simple model of it.
//!
//! `VUD_SEED=n` replays one program, `VUD_STEPS` is its number of steps. A failing program is
//! shortened, and printed.

mod calls;
mod check;
mod guest;
pub mod op;
mod pages;
mod world;

#[cfg(test)]
mod run;
#[cfg(test)]
mod terabyte;

pub use world::World;
