// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Benchmarks of the DAX engine (step 4), as ratios within one run. `ci/bench` runs them, and
//! docs/benchmarks.md explains each table. The exit code is 1 if a ratio that must hold does not.
//!
//! `VUD_BENCH_QUICK=1` takes less than a minute. The arguments, if any, are the numbers of the
//! points to run.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]
#![allow(clippy::indexing_slicing)] // By side, of as many sides as there are.

mod doubles;
mod flush;
mod lines;
mod measure;
mod memory;
mod memory_count;
mod ordered_map;
mod prefix_walk;
mod report;
mod versus;
mod writeback;
mod writer;

use std::process::ExitCode;

use measure::Effort;
use report::Verdicts;

type Point = fn(Effort, &mut Verdicts);

const POINTS: [Point; 6] =
    [writeback::bench, writer::bench, versus::bench, memory::bench, flush::bench, lines::bench];

fn main() -> ExitCode {
    let effort = Effort::from_env();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("engine benches, {}, {cores} cores", effort.pick("full", "quick"));
    // cargo bench adds `--bench`.
    let wanted: Vec<u32> = std::env::args().skip(1).filter_map(|arg| arg.parse().ok()).collect();
    let mut verdicts = Verdicts::default();
    for (number, point) in (1..).zip(POINTS) {
        if wanted.is_empty() || wanted.contains(&number) {
            point(effort, &mut verdicts);
        }
    }
    ExitCode::from(u8::from(verdicts.print() > 0))
}
