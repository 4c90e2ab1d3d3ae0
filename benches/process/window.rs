// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window: what SETUPMAPPING and REMOVEMAPPING take in the daemon, apart from the front-end's part,
//! and how fast bytes go through what is mapped, against a plain mmap of the same file.

use std::fs::{self, OpenOptions};
use std::time::Instant;

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use crate::common::fuse_abi::{self as abi, op};
use crate::figures::{Better, Figures, How, verdict, verdict_most};
use crate::lane::Request;
use crate::peer::{DATA, DATA_BYTES, Kind, Peer};
use crate::place::Place;

/// What Linux maps at a time.
const RANGE: u64 = 2 << 20;
const RANGES: u64 = DATA_BYTES / RANGE;
/// FUSE_SETUPMAPPING_FLAG_WRITE and _READ.
const READ_WRITE: u64 = 3;

const OURS: usize = 0;
const PLAIN: usize = 1;

/// A request of the window, timed.
struct Timed {
    whole: f64,
    /// Without what the front-end took.
    own: f64,
}

/// Measures, and shows.
pub fn run(quick: bool) {
    let (rounds, requests, passes) = if quick { (1, 64, 2) } else { (7, 1000, 20) };
    let mut peer = Peer::new(Kind::Ours { window_mib: 256, queues: 1 });
    let node = peer.node(DATA);
    let mut figures = Figures::new(
        "window",
        "The DAX window, in process",
        vec!["ours".into(), "plain mmap".into()],
    );
    println!("  {rounds} rounds of {requests} mappings");
    for _ in 0..rounds {
        map_and_unmap(&mut peer, node, requests, &mut figures);
    }
    for range in 0..RANGES {
        setup(&mut peer, node, range);
    }
    let file = OpenOptions::new().read(true).write(true).open(peer.share().join(DATA)).unwrap();
    let plain = MmapRegion::<()>::from_file(FileOffset::new(file, 0), DATA_BYTES as usize).unwrap();
    println!("  {rounds} rounds of {passes} times {} MiB", DATA_BYTES >> 20);
    for (what, write) in [("read", false), ("write", true)] {
        let what = format!("{what} what is mapped");
        // One that does not count: all pages are there then, on both sides.
        for round in 0..=rounds {
            let ours = bandwidth(passes, write, |range, copy| {
                peer.vmm.view(range * RANGE, RANGE as usize, copy);
            });
            let plain = bandwidth(passes, write, |range, copy| {
                copy(plain.get_slice((range * RANGE) as usize, RANGE as usize).unwrap());
            });
            if round > 0 {
                figures.add(&what, "GiB/s", Better::More, OURS, ours);
                figures.add(&what, "GiB/s", Better::More, PLAIN, plain);
            }
        }
    }
    figures.show(OURS, &[PLAIN], &How::new("ci/bench process", rounds));
    println!();
    for what in ["SETUPMAPPING, the daemon's own", "SETUPMAPPING, the daemon's CPU"] {
        verdict_most(what, figures.value(what, OURS).median, 20.0);
    }
    for what in ["read what is mapped", "write what is mapped"] {
        verdict(what, figures.ratio(what, OURS, &[PLAIN]).median, 0.97);
    }
}

/// All on one core, where a wake-up is cheapest: what is left is work.
fn map_and_unmap(peer: &mut Peer, node: u64, requests: usize, figures: &mut Figures) {
    Place::OneCore.put(peer.pid());
    Place::OneCore.put(std::process::id());
    let mut timed = [Vec::new(), Vec::new()];
    let mut ran = [0, 0];
    for i in 0..requests as u64 {
        let range = i * 7 % RANGES;
        for (part, remove) in [(0, false), (1, true)] {
            let before = ran_nanos(peer.pid());
            let request = if remove { removal(range) } else { setting(node, range) };
            timed[part].push(time(peer, &request));
            ran[part] += ran_nanos(peer.pid()) - before;
        }
    }
    Place::Anywhere.put(std::process::id());
    Place::Anywhere.put(peer.pid());
    for (part, name) in ["SETUPMAPPING", "REMOVEMAPPING"].into_iter().enumerate() {
        let mut add = |what: &str, value| {
            figures.add(&format!("{name}, {what}"), "us", Better::Less, OURS, value);
        };
        add("whole", median(timed[part].iter().map(|timed| timed.whole)));
        add("the daemon's own", median(timed[part].iter().map(|timed| timed.own)));
        add("the daemon's CPU", ran[part] as f64 / 1e3 / requests as f64);
    }
}

fn setting(node: u64, range: u64) -> Request {
    let args = abi::setupmapping(range * RANGE, RANGE, READ_WRITE, range * RANGE).0;
    Request::new(op::SETUPMAPPING, node, args, 0)
}

fn removal(range: u64) -> Request {
    Request::new(op::REMOVEMAPPING, 0, abi::removemapping(&[(range * RANGE, RANGE)]).0, 0)
}

fn setup(peer: &mut Peer, node: u64, range: u64) {
    time(peer, &setting(node, range));
}

/// Microseconds of one request.
fn time(peer: &mut Peer, request: &Request) -> Timed {
    let (began, spent) = (Instant::now(), peer.vmm.spent());
    peer.lanes[1].ask(request);
    let whole = began.elapsed();
    let theirs = peer.vmm.spent() - spent;
    Timed { whole: whole.as_secs_f64() * 1e6, own: (whole - theirs).as_secs_f64() * 1e6 }
}

/// How long threads of a process have run, in nanoseconds.
fn ran_nanos(pid: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| {
            let stat = fs::read_to_string(task.unwrap().path().join("schedstat"));
            stat.map_or(0, |stat| stat.split(' ').next().unwrap().parse::<u64>().unwrap())
        })
        .sum()
}

/// GiB/s of copies between a buffer and each range in turn.
fn bandwidth(
    passes: u64,
    write: bool,
    view: impl Fn(u64, &mut dyn FnMut(VolatileSlice<'_>)),
) -> f64 {
    let mut buffer = vec![7u8; RANGE as usize];
    let began = Instant::now();
    for range in (0..passes).flat_map(|_| 0..RANGES) {
        view(range, &mut |slice| {
            if write {
                slice.copy_from(&buffer);
            } else {
                slice.copy_to(&mut buffer);
            }
        });
    }
    (passes * DATA_BYTES) as f64 / f64::from(1 << 30) / began.elapsed().as_secs_f64()
}

fn median(samples: impl Iterator<Item = f64>) -> f64 {
    crate::figures::Spread::of(&samples.collect::<Vec<_>>()).median
}
