// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmark in guests, run by `ci/bench guests`: fio on every way to give a guest a host file.
//! Each share has a VM of its own with equal settings, booted once per round; all devices are in
//! one VM. Each round begins with another peer.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(dead_code)] // The harness has more than this needs.

mod bench_devices;
mod bench_memory;
mod bench_peers;
mod daemon;
mod disk;
#[path = "../../benches/figures/mod.rs"]
mod figures;
mod images;
mod machine;
mod output;
mod qmp;
mod report;
mod share;
mod vm;

use std::time::Instant;

use bench_peers::{Peer, make_data};
use figures::{Better, Figures, How, in_turn, verdict};
use tempfile::TempDir;
use vm::Guest;

/// One fio run: the engine, the pattern, the number of threads, whether each write is followed by
/// an fsync, and the state of the guest's cache.
struct Job {
    engine: &'static str,
    rw: &'static str,
    threads: usize,
    fsync: bool,
    /// The guest has nothing of the file cached at the start.
    cold: bool,
}

impl Job {
    fn name(&self) -> String {
        let Self { engine, rw, threads, .. } = self;
        let warmth = if self.cold { ", cold" } else { "" };
        let fsync = if self.fsync { ", fsync" } else { "" };
        format!("{engine} {rw} x{threads}{fsync}{warmth}")
    }

    /// The job as the case `bench-fio` parses it.
    fn words(&self, index: usize) -> String {
        let Self { engine, rw, threads, .. } = self;
        let warmth = if self.cold { "cold" } else { "warm" };
        format!("{index},{engine},{rw},{threads},{},{warmth}", u8::from(self.fsync))
    }
}

/// All jobs, in the order of their runs. A quick trial has several threads only in jobs with fsync.
fn jobs(quick: bool) -> Vec<Job> {
    let cold = |engine, rw| Job { engine, rw, threads: 1, fsync: false, cold: true };
    let mut jobs = Vec::new();
    for engine in ["psync", "mmap"] {
        jobs.extend(["read", "randread"].map(|rw| cold(engine, rw)));
    }
    for engine in ["psync", "mmap"] {
        for rw in ["read", "randread", "write", "randwrite"] {
            let job = |threads| Job { engine, rw, threads, fsync: false, cold: false };
            jobs.push(job(1));
            jobs.extend((!quick).then(|| job(4)));
        }
    }
    jobs.extend(fsyncs());
    jobs
}

fn fsyncs() -> impl Iterator<Item = Job> {
    let job = |threads| Job { engine: "psync", rw: "randwrite", threads, fsync: true, cold: false };
    [1, 8, 32].into_iter().map(job)
}

fn main() {
    let quick = figures::is_quick();
    let Some(guest) = Guest::enter("bench") else { return };
    let rounds = if quick { 1 } else { 3 };
    let how = How::new("ci/bench guests", rounds);
    let began = Instant::now();
    let step = |text: &str| println!("  [{:4.0} s] {text}", began.elapsed().as_secs_f64());
    let parts: [(&str, Part); 3] =
        [("shares", shares), ("pmem", bench_devices::run), ("memory", bench_memory::run)];
    for (name, run) in parts {
        if figures::is_wanted(name) {
            run(&guest, quick, rounds, &how, &step);
        }
    }
}

/// One part of the benchmark. Arguments: the guest, whether the run is a quick trial, the number of
/// rounds, how the figures are stored, and a function that prints the progress.
type Part = fn(&Guest, bool, usize, &How, &dyn Fn(&str));

/// Runs all jobs on all peers, `rounds` times.
fn measure(
    guest: &Guest,
    peers: &[Peer],
    rounds: usize,
    quick: bool,
    figures: &mut Figures,
    step: &dyn Fn(&str),
) {
    let runtime = if quick { "20ms" } else { "500ms" };
    let dir = TempDir::new().unwrap();
    make_data(dir.path());
    for round in 0..rounds {
        for index in in_turn(peers.len(), round) {
            let peer = &peers[index];
            step(&format!("round {} of {rounds}: {}", round + 1, peer.name()));
            let jobs: Vec<_> = jobs(quick).into_iter().filter(|job| peer.runs(job)).collect();
            let words: Vec<_> = jobs.iter().enumerate().map(|(i, job)| job.words(i)).collect();
            for (job, iops) in jobs.iter().zip(peer.run(guest, dir.path(), runtime, &words)) {
                figures.add(&job.name(), "/s", Better::More, index, iops);
            }
        }
    }
}

/// Shares: ours with windows of three sizes and without one, Debian's virtiofsd in its three cache
/// modes, and the guest's tmpfs.
fn shares(guest: &Guest, quick: bool, rounds: usize, how: &How, step: &dyn Fn(&str)) {
    const ALL: [Peer; 8] = [
        Peer::Share { window: Some("64M") },
        Peer::Share { window: Some("16M") },
        Peer::Share { window: Some("256M") },
        Peer::Share { window: None },
        Peer::Virtiofsd { cache: "never" },
        Peer::Virtiofsd { cache: "auto" },
        Peer::Virtiofsd { cache: "always" },
        Peer::Tmpfs,
    ];
    const QUICK: [Peer; 3] = [ALL[0], ALL[5], Peer::Tmpfs];
    let peers = if quick { &QUICK[..] } else { &ALL[..] };
    let others: &[usize] = if quick { &[1] } else { &[4, 5, 6] };
    let names = peers.iter().map(Peer::name).collect();
    let mut figures =
        Figures::new("shares", "fio in a guest, 4 KiB, requests per second: shares", names);
    measure(guest, peers, rounds, quick, &mut figures, step);
    figures.show(0, others, how);
    println!();
    for (row, least) in
        [("psync randread x1", 8.0), ("psync randwrite x1", 8.0), ("mmap randread x1", 20.0)]
    {
        for other in others {
            let what = format!("{row}, {} over {}", peers[0].name(), peers[*other].name());
            verdict(&what, figures.ratio(row, 0, &[*other]).median, least);
        }
        let what = format!("{row}, {} over the guest's own memory", peers[0].name());
        verdict(&what, figures.ratio(row, 0, &[peers.len() - 1]).median, 0.9);
    }
}
