// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which events the devices of a VM survive: {pmem, fs, both} with `--mem-slots` on and off, in a
//! stock QEMU and guest. Each row runs in one VM, with stores and fsyncs around each event; the
//! host compares the bytes. The result must equal the row of the table in docs/front-ends.md, word
//! by word.

use std::path::Path;

use nix::libc;
use serde_json::json;
use tempfile::TempDir;

use crate::disk::{Disk, pattern, xxh3};
use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

const BEGIN: &str = "<!-- made by tests/guest/lives_matrix.rs: begin -->";
const END: &str = "<!-- made by tests/guest/lives_matrix.rs: end -->";
const EVENTS: [&str; 5] =
    ["two pauses", "driver bound anew", "unplugged, plugged", "system_reset", "reboot"];

/// Number of mapped files; SET_MEM_TABLE has room for 8 regions only.
const MANY: usize = 10;
const LEN: usize = 300_000;

const WORKS: &str = "works";
/// Q12 of docs/front-ends.md: a start after a reset can kill QEMU. In a rebind the start follows
/// the reset soon, and QEMU survives it sometimes, so there is no stable result to test.
const NOT_TRIED: &str = "not tried (Q12)";
const DIES: &str = "QEMU dies (Q12)";

/// One row of the table: the devices, and whether `--mem-slots` is on.
#[derive(Clone, Copy)]
struct Row {
    name: &'static str,
    pmem: bool,
    fs: bool,
    slots: bool,
}

const ROWS: [Row; 6] = [
    Row { name: "pmem, off", pmem: true, fs: false, slots: false },
    Row { name: "pmem, on", pmem: true, fs: false, slots: true },
    Row { name: "fs, off", pmem: false, fs: true, slots: false },
    Row { name: "fs, on", pmem: false, fs: true, slots: true },
    Row { name: "both, off", pmem: true, fs: true, slots: false },
    Row { name: "both, on", pmem: true, fs: true, slots: true },
];

/// One VM, during the events of one row.
struct Life<'g> {
    row: Row,
    disks: Vec<Disk>,
    shares: Vec<Share>,
    _dir: TempDir,
    vm: Vm<'g>,
    dev: String,
    /// Number of the current event; part of the names and the bytes of files.
    step: usize,
    /// The file last written to the pmem device, and its SHA-256.
    last: Option<(String, String)>,
}

impl<'g> Life<'g> {
    fn boot(guest: &'g Guest, row: Row) -> Self {
        let dir = TempDir::new().unwrap();
        let args = ["--keep-listening", "--mem-slots", if row.slots { "on" } else { "off" }];
        let disks: Vec<_> = row.pmem.then(|| Disk::new(64).args(&args)).into_iter().collect();
        let share = || Share::dax(dir.path(), "lives").our_args(&args);
        let shares: Vec<_> = row.fs.then(share).into_iter().collect();
        let parts: Vec<&Disk> = disks.iter().collect();
        let options = Options { hotplug: true, ..Options::default() };
        let vm = guest.boot_shares(&shares, &parts, &options);
        let (dev, step) = (String::new(), 0);
        let mut life = Self { row, disks, shares, _dir: dir, vm, dev, step, last: None };
        if row.pmem {
            life.find();
            let dev = life.dev.clone();
            life.vm.run("mkfs", &["ext4", &dev]);
        }
        life.mount();
        life.use_all();
        life
    }

    /// Index of the daemon of the share; QEMU's ports have the same indices.
    fn fs_index(&self) -> usize {
        self.disks.len()
    }

    /// PCI address of the device in the guest: each root port has a bus of its own.
    fn slot(index: usize) -> String {
        format!("{:02x}:00", index + 1)
    }

    fn find(&mut self) {
        let report = self.vm.run("ready", &[&Self::slot(0)]);
        self.dev = report.get("dev").to_owned();
    }

    fn mount(&mut self) {
        if self.row.pmem {
            let dev = self.dev.clone();
            self.vm.run("mount", &["ext4", &dev, "/disk"]);
        }
        if self.row.fs {
            self.vm.run("fs-appears", &["lives", "/mnt", "dax=always"]);
        }
    }

    fn umount(&mut self) {
        for (dir, is_there) in [("/disk", self.row.pmem), ("/mnt", self.row.fs)] {
            if is_there {
                self.vm.run("umount", &[dir]);
            }
        }
    }

    /// Checks that each device works and has kept its bytes, and that newly stored and synced bytes
    /// reach the host.
    fn use_all(&mut self) {
        self.step += 1;
        let seed = format!("step-{}", self.step);
        if self.row.pmem {
            if let Some((file, sum)) = self.last.take() {
                self.vm.run("verify", &[&file, &sum]);
            }
            let file = format!("/disk/{seed}");
            let report = self.vm.run("write", &[&file, &LEN.to_string(), &seed]);
            self.disks[0].check_is(&report, &pattern(&seed, LEN));
            self.last = Some((file, report.get("sha256").to_owned()));
        }
        if self.row.fs {
            // One file only, so that the guest has one map during all events.
            if self.step == 1 {
                self.vm.run("sh", &["touch", "/mnt/file"]);
                self.vm.run("mapio", &["append", &LEN.to_string(), "begin", "/mnt/file"]);
            }
            let report = self.vm.run("mapio", &["sums", "/mnt/file"]);
            let sum = xxh3(&std::fs::read(self.shares[0].path("file")).unwrap());
            assert_eq!(
                report.get("sum"),
                format!("file,{LEN},{sum},{sum}"),
                "the file differs: guest (left), host (right)"
            );
            self.vm.run("mapio", &["store", "0", &LEN.to_string(), &seed, "msync", "/mnt/file"]);
            let bytes = std::fs::read(self.shares[0].path("file")).unwrap();
            assert!(bytes == pattern(&seed, LEN), "{seed}: the bytes on the host differ");
        }
    }

    fn pauses(&mut self) -> String {
        for _ in 0..2 {
            self.vm.qmp("stop", json!({}));
            self.vm.qmp("cont", json!({}));
            self.use_all();
        }
        if self.row.slots {
            self.vm.assert_qemu_is_quiet();
        }
        WORKS.into()
    }

    /// A driver that is unbound resets its device. An unmounted share has no maps at that moment.
    fn rebind(&mut self) -> String {
        let pmem_is_tried = !self.row.slots;
        self.umount();
        if self.row.pmem && pmem_is_tried {
            self.dev = self.vm.run("rebind", &[&Self::slot(0)]).get("dev").to_owned();
        }
        if self.row.fs {
            let slot = Self::slot(self.fs_index());
            self.vm.run("fs-rebind", &[&slot, "lives", "/mnt", "dax=always", "2"]);
        }
        self.mount();
        self.use_all();
        match (self.row.pmem && !pmem_is_tried, self.row.fs) {
            (true, true) => format!("pmem: {NOT_TRIED}; fs: works if unmounted"),
            (true, false) => NOT_TRIED.into(),
            (false, _) if self.row.slots => "works if unmounted".into(),
            (false, _) => WORKS.into(),
        }
    }

    fn plug(&mut self) -> String {
        self.umount();
        if self.row.pmem {
            self.vm.unplug_and_plug(0);
            self.find();
        }
        if self.row.fs {
            self.vm.unplug_and_plug(self.fs_index());
        }
        self.mount();
        self.use_all();
        WORKS.into()
    }

    /// Resets the VM under a live mount.
    fn reset(&mut self) -> String {
        if self.row.slots {
            self.vm.system_reset_kills(libc::SIGSEGV);
            return DIES.into();
        }
        self.vm.system_reset();
        self.come_up();
        WORKS.into()
    }

    fn reboot(&mut self) -> String {
        if self.row.slots {
            return "as system_reset (Q12)".into();
        }
        self.vm.reboot();
        self.come_up();
        WORKS.into()
    }

    fn come_up(&mut self) {
        if self.row.pmem {
            self.find();
        }
        self.mount();
        self.use_all();
    }

    /// Pauses the VM with more maps than a SET_MEM_TABLE message has room for. The result is either
    /// no effect or dead devices (Q13 of docs/front-ends.md).
    fn pause_with_many_maps(&mut self) -> String {
        for file in 0..MANY {
            let file = format!("/mnt/many-{file}");
            self.vm.run("sh", &["touch", &file]);
            self.vm.run("mapio", &["append", "5000", "many", &file]);
            self.vm.run("mapio", &["store", "0", "5000", "stored", "msync", &file]);
        }
        self.vm.qmp("stop", json!({}));
        self.vm.qmp("cont", json!({}));
        // With slots no such line is expected; a dead device would make `use_all` fail.
        if !self.row.slots && self.vm.qemu_has_written("Error starting vhost-user-base: 105") {
            return format!("{WORKS}; with {MANY} files mapped: the devices are dead (Q13)");
        }
        self.use_all();
        format!("{WORKS}, with {MANY} files mapped too")
    }

    /// Runs all events in the order of [`EVENTS`]; the events that kill the VM come last.
    fn live(mut self) -> String {
        let mut pauses = self.pauses();
        if self.row.fs && self.row.slots {
            pauses = self.pause_with_many_maps();
        }
        let cells = [self.rebind(), self.plug(), self.reset(), self.reboot()];
        if self.row.fs && !self.row.slots {
            pauses = self.pause_with_many_maps();
            self.vm.kill_qemu();
            self.vm.terminate_daemons();
        } else if self.row.slots {
            self.vm.terminate_daemons();
        } else {
            self.umount();
            self.vm.poweroff_listening();
        }
        format!("| {} | {pauses} | {} |", self.row.name, cells.join(" | "))
    }
}

fn documented() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/front-ends.md");
    let text = std::fs::read_to_string(path).unwrap();
    let begin = text.find(BEGIN).expect("docs/front-ends.md lacks the first marker") + BEGIN.len();
    let end = text.find(END).expect("docs/front-ends.md lacks the second marker");
    text[begin..end].lines().filter(|line| line.starts_with('|')).map(str::to_owned).collect()
}

fn lives(test: &'static str, number: usize) {
    let Some(guest) = Guest::enter(test) else { return };
    let row = ROWS[number];
    let share = TempDir::new().unwrap();
    if row.fs && !Share::dax(share.path(), "").is_ours() {
        return guest.images().log_case("skip", test, "needs-our-daemon", 0);
    }
    let found = Life::boot(&guest, row).live();
    let written =
        documented().into_iter().find(|line| line.starts_with(&format!("| {} |", row.name)));
    assert_eq!(
        written.as_deref(),
        Some(&*found),
        "docs/front-ends.md (left) differs from the result of the test:\n{found}\n"
    );
}

/// The table has exactly the rows of [`ROWS`].
#[test]
fn the_table_has_all_rows() {
    let table = documented();
    let head = format!("| devices, `--mem-slots` | {} |", EVENTS.join(" | "));
    assert_eq!(table[0], head);
    let names: Vec<_> = table[2..].iter().filter_map(|line| line.split(" | ").next()).collect();
    assert_eq!(names, ROWS.map(|row| format!("| {}", row.name)));
}

#[test]
fn lives_of_pmem_without_slots() {
    lives("lives_of_pmem_without_slots", 0);
}

#[test]
fn lives_of_pmem_with_slots() {
    lives("lives_of_pmem_with_slots", 1);
}

#[test]
fn lives_of_fs_without_slots() {
    lives("lives_of_fs_without_slots", 2);
}

#[test]
fn lives_of_fs_with_slots() {
    lives("lives_of_fs_with_slots", 3);
}

#[test]
fn lives_of_both_without_slots() {
    lives("lives_of_both_without_slots", 4);
}

#[test]
fn lives_of_both_with_slots() {
    lives("lives_of_both_with_slots", 5);
}
