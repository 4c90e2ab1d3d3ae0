// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! FUSE requests per second, ours against Debian's virtiofsd, at native speed: the in-process front-end
//! drives both over the same socket protocol. `ci/bench process` runs it.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::indexing_slicing)] // By peer, of as many peers as there are.

#[path = "../../tests/common/mod.rs"]
mod common;
mod lane;
mod peer;
mod work;

use std::time::Duration;

use peer::{Kind, Peer};
use work::{Names, OPS};

const KINDS: [Kind; 4] = [
    Kind::Ours { window_mib: 256, queues: 1 },
    Kind::Ours { window_mib: 0, queues: 1 },
    Kind::Virtiofsd { threads: 0 },
    Kind::Virtiofsd { threads: 64 },
];
/// Whose figures the ratios are to: virtiofsd as it is by default.
const PEER: usize = 2;

fn main() {
    let quick = std::env::var_os("VUD_BENCH_QUICK").is_some_and(|value| value == "1");
    let (rounds, time) = if quick { (1, 10) } else { (7, 100) };
    let mut peers: Vec<_> = KINDS
        .into_iter()
        .map(|kind| {
            let mut peer = Peer::new(kind);
            let names = Names::of(&mut peer);
            (peer, names)
        })
        .collect();
    let names: Vec<_> = peers.iter().map(|(peer, _)| peer.kind.name()).collect();
    println!("requests per second (and the median's microseconds): {}", names.join(" | "));
    println!("ratio: the first over {}, medians of {rounds} rounds", names[PEER]);
    for depth in [1, 32] {
        for op in OPS {
            let mut rates = vec![Vec::new(); KINDS.len()];
            let mut halves = vec![Vec::new(); KINDS.len()];
            for _ in 0..rounds {
                for (i, (peer, names)) in peers.iter_mut().enumerate() {
                    let time = Duration::from_millis(time);
                    let mut done = work::run(peer, names, op, depth, time);
                    rates[i].push(done.per_second);
                    halves[i].push(done.percentile(50));
                }
            }
            print!("  {:<15} depth {depth:>2}", op.name());
            for (rates, halves) in rates.iter().zip(&halves) {
                print!("  {:>7.0} ({:>6.1})", median(rates), median(halves));
            }
            let ratios: Vec<_> =
                rates[0].iter().zip(&rates[PEER]).map(|(ours, theirs)| ours / theirs).collect();
            println!("  {:>5.2}", median(&ratios));
        }
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}
