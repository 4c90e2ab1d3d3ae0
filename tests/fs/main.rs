// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-user-dax fs`: the real daemon with a directory, and the test's front-end with a guest.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod attacks;
mod attacks_races;
mod budget;
mod buffers;
mod cacheline;
mod cloud_hypervisor;
mod coherence;
mod descriptors;
mod durability;
mod full_disk;
mod host_limits;
mod hostile_maps;
mod hostile_requests;
mod hostile_values;
mod leaks;
mod model;
mod requests;
mod restart;
mod slow;
mod stop;
mod stress;
mod times;
mod times_races;
mod two_numbers;
