// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What shows a guest a host's file, and how fio is run on it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use tempfile::TempDir;

use crate::Job;
use crate::disk::Disk;
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm, slot_of};

/// What fio works on: it fits into all windows but the smallest.
const DATA: usize = 32 << 20;
/// A file system with that file, and its journal.
const DISK_MIB: u64 = 128;

/// One of them.
#[derive(Clone, Copy)]
pub enum Peer {
    /// Our share, with a window or without one.
    Share { window: Option<&'static str> },
    /// Debian's virtiofsd.
    Virtiofsd { cache: &'static str },
    /// Our virtio-pmem; with a kernel that keeps several flushes in flight, fsyncs only.
    Pmem { parallel: bool },
    /// QEMU's own virtio-pmem.
    BuiltIn { parallel: bool },
    /// QEMU's virtio-blk.
    Blk,
    /// The guest's own memory: nothing is faster.
    Tmpfs,
}

impl Peer {
    /// Its name in tables.
    pub fn name(&self) -> String {
        let with = |name: &str, parallel| {
            if parallel { format!("{name}, parallel flushes") } else { name.into() }
        };
        match *self {
            Self::Share { window: Some(window) } => format!("ours, window {window}"),
            Self::Share { window: None } => "ours, no window".into(),
            Self::Virtiofsd { cache } => format!("virtiofsd {cache}"),
            Self::Pmem { parallel } => with("our pmem", parallel),
            Self::BuiltIn { parallel } => with("QEMU's pmem", parallel),
            Self::Blk => "virtio-blk".into(),
            Self::Tmpfs => "tmpfs".into(),
        }
    }

    /// Whether it can do a job, and this is of interest.
    pub fn runs(&self, job: &Job) -> bool {
        match self {
            // No MAP_SHARED in this mode.
            Self::Virtiofsd { cache: "never" } => job.engine != "mmap",
            Self::Pmem { parallel: true } | Self::BuiltIn { parallel: true } => job.fsync,
            _ => true,
        }
    }

    /// Boots, runs the jobs (see the case `bench-fio`), and powers off. I/Os per second by job.
    pub fn run(&self, guest: &Guest, runtime: &str, jobs: &[String]) -> Vec<f64> {
        let dir = TempDir::new().unwrap();
        match *self {
            Self::Share { window } => {
                let share = match window {
                    Some(window) => Share::dax(dir.path(), "bench").window(window),
                    None => Share::plain(dir.path(), "bench"),
                };
                on_share(guest, share, runtime, jobs)
            }
            Self::Virtiofsd { cache } => {
                let share = Share::virtiofsd(dir.path(), "bench").args(&["--cache", cache]);
                on_share(guest, share, runtime, jobs)
            }
            Self::Pmem { parallel } => {
                let disk = Disk::new(DISK_MIB);
                let mut vm = guest.boot_with(&[&disk], &options(guest, parallel));
                on_pmem(&mut vm, runtime, jobs)
            }
            Self::BuiltIn { parallel } => {
                let file = allocated(dir.path());
                let backend = format!(
                    "memory-backend-file,id=pm,share=on,mem-path={},size={DISK_MIB}M",
                    file.display()
                );
                let device = format!("virtio-pmem-pci,memdev=pm,addr=0x{}", slot_of(0));
                let memory = "512M,slots=1,maxmem=4G".to_owned();
                let words = ["-m".into(), memory, "-object".into(), backend];
                let qemu = words.into_iter().chain(["-device".into(), device]).collect();
                let mut vm = guest.boot_with(&[], &Options { qemu, ..options(guest, parallel) });
                on_pmem(&mut vm, runtime, jobs)
            }
            Self::Blk => {
                let scratch = Some(allocated(dir.path()));
                let options = Options { scratch, ..Options::default() };
                let mut vm = guest.boot_with(&[], &options);
                let dev = vm.run("disk", &["scratch"]).get("dev").to_owned();
                vm.run("mkfs", &["ext4", &dev]);
                vm.run("sh", &["mount", "-t", "ext4", &dev, "/mnt"]);
                fio(&mut vm, "/mnt", runtime, jobs)
            }
            Self::Tmpfs => fio(&mut guest.boot(&[]), "/tmp", runtime, jobs),
        }
    }
}

/// A file that has its blocks, as our daemon makes one.
fn allocated(dir: &Path) -> PathBuf {
    let path = dir.join("disk");
    let file = File::create(&path).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, (DISK_MIB << 20).cast_signed()).unwrap();
    path
}

fn options(guest: &Guest, parallel: bool) -> Options<'static> {
    let kernel = if parallel { guest.images().kernel_parallel() } else { None };
    Options { kernel, ..Options::default() }
}

fn on_share(guest: &Guest, share: Share, runtime: &str, jobs: &[String]) -> Vec<f64> {
    fs::write(share.path("data"), vec![7; DATA]).unwrap();
    let shares = [share];
    let mut vm = guest.boot_shares(&shares, &[], &Options::default());
    vm.mount(&shares[0], "/mnt", "dax=always");
    fio(&mut vm, "/mnt", runtime, jobs)
}

fn on_pmem(vm: &mut Vm<'_>, runtime: &str, jobs: &[String]) -> Vec<f64> {
    let (dev, _) = vm.ready(0);
    vm.run("mkfs", &["ext4", &dev]);
    vm.run("mount", &["ext4", &dev, "/mnt"]);
    fio(vm, "/mnt", runtime, jobs)
}

fn fio(vm: &mut Vm<'_>, dir: &str, runtime: &str, jobs: &[String]) -> Vec<f64> {
    let bytes = DATA.to_string();
    let mut args = vec![dir, &bytes, runtime];
    args.extend(jobs.iter().map(String::as_str));
    let report = vm.run("bench-fio", &args);
    vm.poweroff();
    let mut iops = vec![f64::NAN; jobs.len()];
    for line in report.values("iops") {
        let (job, value) = line.split_once(',').unwrap();
        iops[job.parse::<usize>().unwrap()] = value.parse().unwrap();
    }
    assert!(iops.iter().all(|iops| iops.is_finite()), "fio left out a job: {report:#?}");
    iops
}
