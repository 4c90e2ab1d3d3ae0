// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon that does nothing yet: how long from its start until one can connect, how much memory
//! it has then and in an idle session, and what a thousand inodes and a thousand grants add.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::figures::{Better, Figures, How, verdict_most};
use crate::peer::{Daemon, Ground, Kind, Peer, pmem_command};
use crate::window::{RANGE, setting};
use testkit::fuse_abi::{self as abi, Arg, op};

const FS: Kind = Kind::Ours { window_mib: 512, queues: 1 };
const VIRTIOFSD: Kind = Kind::Virtiofsd { threads: 0 };
const NAMES: [&str; 3] = ["ours, fs", "ours, pmem", "virtiofsd"];
/// Number of ranges of 2 MiB that the window shows at once.
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

/// Measures, and shows.
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
            let mut running = Peer::new(kind, &Ground::new());
            // The guest's own memory is not counted.
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

/// Milliseconds until one can connect.
fn start(peer: usize) -> f64 {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let mut command = command(peer, dir.path(), &socket);
    command.env_remove("RUST_LOG").stderr(Stdio::null());
    let began = Instant::now();
    let mut child = command.spawn().unwrap();
    while UnixStream::connect(&socket).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "the daemon ended");
    }
    let took = began.elapsed();
    let _ = child.kill();
    let _ = child.wait();
    took.as_secs_f64() * 1e3
}

/// KiB of the daemon's own memory for each thousand, all looked up and none forgotten.
fn memory_of_inodes(peer: &mut Peer, inodes: usize) -> f64 {
    let name = |i: usize| format!("inode-{i:06}");
    (0..inodes).for_each(|i| drop(File::create(peer.ground.share().join(name(i))).unwrap()));
    let before = peer.daemon.resident_kib("RssAnon");
    for i in 0..inodes {
        peer.call(op::LOOKUP, abi::ROOT, Arg::new().name(&name(i)).0, abi::ENTRY_OUT);
    }
    (peer.daemon.resident_kib("RssAnon") - before) * 1000.0 / inodes as f64
}

/// The same of grants: ranges of one file that the window shows.
fn memory_of_grants() -> f64 {
    let mut peer = Peer::new(FS, &Ground::new());
    let big = File::create(peer.ground.share().join("big")).unwrap();
    big.set_len(GRANTS * RANGE).unwrap();
    let node = peer.node("big");
    let before = peer.daemon.resident_kib("RssAnon");
    for range in 0..GRANTS {
        peer.lanes[1].ask(&setting(node, range, range));
    }
    (peer.daemon.resident_kib("RssAnon") - before) * 1000.0 / GRANTS as f64
}
