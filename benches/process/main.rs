// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemons without a VM: ours and Debian's virtiofsd, driven by the in-process front-end over
//! the vhost-user socket. `ci/bench process` runs it.

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

/// One part of the benchmark; the argument says whether the run is a quick trial.
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
