// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An idle daemon: the time from its start until its socket accepts a connection, its memory then
//! and in an idle session, and the additional memory of a thousand inodes and of a thousand grants.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::figures::{Better, Figures, How, verdict_most};
use crate::peer::{Daemon, Kind, Peer, Setup, pmem_command};
use crate::window::{RANGE, setting};
use testkit::fuse_abi::{self as abi, Arg, op};

const FS: Kind = Kind::Ours { window_mib: 512, queues: 1 };
const VIRTIOFSD: Kind = Kind::Virtiofsd { threads: 0 };
const NAMES: [&str; 3] = ["ours, fs", "ours, pmem", "virtiofsd"];
/// Number of 2 MiB ranges that the window shows at the same time.
const GRANTS: u64 = 250;

fn command(peer: usize, dir: &Path, socket: &Path) -> Command {
    match peer {
        0 => FS.command(socket, dir),
        1 => {
            let mut command = pmem_command(socket, &dir.join("pmem"));
            command.args(["--size", "64M"]);
            command
        }
        _ => VIRTIOFSD.command(socket, dir),
    }
}

/// Measures and prints the figures.
pub fn run(quick: bool) {
    let (starts, rounds, inodes) = if quick { (1, 1, 1000) } else { (31, 3, 10_000) };
    let names = NAMES.map(str::to_owned).to_vec();
    let mut figures = Figures::new("rest", "Start-up, and memory at rest", names);
    println!("  {starts} starts, {rounds} rounds with {inodes} inodes and {GRANTS} grants");
    for _ in 0..starts {
        for peer in 0..NAMES.len() {
            figures.add("from start to listening", "ms", Better::Less, peer, start(peer));
        }
    }
    for _ in 0..rounds {
        for peer in 0..NAMES.len() {
            let dir = tempfile::tempdir().unwrap();
            let daemon = Daemon::start(dir.path(), |socket| command(peer, dir.path(), socket));
            let resident = daemon.resident_kib("VmRSS") / 1024.0;
            figures.add("resident, listening", "MiB", Better::Less, peer, resident);
        }
        for (peer, kind) in [(0, FS), (2, VIRTIOFSD)] {
            let mut running = Peer::new(kind, &Setup::new());
            // The guest's memory, which the daemon maps, is not counted.
            let all =
                running.daemon.resident_kib("VmRSS") - running.daemon.resident_kib("RssShmem");
            figures.add("resident, idle session", "MiB", Better::Less, peer, all / 1024.0);
            let each = memory_of_inodes(&mut running, inodes);
            figures.add("a thousand inodes", "KiB", Better::Less, peer, each);
        }
        let each = memory_of_grants();
        figures.add("a thousand grants", "KiB", Better::Less, 0, each);
    }
    figures.show(0, &[2], &How::new("ci/bench process", rounds));
    println!();
    for (peer, name) in NAMES.iter().enumerate().take(2) {
        let most = |row: &str, most| {
            let what = format!("{row}, {name}");
            verdict_most(&what, figures.value(row, peer).median, most);
        };
        most("from start to listening", 20.0);
        most("resident, listening", 12.0);
    }
}

/// Milliseconds from the start of the daemon until its socket accepts a connection.
fn start(peer: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let mut command = command(peer, dir.path(), &socket);
    command.env_remove("RUST_LOG").stderr(Stdio::null());
    let began = Instant::now();
    let mut child = command.spawn().unwrap();
    while UnixStream::connect(&socket).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "the daemon has ended");
    }
    let took = began.elapsed();
    let _ = child.kill();
    let _ = child.wait();
    took.as_secs_f64() * 1e3
}

/// KiB of the daemon's anonymous memory per thousand inodes, which are looked up and not forgotten.
fn memory_of_inodes(peer: &mut Peer, inodes: usize) -> f64 {
    let name = |i: usize| format!("inode-{i:06}");
    (0..inodes).for_each(|i| drop(File::create(peer.setup.share().join(name(i))).unwrap()));
    let before = peer.daemon.resident_kib("RssAnon");
    for i in 0..inodes {
        peer.call(op::LOOKUP, abi::ROOT, Arg::new().name(&name(i)).0, abi::ENTRY_OUT);
    }
    (peer.daemon.resident_kib("RssAnon") - before) * 1000.0 / inodes as f64
}

/// KiB of the daemon's anonymous memory per thousand grants: ranges of one file in the window.
fn memory_of_grants() -> f64 {
    let mut peer = Peer::new(FS, &Setup::new());
    let big = File::create(peer.setup.share().join("big")).unwrap();
    big.set_len(GRANTS * RANGE).unwrap();
    let node = peer.node("big");
    let before = peer.daemon.resident_kib("RssAnon");
    for range in 0..GRANTS {
        peer.drivers[1].ask(&setting(node, range, range));
    }
    (peer.daemon.resident_kib("RssAnon") - before) * 1000.0 / GRANTS as f64
}
