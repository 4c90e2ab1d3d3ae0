// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows the replies to a guest when the host's disk fails once and then works again: EIO from then
//! on, and no success for lost pages. The disk is the device-mapper device `bad`, whose sectors are
//! made to fail. `tests/guest` runs these tests in a VM that plays the host, since they need a
//! kernel with a device mapper.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use testkit::driver::{Answer, Driver, DriverOptions};
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::memory::guest_ram;
use testkit::strict_vmm::{StrictVmm, VmmOptions};
use vhost::vhost_user::Listener;
use vhost_user_dax::device::Device;
use vhost_user_dax::persist::{Fdatasync, Persist};
use vhost_user_dax::pmem::Pmem;
use vhost_user_dax::session;

const EIO: i32 = 5;
const BOTH: u64 = MAP_READ | MAP_WRITE;

fn dmsetup(args: &[&str], input: &str) -> String {
    let mut command = Command::new("dmsetup");
    command.arg("--noudevsync").args(args).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("dmsetup");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "dmsetup {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The disk. `table` is its device-mapper table without failing sectors.
struct BadDisk {
    table: String,
}

impl BadDisk {
    fn new() -> Self {
        Self { table: dmsetup(&["table", "bad"], "") }
    }

    fn load(&self, table: &str) {
        dmsetup(&["suspend", "--noflush", "--nolockfs", "bad"], "");
        dmsetup(&["load", "bad"], table);
        dmsetup(&["resume", "bad"], "");
    }

    /// Makes each sector of `file` fail, and no other sector.
    fn fail(&self, file: &Path) {
        let words: Vec<&str> = self.table.split_whitespace().collect();
        let [_, sectors, "linear", device, _] = words[..] else { panic!("{}", self.table) };
        let sectors: u64 = sectors.parse().unwrap();
        let mut table = String::new();
        let mut at = 0;
        for (start, length) in sectors_of(file) {
            if start > at {
                table += &format!("{at} {} linear {device} {at}\n", start - at);
            }
            table += &format!("{start} {length} error\n");
            at = start + length;
        }
        table += &format!("{at} {} linear {device} {at}\n", sectors - at);
        self.load(&table);
    }

    fn heal(&self) {
        self.load(&self.table);
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        self.heal();
    }
}

/// The extents of the file on the disk: first sector and number of sectors, in order.
fn sectors_of(file: &Path) -> Vec<(u64, u64)> {
    let output = Command::new("filefrag").args(["-b512", "-v"]).arg(file).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let extent = |line: &str| {
        // "0: 0.. 32767: 34816.. 67583: 32768: last,unwritten,eof"
        let mut parts = line.split(':');
        let _number: u64 = parts.next()?.trim().parse().ok()?;
        let _logical = parts.next()?;
        let physical = parts.next()?.split("..").next()?.trim().parse().ok()?;
        Some((physical, parts.next()?.trim().parse().ok()?))
    };
    let mut extents: Vec<_> = text.lines().filter_map(extent).collect();
    extents.sort_unstable();
    assert!(!extents.is_empty(), "{text}");
    extents
}

/// Another process of the host syncs the file. The kernel may report the failure to it.
fn sync_by_another(file: &Path) {
    let _ = File::open(file).unwrap().sync_all();
}

/// Shows for pmem: a flush of lost pages fails, and so does each later one, also in the session of
/// a new VM; whether the daemon's sync or an earlier sync of another process has met the failure.
#[test]
#[ignore = "needs a device mapper: run by tests/guest"]
fn pmem_fails_for_good() {
    for met_by_another in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pmem");
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        (&file).write_all(&vec![1; 4 << 20]).unwrap();
        file.sync_all().unwrap();
        let disk = BadDisk::new();
        let file = Arc::new(file);
        let pmem = Pmem::new(file.clone(), Persist::kernel(Fdatasync(file))).unwrap();
        let socket = dir.path().join("sock");
        let mut listener = Listener::new(&socket, true).unwrap();
        let device: Arc<dyn Device> = pmem.clone();
        let serving = std::thread::spawn(move || {
            for _ in 0..2 {
                session::serve_one(&mut listener, &device).unwrap();
            }
        });
        for session in 0..2 {
            let ram = guest_ram(1);
            let mut vmm = StrictVmm::connect(&socket, &ram, VmmOptions::default()).unwrap();
            let mut driver = Driver::new(ram, DriverOptions::default());
            vmm.start(&mut driver);
            vmm.wait_live(1);
            if session == 0 {
                assert!(vmm.store(0, b"kept"));
                assert_eq!(driver.flush_and_wait(), Answer::OK);
                assert!(vmm.store(4096, b"lost"));
                disk.fail(&path);
                if met_by_another {
                    sync_by_another(&path);
                    disk.heal();
                }
                assert_eq!(driver.flush_and_wait(), Answer::FAILED, "by another: {met_by_another}");
                disk.heal();
            }
            for _ in 0..2 {
                assert!(vmm.store(8192, b"more"));
                assert_eq!(driver.flush_and_wait(), Answer::FAILED, "session {session}");
            }
            vmm.kill();
        }
        serving.join().unwrap();
    }
}

/// Shows for fs: an FSYNC of lost pages is EIO, and so is each later one; another file is not
/// affected.
#[test]
#[ignore = "needs a device mapper: run by tests/guest"]
fn a_share_fails_for_that_file() {
    for met_by_another in [false, true] {
        for through_window in [true, false] {
            let host = FsHost::with(FsOptions::default());
            for name in ["file", "other"] {
                host.put(name, &vec![1; RANGE as usize]);
                File::open(host.path(name)).unwrap().sync_all().unwrap();
            }
            let disk = BadDisk::new();
            let mut guest = host.boot();
            let (node, fh) = guest.opened("file");
            let (other, other_fh) = guest.opened("other");
            guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
            guest.setup(other, 0, RANGE, BOTH, RANGE).unwrap();
            assert!(guest.vmm.store(0, b"kept"));
            guest.fsync(node, fh).unwrap();
            if through_window {
                assert!(guest.vmm.store(4096, b"lost"));
            } else {
                guest.write(node, fh, 4096, b"lost").unwrap();
            }
            disk.fail(&host.path("file"));
            if met_by_another {
                sync_by_another(&host.path("file"));
                disk.heal();
            }
            assert_eq!(guest.fsync(node, fh), Err(EIO), "by another: {met_by_another}");
            disk.heal();
            for _ in 0..2 {
                assert!(guest.vmm.store(8192, b"more"));
                assert_eq!(guest.fsync(node, fh), Err(EIO), "each later FSYNC");
            }
            assert!(guest.vmm.store(RANGE, b"fine"));
            guest.fsync(other, other_fh).unwrap();
            assert_eq!(&fs::read(host.path("other")).unwrap()[..4], b"fine");
            guest.power_off();
        }
    }
}
