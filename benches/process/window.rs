// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The window: the time that SETUPMAPPING and REMOVEMAPPING take in the daemon, without the
//! front-end's part, and the bandwidth of a mapped file, compared with a plain mmap(2) of the same
//! file.

use std::fs::{self, OpenOptions};
use std::time::Instant;

use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use crate::figures::{Better, Figures, How, verdict, verdict_most};
use crate::peer::{DATA, DATA_BYTES, FILES, Kind, Peer, Setup, file};
use crate::place::Place;
use crate::queue::Request;
use testkit::fuse_abi::{self as abi, op};

/// The size of Linux's mappings, in bytes.
pub const RANGE: u64 = 2 << 20;
const RANGES: u64 = DATA_BYTES / RANGE;
/// FUSE_SETUPMAPPING_FLAG_WRITE and _READ.
const READ_WRITE: u64 = 3;

/// The window's last 2 MiB slot.
const LAST: u64 = WINDOW_MIB / 2 - 1;
const WINDOW_MIB: u64 = 256;

const OURS: usize = 0;
const PLAIN: usize = 1;

/// The duration of one request, in microseconds.
struct Timed {
    whole: f64,
    /// Without the time in the front-end.
    own: f64,
}

/// Measures and prints the figures.
pub fn run(quick: bool) {
    let (rounds, passes) = if quick { (1, 2) } else { (7, 20) };
    let mut peer = Peer::new(Kind::Ours { window_mib: WINDOW_MIB, queues: 1 }, &Setup::new());
    let node = peer.node(DATA);
    let mut figures = Figures::new(
        "window",
        "The DAX window, in process",
        vec!["ours".into(), "plain mmap".into()],
    );
    println!("  {rounds} rounds of {FILES} files and {RANGES} ranges");
    for _ in 0..rounds {
        map_and_unmap(&mut peer, node, &mut figures);
    }
    for range in 0..RANGES {
        time(&mut peer, &setting(node, range, range));
    }
    let file =
        OpenOptions::new().read(true).write(true).open(peer.setup.share().join(DATA)).unwrap();
    let plain = MmapRegion::<()>::from_file(FileOffset::new(file, 0), DATA_BYTES as usize).unwrap();
    println!("  {rounds} rounds of {passes} times {} MiB", DATA_BYTES >> 20);
    for (what, write) in [("read", false), ("write", true)] {
        let what = format!("{what} what is mapped");
        // Round 0 is not counted: afterwards all pages are mapped, on both sides.
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
    for what in ["a file", "a further range"]
        .map(|which| format!("SETUPMAPPING, {which}, CPU of the ring's thread"))
    {
        verdict_most(&what, figures.value(&what, OURS).median, 20.0);
    }
    for what in ["read what is mapped", "write what is mapped"] {
        verdict(what, figures.ratio(what, OURS, &[PLAIN]).median, 0.97);
    }
}

/// Maps files of which nothing is mapped yet, one after another, and then further ranges of a file
/// whose first range is mapped. All threads run on one core, where a wake-up is cheapest, so that
/// mostly the work is measured.
fn map_and_unmap(peer: &mut Peer, data: u64, figures: &mut Figures) {
    let files: Vec<_> = (0..FILES).map(|i| (peer.node(&file(i)), 0)).collect();
    let ranges: Vec<_> = (1..RANGES).map(|range| (data, range)).collect();
    Place::OneCore.put(peer.pid());
    Place::OneCore.put(std::process::id());
    for (which, asked) in [("a file", &files), ("a further range", &ranges)] {
        time(peer, &setting(data, 0, LAST));
        let setups = asked.iter().zip(0..).map(|((node, range), at)| setting(*node, *range, at));
        let removals = (0..asked.len() as u64).map(removal);
        for (name, requests) in
            [("SETUPMAPPING", setups.collect::<Vec<_>>()), ("REMOVEMAPPING", removals.collect())]
        {
            let before = ran_nanos(peer.pid());
            let timed: Vec<_> = requests.iter().map(|request| time(peer, request)).collect();
            let after = ran_nanos(peer.pid());
            let each = |part: usize| (after[part] - before[part]) as f64 / 1e3 / timed.len() as f64;
            let mut add = |what: &str, value| {
                let what = format!("{name}, {which}, {what}");
                figures.add(&what, "us", Better::Less, OURS, value);
            };
            add("whole", median(timed.iter().map(|timed| timed.whole)));
            add("less the front-end", median(timed.iter().map(|timed| timed.own)));
            add("CPU of the ring's thread", each(RING));
            add("CPU of the daemon's others", each(OTHERS));
        }
        time(peer, &removal(LAST));
    }
    Place::Anywhere.put(std::process::id());
    Place::Anywhere.put(peer.pid());
}

/// A SETUPMAPPING of range `range` of a file, in slot `at` of the window.
pub fn setting(node: u64, range: u64, at: u64) -> Request {
    let args = abi::setupmapping(range * RANGE, RANGE, READ_WRITE, at * RANGE).0;
    Request::new(op::SETUPMAPPING, node, args, 0)
}

fn removal(at: u64) -> Request {
    Request::new(op::REMOVEMAPPING, 0, abi::removemapping(&[(at * RANGE, RANGE)]).0, 0)
}

/// Sends one request and measures its duration.
fn time(peer: &mut Peer, request: &Request) -> Timed {
    let (began, spent) = (Instant::now(), peer.vmm.spent());
    peer.drivers[1].ask(request);
    let whole = began.elapsed();
    let front_end = peer.vmm.spent() - spent;
    Timed { whole: whole.as_secs_f64() * 1e6, own: (whole - front_end).as_secs_f64() * 1e6 }
}

/// The elements of [`ran_nanos`].
const RING: usize = 0;
const OTHERS: usize = 1;

/// CPU time of the daemon's threads in nanoseconds: of those that serve rings, and of the others.
fn ran_nanos(pid: u32) -> [u64; 2] {
    let mut ran = [0; 2];
    for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let read = |name| fs::read_to_string(task.as_ref().unwrap().path().join(name)).unwrap();
        let part = if read("comm").starts_with("vring_worker") { RING } else { OTHERS };
        ran[part] += read("schedstat").split(' ').next().unwrap().parse::<u64>().unwrap();
    }
    ran
}

/// Copies between a buffer and each range in turn; the bandwidth in GiB/s.
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
