// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory: two guests read the same host file. Each guest reports the memory that the read cost;
//! the host reports the proportional set size (PSS) of QEMU and the daemons.

use std::fs;

use tempfile::TempDir;

use crate::figures::{Better, Figures, How, in_turn};
use crate::machine::Options;
use crate::share::Share;
use crate::vm::Guest;

const FILE_MIB: usize = 256;

/// Measures and prints the figures.
pub fn run(guest: &Guest, quick: bool, rounds: usize, how: &How, step: &dyn Fn(&str)) {
    const NAMES: [&str; 3] = ["ours, window 512M", "ours, no window", "virtiofsd always"];
    let mib = if quick { 32 } else { FILE_MIB };
    let names = NAMES.map(str::to_owned).to_vec();
    let mut figures =
        Figures::new("memory", "Two guests read the same file, MiB for each MiB of it", names);
    for round in 0..rounds {
        for peer in in_turn(NAMES.len(), round) {
            let name = NAMES[peer];
            step(&format!("round {} of {rounds}: two guests, {mib} MiB, {name}", round + 1));
            let dir = TempDir::new().unwrap();
            fs::write(dir.path().join("data"), vec![7; mib << 20]).unwrap();
            let share = || match peer {
                0 => [Share::dax(dir.path(), "bench").window("512M")],
                1 => [Share::plain(dir.path(), "bench")],
                _ => [Share::virtiofsd(dir.path(), "bench").args(&["--cache", "always"])],
            };
            let shares = [share(), share()];
            let mut vms = shares.each_ref().map(|shares| {
                let mut vm = guest.boot_shares(shares, &[], &Options::default());
                vm.mount(&shares[0], "/mnt", "dax=always");
                vm
            });
            let before: f64 = vms.iter().map(|vm| vm.pss_kib()).sum();
            let guests: f64 = vms
                .iter_mut()
                .map(|vm| {
                    vm.run("bench-memory", &["/mnt/data"]).get("used_kib").parse::<f64>().unwrap()
                })
                .sum();
            let host = vms.iter().map(|vm| vm.pss_kib()).sum::<f64>() - before;
            let each = |kib: f64| kib / 1024.0 / mib as f64;
            let mut add = |what, value: f64| {
                figures.add(what, "MiB", Better::Less, peer, value.max(0.0));
            };
            add("in both guests (MemFree)", each(guests));
            add("on the host (PSS of QEMU and daemon)", each(host));
            vms.iter_mut().for_each(|vm| vm.poweroff());
        }
    }
    // The first peer uses almost no memory, so a ratio to it means nothing.
    figures.show(0, &[], how);
}
