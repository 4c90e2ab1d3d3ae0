// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemons alone, at native speed, ours and Debian's virtiofsd: the in-process front-end drives both
//! over the same socket protocol. `ci/bench process` runs it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)] // By peer, of as many peers as there are.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../figures/mod.rs"]
mod figures;
mod lane;
mod peer;
mod place;
mod requests;
mod work;

fn main() {
    let quick = std::env::var_os("VUD_BENCH_QUICK").is_some_and(|value| value == "1");
    requests::run(quick);
}
