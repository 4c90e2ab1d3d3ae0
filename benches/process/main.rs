// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemons alone, at native speed, ours and Debian's virtiofsd: the in-process front-end drives
//! both over the same socket protocol. `ci/bench process` runs it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)] // By peer, of as many peers as there are.

#[path = "../figures/mod.rs"]
mod figures;
mod flushes;
mod peer;
mod place;
mod queue;
mod requests;
mod rest;
mod window;
mod work;

/// A part; whether it is only to be tried.
type Part = fn(bool);
const PARTS: [(&str, Part); 4] = [
    ("requests", requests::run),
    ("window", window::run),
    ("flushes", flushes::run),
    ("rest", rest::run),
];

fn main() {
    let quick = figures::is_quick();
    for (name, run) in PARTS {
        if figures::is_wanted(name) {
            println!("\n{name}");
            run(quick);
        }
    }
}
