// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! FUSE requests per second and their latency, with one and four queues, and with 1 and 32 requests
//! in flight.

use std::time::Duration;

use crate::figures::{Better, Figures, How, in_turn, verdict};
use crate::peer::{Kind, Peer, Setup, before};
use crate::place::Place;
use crate::work::{self, Load, Names, OPS};

const KINDS: [Kind; 6] = [
    Kind::Ours { window_mib: 256, queues: 1 },
    Kind::Ours { window_mib: 0, queues: 1 },
    Kind::Ours { window_mib: 256, queues: 4 },
    Kind::Virtiofsd { threads: 0 },
    Kind::Virtiofsd { threads: 64 },
    Kind::ByHandle,
];
/// The ratios are those of `KINDS[OURS]` to `KINDS[PEER]`: both hold each inode by a descriptor.
const OURS: usize = 0;
const PEER: usize = 3;
/// With `VUD_BENCH_BEFORE` the bench compares this build with another one, and no other peers.
const BUILDS: [Kind; 2] = [Kind::Ours { window_mib: 256, queues: 1 }, Kind::Before];

const LOADS: [(&str, Load); 3] = [
    ("32 in flight", Load { depth: 32, place: Place::DriverFixed }),
    ("1, one core", Load { depth: 1, place: Place::OneCore }),
    ("1, two cores", Load { depth: 1, place: Place::Apart }),
];

/// Measures and prints the figures.
pub fn run(quick: bool) {
    let (rounds, time) = if quick { (1, 10) } else { (15, 50) };
    let (kinds, peer): (&[Kind], usize) =
        if before().is_some() { (&BUILDS, 1) } else { (&KINDS, PEER) };
    let setup = Setup::new();
    let mut peers: Vec<_> = kinds
        .iter()
        .map(|&kind| {
            let mut peer = Peer::new(kind, &setup);
            let names = Names::of(&mut peer);
            (peer, names)
        })
        .collect();
    let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
    let how = How::new("ci/bench process", rounds);
    let mut rates = Figures::new("requests", "FUSE requests per second, in process", names.clone());
    let mut waits = Figures::new("latency", "Latency of FUSE requests, in process", names);
    for (load_name, load) in LOADS {
        println!("  {rounds} rounds with {load_name}");
        for op in OPS {
            let what = format!("{}, {load_name}", op.name());
            for round in 0..rounds {
                for i in in_turn(kinds.len(), round) {
                    let (peer, names) = &mut peers[i];
                    let mut done = work::run(peer, names, op, load, Duration::from_millis(time));
                    rates.add(&what, "/s", Better::More, i, done.per_second);
                    for percent in [50, 99] {
                        let what = format!("{what}, p{percent}");
                        waits.add(&what, "us", Better::Less, i, done.percentile(percent));
                    }
                }
            }
        }
    }
    rates.show(OURS, &[peer], &how);
    waits.show(OURS, &[peer], &how);
    println!();
    for ((load_name, _), least) in LOADS.iter().zip([1.3, 0.95, 0.95]) {
        for op in OPS {
            let what = format!("{}, {load_name}", op.name());
            let ratio = rates.ratio(&what, OURS, &[peer]).median;
            verdict(&what, ratio, least);
        }
    }
}
