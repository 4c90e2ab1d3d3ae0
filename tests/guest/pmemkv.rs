// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A persistent-memory key-value workload (see guest-tests/pmemkv) with kills and recovery: on
//! virtio-pmem under ext4 with DAX, and on virtio-fs with DAX. After a kill, a new VM finds the
//! maps in the state after a whole number of transactions, with every acknowledged transaction.

use tempfile::TempDir;

use crate::disk::Disk;
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const MAPS: [&str; 2] = ["hashmap", "rbtree"];
/// Number of transactions acknowledged before the kill.
const TRANSACTIONS: u64 = 40;

#[derive(Debug, Clone, Copy)]
enum Kill {
    Daemon,
    Qemu,
    Both,
}

/// Where the pools lie; it outlives the VMs.
enum Medium {
    Pmem(Disk),
    Fs(TempDir),
}

impl Medium {
    /// Boots a VM with the medium mounted at /mnt.
    fn boot<'g>(&self, guest: &'g Guest, new: bool) -> Vm<'g> {
        let options = Options { tools: true, ..Options::default() };
        match self {
            Self::Pmem(disk) => {
                let mut vm = guest.boot_with(&[disk], &options);
                let (dev, _) = vm.ready(0);
                if new {
                    vm.run("mkfs", &["ext4", &dev]);
                }
                vm.run("mount", &["ext4", &dev, "/mnt"]);
                vm
            }
            Self::Fs(dir) => {
                let share = [Share::dax(dir.path(), "kv")];
                let mut vm = guest.boot_shares(&share, &[], &options);
                vm.mount(&share[0], "/mnt", "dax=always");
                vm
            }
        }
    }
}

fn pool(map: &str) -> String {
    format!("/mnt/{map}.pool")
}

/// Loads the maps, without a kill.
fn load_in_peace(guest: &Guest, medium: &Medium) {
    let mut vm = medium.boot(guest, true);
    for map in MAPS {
        vm.run("kv", &["load", &pool(map), map, "30"]);
    }
    vm.run("umount", &["/mnt"]);
    vm.poweroff();
}

/// Verifies what was loaded in peace, in another VM.
fn verify_in_peace(vm: &mut Vm<'_>) {
    for map in MAPS {
        let report = vm.run("kv", &["verify", &pool(map), map, "29"]);
        assert_eq!(report.number("transactions"), 30);
    }
}

/// Kills the VM during a load into a pool of its own; a new VM recovers the map and verifies it.
fn killed<'g>(guest: &'g Guest, medium: &Medium, mut vm: Vm<'g>, map: &str, kill: Kill) -> Vm<'g> {
    let pool = pool(&format!("{map}-{kill:?}"));
    vm.start("kv", &["load", &pool, map, "0"]);
    let mut last = 0;
    let acked = |line: &str| line.strip_prefix("acked=").map(|n| n.parse().unwrap());
    while last < TRANSACTIONS {
        last = acked(&vm.case_line()).unwrap_or(last);
    }
    if !matches!(kill, Kill::Qemu) {
        vm.kill_daemon(0);
    }
    vm.kill_qemu();
    last = vm.last_lines().iter().filter_map(|line| acked(line)).max().unwrap_or(last);
    drop(vm);
    let mut vm = medium.boot(guest, false);
    let report = vm.run("kv", &["verify", &pool, map, &last.to_string()]);
    println!("{kill:?} after {last}: {} transactions found", report.number("transactions"));
    vm
}

fn all(test: &'static str, medium: impl Fn() -> Medium) {
    let Some(guest) = Guest::enter(test) else { return };
    let medium = medium();
    load_in_peace(&guest, &medium);
    let mut vm = medium.boot(&guest, false);
    verify_in_peace(&mut vm);
    for (map, kill) in [("hashmap", Kill::Qemu), ("rbtree", Kill::Daemon), ("hashmap", Kill::Both)]
    {
        vm = killed(&guest, &medium, vm, map, kill);
    }
    vm.poweroff();
}

#[test]
fn pmemkv_on_virtio_pmem() {
    all("pmemkv_on_virtio_pmem", || Medium::Pmem(Disk::new(256)));
}

#[test]
fn pmemkv_on_virtio_fs() {
    all("pmemkv_on_virtio_fs", || Medium::Fs(TempDir::new().expect("make a folder")));
}
