// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmark of persistent memory and disks, each with ext4 in the guest. All are devices of
//! one VM. Both virtio-pmem devices show the same file, mounted from one device at a time, because
//! which host pages back the file has more influence than which device maps it.

use std::fs::File;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};
use tempfile::TempDir;

use crate::bench_peers::fio;
use crate::disk::Disk;
use crate::figures::{Better, Figures, How, in_turn, verdict};
use crate::machine::Options;
use crate::vm::{Guest, Vm, slot_of};
use crate::{Job, fsyncs, jobs};

/// Size of the file system: it holds fio's file and the journal.
const DISK_MIB: u64 = 128;

/// Indices of the peers: our virtio-pmem and QEMU's own.
const OURS: usize = 0;
const BUILT_IN: usize = 1;
/// QEMU's virtio-blk, and the guest's tmpfs.
const BLK: usize = 2;
const TMPFS: usize = 3;
const NAMES: [&str; 4] = ["our pmem", "QEMU's pmem", "virtio-blk", "tmpfs"];
/// First index of the two virtio-pmem devices with a kernel that keeps several flushes in flight.
const PARALLEL: usize = NAMES.len();

/// A VM with all devices.
struct Fixture<'g> {
    vm: Vm<'g>,
    /// The device of each peer; `None` for tmpfs.
    devices: [Option<String>; NAMES.len()],
    _disk: Disk,
    _folder: TempDir,
}

impl<'g> Fixture<'g> {
    fn boot(guest: &'g Guest, kernel: Option<PathBuf>) -> Self {
        let disk = Disk::new(DISK_MIB);
        let folder = TempDir::new().unwrap();
        let backend = format!(
            "memory-backend-file,id=pm,share=on,mem-path={},size={DISK_MIB}M",
            disk.path().display()
        );
        let device = format!("virtio-pmem-pci,memdev=pm,addr=0x{}", slot_of(BUILT_IN));
        let memory = "512M,slots=1,maxmem=4G";
        let qemu = ["-m", memory, "-object", &backend, "-device", &device].map(str::to_owned);
        let scratch = Some(allocated(folder.path()));
        let options = Options { kernel, scratch, qemu: qemu.into(), ..Options::default() };
        let mut vm = guest.boot_with(&[&disk], &options);
        let [ours, built_in] = [OURS, BUILT_IN].map(|index| vm.ready(index).0);
        vm.run("mkfs", &["ext4", &ours]);
        let blk = options.kernel.is_none().then(|| vm.run("disk", &["scratch"]));
        let blk = blk.map(|report| report.get("dev").to_owned());
        if let Some(dev) = &blk {
            vm.run("mkfs", &["ext4", dev]);
        }
        Self { vm, devices: [Some(ours), Some(built_in), blk, None], _disk: disk, _folder: folder }
    }

    /// Runs one job on a peer. Returns I/Os per second.
    fn run(&mut self, peer: usize, runtime: &str, job: &Job) -> f64 {
        let jobs = [job.words(0)];
        let Some(dev) = &self.devices[peer] else {
            return fio(&mut self.vm, "/tmp", runtime, &jobs)[0];
        };
        if peer == BLK {
            self.vm.run("sh", &["mount", "-t", "ext4", dev, "/mnt"]);
        } else {
            self.vm.run("mount", &["ext4", dev, "/mnt"]);
        }
        let iops = fio(&mut self.vm, "/mnt", runtime, &jobs)[0];
        self.vm.run("umount", &["/mnt"]);
        iops
    }

    /// Runs one job on the bare device, which destroys its file system. Returns I/Os per second.
    fn run_bare(&mut self, peer: usize, runtime: &str, job: &Job) -> f64 {
        let dev = self.devices[peer].as_deref().expect("a device");
        let dir = format!("/tmp/bare{peer}");
        self.vm.run("sh", &["mkdir", "-p", &dir, "&&", "ln", "-sfn", dev, &format!("{dir}/data")]);
        fio(&mut self.vm, &dir, runtime, &[job.words(0)])[0]
    }

    /// Runs each job on the first `peers` peers in turn: all jobs on a file, then the fsync jobs on
    /// the bare device. Calls `add` with row, peer and I/Os per second. Powers off.
    fn measure(
        mut self,
        peers: usize,
        round: usize,
        runtime: &str,
        jobs: impl Iterator<Item = Job>,
        mut add: impl FnMut(String, usize, f64),
    ) {
        for (turn, job) in (round..).zip(jobs) {
            for peer in in_turn(peers, turn) {
                add(job.name(), peer, self.run(peer, runtime, &job));
            }
        }
        for (turn, job) in (round..).zip(fsyncs()) {
            for peer in in_turn(peers.min(TMPFS), turn) {
                add(bare(&job), peer, self.run_bare(peer, runtime, &job));
            }
        }
        self.vm.poweroff();
    }
}

/// Makes a file with allocated blocks, as our daemon allocates them.
fn allocated(dir: &Path) -> PathBuf {
    let path = dir.join("disk");
    let file = File::create(&path).unwrap();
    fallocate(&file, FallocateFlags::empty(), 0, (DISK_MIB << 20).cast_signed()).unwrap();
    path
}

/// Name of the row of a job on the bare device.
fn bare(job: &Job) -> String {
    format!("the bare device, {}", job.name())
}

/// Measures and prints the figures.
pub fn run(guest: &Guest, quick: bool, rounds: usize, how: &How, step: &dyn Fn(&str)) {
    let runtime = if quick { "20ms" } else { "500ms" };
    let parallel = guest.images().kernel_parallel().filter(|_| !quick);
    let mut names = NAMES.map(str::to_owned).to_vec();
    if parallel.is_some() {
        names.extend([OURS, BUILT_IN].map(|peer| format!("{}, parallel flushes", NAMES[peer])));
    }
    let mut figures =
        Figures::new("pmem", "fio in a guest, 4 KiB, requests per second: devices", names);
    for round in 0..rounds {
        step(&format!("round {} of {rounds}: {}", round + 1, NAMES.join(", ")));
        let peers = if quick { BLK } else { NAMES.len() };
        let mut add = |row: String, peer, iops| figures.add(&row, "/s", Better::More, peer, iops);
        Fixture::boot(guest, None).measure(
            peers,
            round,
            runtime,
            jobs(quick).into_iter(),
            &mut add,
        );
        if let Some(kernel) = &parallel {
            step(&format!("round {} of {rounds}: a kernel with parallel flushes", round + 1));
            let fixture = Fixture::boot(guest, Some(kernel.clone()));
            fixture.measure(BLK, round, runtime, fsyncs(), |row, peer, iops| {
                add(row, PARALLEL + peer, iops);
            });
        }
    }
    figures.show(OURS, &[BUILT_IN], how);
    println!();
    let least = |job: &Job| match job.threads {
        8 => 2.0,
        32 => 4.0,
        _ => 1.0,
    };
    let rows = jobs(quick).into_iter().map(|job| (job.name(), least(&job)));
    for (row, least) in rows.chain(fsyncs().map(|job| (bare(&job), least(&job)))) {
        let over = |ours| figures.ratio(&row, ours, &[ours + BUILT_IN]).median;
        verdict(&format!("{row}, our pmem over QEMU's"), over(OURS), least);
        if parallel.is_some() {
            verdict(
                &format!("{row}, parallel flushes, our pmem over QEMU's"),
                over(PARALLEL),
                least,
            );
        }
    }
}
