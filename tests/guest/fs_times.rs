// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which times and blocks programs see for a file that was changed in place. With a window the
//! change makes no request; the result must be the same as on Debian's virtiofsd and on the guest's
//! tmpfs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

/// Above the daemon's default `--dax-threshold`, and a multiple of no page or block size.
const BYTES: &str = "1234567";

/// The results that `real-tools` reports, one per program.
fn run(vm: &mut Vm<'_>, dir: &str) -> Vec<String> {
    let report = vm.run("real-tools", &[&format!("{dir}/tools"), BYTES]);
    report.values("did").into_iter().map(str::to_owned).collect()
}

/// Shows: rsync, git, make, tar and cp notice changes by write(2) and by stores, keep the times
/// that they set, and find holes; a write by another user clears setuid and setgid. Also with
/// `--cache always`.
#[test]
fn real_tools() {
    let Some(guest) = Guest::enter("real_tools") else { return };
    let dirs = [0; 3].map(|_| TempDir::new().unwrap());
    let shares = [
        Share::virtiofsd(dirs[0].path(), "virtiofsd"),
        Share::dax(dirs[1].path(), "always").args(&["--cache", "always"]),
        Share::dax(dirs[2].path(), "inode").args(&["--writeback"]),
    ];
    let shares = shares.map(|share| share.args(&["--killpriv-v2"]));
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    let mut results = vec![run(&mut vm, "/tmp")];
    for share in &shares {
        let dir = format!("/mnt/{}", share.tag());
        let mode = if share.tag() == "inode" { "dax=inode" } else { "dax=always" };
        vm.mount(share, &dir, mode);
        results.push(run(&mut vm, &dir));
    }
    vm.poweroff();
    let [memory, virtiofsd, ours @ ..] = &results[..] else { panic!("{results:?}") };
    assert_eq!(memory, virtiofsd, "virtiofsd (right) differs from the guest's tmpfs (left)");
    for (share, ours) in shares[1..].iter().zip(ours) {
        assert_eq!(virtiofsd, ours, "{} (right) differs from virtiofsd (left)", share.tag());
    }
}

/// Number of files in the repository of the benchmark; each has 100 bytes.
const FILES: usize = 20_000;

fn git(dir: &Path, args: &[&str]) {
    let mut git = Command::new("git");
    git.args(["-c", "user.name=n", "-c", "user.email=e"]).args(args).current_dir(dir);
    assert!(git.status().expect("run git").success(), "git {args:?}");
}

fn make_repository(dir: &Path) {
    let repo = dir.join("repo");
    for n in 0..FILES {
        let folder = repo.join(format!("{}", n / 200));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(n.to_string()), format!("{n:0100}")).unwrap();
    }
    git(&repo, &["init", "-q"]);
    git(&repo, &["add", "."]);
    git(&repo, &["commit", "-q", "-m", "all"]);
}

/// Measures what keeping the times of mapped files costs, for several builds of the daemon in turn,
/// in one guest. Settings: `VUD_BUILDS=NAME=PATH,NAME=PATH...`, `VUD_ROUNDS=3`,
/// `VUD_CACHES=auto,always`.
#[test]
#[ignore = "takes many minutes, and needs other builds; run by hand"]
fn the_cost_of_times() {
    let Some(guest) = Guest::enter("the_cost_of_times") else { return };
    let builds = std::env::var("VUD_BUILDS").expect("VUD_BUILDS=NAME=PATH,...");
    let builds: Vec<_> = builds.split(',').filter_map(|build| build.split_once('=')).collect();
    let dir = TempDir::new().unwrap();
    make_repository(dir.path());
    std::fs::write(dir.path().join("data"), vec![1; 32 << 20]).unwrap();
    let caches = std::env::var("VUD_CACHES").unwrap_or_else(|_| "auto,always".into());
    let mut costs: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    let rounds = std::env::var("VUD_ROUNDS").map_or(3, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        for cache in caches.split(',') {
            let share = |(name, path): &(&str, &str)| {
                let share = Share::dax(dir.path(), name).build(&PathBuf::from(path));
                share.args(&["--cache", cache, "--inode-file-handles=prefer"])
            };
            let shares: Vec<_> = builds.iter().map(share).collect();
            let mut vm = guest.boot_shares(&shares, &[], &Options::default());
            for turn in 0..shares.len() {
                let share = &shares[(turn + round) % shares.len()];
                vm.mount(share, "/mnt", "dax=always");
                let mut add = |what: &str, cost: &str| {
                    let row = format!("{what}, cache={cache}, {}", share.tag());
                    costs.entry(row).or_default().push(cost.parse().unwrap());
                };
                let report = vm.run("times-cost", &["/mnt", "3"]);
                for (what, cost) in report.values("cost").iter().filter_map(|v| v.split_once(',')) {
                    add(what, cost);
                }
                let jobs = ["0,psync,randwrite,1,1,warm", "1,psync,randwrite,1,0,warm"];
                let words = ["/mnt", "33554432", "2s"].into_iter().chain(jobs);
                let report = vm.run("bench-fio", &words.collect::<Vec<_>>());
                for (job, iops) in report.values("iops").iter().filter_map(|v| v.split_once(',')) {
                    add(["fio randwrite, fsync", "fio randwrite"][usize::from(job == "1")], iops);
                }
                vm.run("umount", &["/mnt"]);
            }
            vm.poweroff();
        }
    }
    for (row, costs) in &mut costs {
        costs.sort_by(f64::total_cmp);
        println!("{row}: median {} of {costs:?}", costs[costs.len() / 2]);
    }
}
