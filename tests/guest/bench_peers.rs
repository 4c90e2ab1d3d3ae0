// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The peers of the benchmark: the ways to give a guest a host file, and how fio runs on it.

use std::fs;
use std::path::Path;

use crate::Job;
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

/// Size of fio's file in bytes: it fits into all windows except the smallest.
pub const DATA_BYTES: usize = 32 << 20;

/// One way to give the guest a file.
#[derive(Clone, Copy)]
pub enum Peer {
    /// Our share, with a window or without one.
    Share { window: Option<&'static str> },
    /// Debian's virtiofsd.
    Virtiofsd { cache: &'static str },
    /// tmpfs in the guest's own memory: the upper bound.
    Tmpfs,
}

impl Peer {
    /// Its name in tables.
    pub fn name(&self) -> String {
        match *self {
            Self::Share { window: Some(window) } => format!("ours, window {window}"),
            Self::Share { window: None } => "ours, no window".into(),
            Self::Virtiofsd { cache } => format!("virtiofsd {cache}"),
            Self::Tmpfs => "tmpfs".into(),
        }
    }

    /// Whether the peer can run a job.
    pub fn runs(&self, job: &Job) -> bool {
        match self {
            // `--cache never` forbids MAP_SHARED.
            Self::Virtiofsd { cache: "never" } => job.engine != "mmap",
            _ => true,
        }
    }

    /// Boots a VM, runs the jobs (see the case `bench-fio`) on the file `data` of `dir`, and powers
    /// off. Returns I/Os per second, by job.
    pub fn run(&self, guest: &Guest, dir: &Path, runtime: &str, jobs: &[String]) -> Vec<f64> {
        let share = match *self {
            Self::Share { window: Some(window) } => Share::dax(dir, "bench").window(window),
            Self::Share { window: None } => Share::plain(dir, "bench"),
            Self::Virtiofsd { cache } => Share::virtiofsd(dir, "bench").args(&["--cache", cache]),
            Self::Tmpfs => {
                let mut vm = guest.boot(&[]);
                let iops = fio(&mut vm, "/tmp", runtime, jobs);
                vm.poweroff();
                return iops;
            }
        };
        let shares = [share];
        let mut vm = guest.boot_shares(&shares, &[], &Options::default());
        vm.mount(&shares[0], "/mnt", "dax=always");
        let iops = fio(&mut vm, "/mnt", runtime, jobs);
        vm.poweroff();
        iops
    }
}

/// Makes the file that all shares show: one file, so that all peers use the same pages of the host.
pub fn make_data(dir: &Path) {
    fs::write(dir.join("data"), vec![7; DATA_BYTES]).unwrap();
}

/// Runs jobs on the file `data` in `dir`; the case creates the file if it does not exist. Returns
/// I/Os per second, by job.
pub fn fio(vm: &mut Vm<'_>, dir: &str, runtime: &str, jobs: &[String]) -> Vec<f64> {
    let bytes = DATA_BYTES.to_string();
    let mut args = vec![dir, &bytes, runtime];
    args.extend(jobs.iter().map(String::as_str));
    let report = vm.run("bench-fio", &args);
    let mut iops = vec![f64::NAN; jobs.len()];
    for line in report.values("iops") {
        let (job, value) = line.split_once(',').unwrap();
        iops[job.parse::<usize>().unwrap()] = value.parse().unwrap();
    }
    assert!(iops.iter().all(|iops| iops.is_finite()), "fio left out a job: {report:#?}");
    iops
}
