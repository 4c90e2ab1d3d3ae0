// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows the daemon on persistent memory: a DAX file system, and a device-DAX node. Ordinary
//! machines have neither. `tests/guest` runs these tests in a VM that has both, with `VUD_DAX_DIR`
//! (a directory on a file system mounted with `-o dax`) and `VUD_DAX_DEVICE` (`/dev/dax0.0`).

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use testkit::daemon::Daemon;
use testkit::driver::{Answer, Driver, DriverOptions};
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::memory::guest_ram;
use testkit::strict_vmm::{StrictVmm, VmmOptions};
use vhost_user_dax::persist::{Backing, DaxNode, Durability, PersistMode};
use vhost_user_dax::pmem::{PmemFile, PmemFileSpec};
use vhost_user_dax::window::FileOffset;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-dax");
const FILE_BYTES: u64 = 16 << 20;
const PAGE: u64 = 4096;

fn from_env(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")).into()
}

fn dax_dir() -> TempDir {
    tempfile::tempdir_in(from_env("VUD_DAX_DIR")).unwrap()
}

/// `vhost-user-dax pmem`, the real binary, and a guest connected to it.
struct Pmem {
    file: PathBuf,
    daemon: Daemon,
    driver: Driver,
    vmm: StrictVmm,
}

impl Pmem {
    fn start(dir: &Path, file: &Path, more: &[&str]) -> Self {
        let socket = dir.join("sock");
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(&socket).arg("--file").arg(file);
        command.args(more).env_remove("RUST_LOG");
        let daemon = Daemon::start(command);
        let ram = guest_ram(1);
        let mut vmm = StrictVmm::connect(&socket, &ram, VmmOptions::default()).unwrap();
        let mut driver = Driver::new(ram, DriverOptions::default());
        vmm.start(&mut driver);
        vmm.wait_live(1);
        Self { file: file.to_owned(), daemon, driver, vmm }
    }

    fn store(&mut self, at: u64, bytes: &[u8]) {
        assert!(self.vmm.store(at, bytes));
        assert_eq!(self.driver.flush_and_wait(), Answer::OK);
    }

    fn end(mut self) {
        self.vmm.check();
        self.vmm.kill();
        assert!(self.daemon.wait_end().success());
        let file = self.file.clone();
        drop(self);
        // The VM's map holds the lock, too, and its thread unmaps a moment later.
        let spec = PmemFileSpec { path: file, size: None, sparse: true };
        testkit::eventually("the VM to unmap the file", || PmemFile::open(&spec).is_ok());
    }
}

/// Shows: a file on a DAX file system is detected, and each `--persist` has its guarantee.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn a_dax_file_system_is_detected() {
    let dir = dax_dir();
    assert_eq!(Backing::of_dir(dir.path()), Backing::DaxFile);
    let file = Arc::new(tempfile::tempfile_in(dir.path()).unwrap());
    assert_eq!(Backing::of(&file), Backing::DaxFile);
    let auto = Durability::choose(Backing::DaxFile, PersistMode::Auto).unwrap();
    assert_eq!(auto.instruction, None, "fdatasync is enough: the kernel tracks dirty pages");
    let lines = Durability::choose(Backing::DaxFile, PersistMode::Cacheline).unwrap();
    file.set_len(FILE_BYTES).unwrap();
    let direct = lines.persist(&file, FILE_BYTES).unwrap().direct.unwrap();
    direct.store(FileOffset(5000), b"straight").unwrap();
    let mut found = [0; 8];
    file.read_exact_at(&mut found, 5000).unwrap();
    assert_eq!(&found, b"straight");
}

/// Shows: with cache lines each page has its block before the guest starts, also of a file that had
/// holes.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn blocks_are_settled_before_lines_count() {
    let dir = dax_dir();
    let path = dir.path().join("pmem");
    File::create(&path).unwrap().set_len(FILE_BYTES).unwrap();
    let mut pmem = Pmem::start(dir.path(), &path, &["--persist=cacheline"]);
    assert!(
        pmem.daemon.said().contains("a DAX file system: a flush is CL"),
        "{}",
        pmem.daemon.said()
    );
    assert!(fs::metadata(&path).unwrap().blocks() * 512 >= FILE_BYTES, "holes are left");
    pmem.store(FILE_BYTES - 3, b"end");
    pmem.end();
    assert!(fs::read(&path).unwrap().ends_with(b"end"));
}

/// Shows: stores and flushes, a second daemon that finds the bytes, and the bytes in the file, with
/// each `--persist`.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn pmem_on_a_dax_file_system() {
    for how in ["auto", "sync", "cacheline"] {
        let dir = dax_dir();
        let path = dir.path().join("pmem");
        let arguments = ["--size", "16M", "--persist", how];
        let mut pmem = Pmem::start(dir.path(), &path, &arguments);
        for page in 0..FILE_BYTES / PAGE {
            assert!(pmem.vmm.store(page * PAGE + 7, &page.to_le_bytes()));
        }
        assert_eq!(pmem.driver.flush_and_wait(), Answer::OK);
        pmem.end();
        let mut again = Pmem::start(dir.path(), &path, &arguments);
        again.store(0, b"again");
        for page in 0..FILE_BYTES / PAGE {
            let found = again.vmm.fetch(page * PAGE + 7, 8).unwrap();
            assert_eq!(found, page.to_le_bytes(), "{how}, page {page}");
        }
        again.end();
    }
}

/// Shows: a device-DAX node as pmem: its size and lock, stores, flushes by cache lines, a second
/// daemon that finds the bytes; options that a node does not support are refused.
#[test]
#[ignore = "needs a device-DAX node: run by tests/guest"]
fn pmem_on_a_device_dax_node() {
    let node = from_env("VUD_DAX_DEVICE");
    let dir = tempfile::tempdir().unwrap();
    let bytes = {
        let file = OpenOptions::new().read(true).write(true).open(&node).unwrap();
        assert_eq!(Backing::of(&file), Backing::DeviceDax);
        DaxNode::of(&file).unwrap().unwrap().bytes
    };
    let mut pmem = Pmem::start(dir.path(), &node, &[]);
    assert!(pmem.daemon.said().contains("device-DAX: a flush is CL"), "{}", pmem.daemon.said());
    for at in (0..bytes).step_by(1 << 20) {
        assert!(pmem.vmm.store(at + 5, &at.to_le_bytes()));
    }
    assert_eq!(pmem.driver.flush_and_wait(), Answer::OK);
    let refused = |more: &[&str], why: &str| {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(dir.path().join("other"));
        let output = command.arg("--file").arg(&node).args(more).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(why), "{said}");
    };
    refused(&[], "in use by another process");
    refused(&["--persist=sync"], "a device-DAX node has no sync");
    pmem.end();
    refused(&["--size", "2M"], "not 2M");

    let mut again = Pmem::start(dir.path(), &node, &["--persist=cacheline"]);
    again.store(0, b"again");
    for at in (0..bytes).step_by(1 << 20) {
        assert_eq!(again.vmm.fetch(at + 5, 8).unwrap(), at.to_le_bytes());
    }
    again.end();
}

/// Shows: a share on a DAX file system, with each `--persist`: stores through the window and WRITEs
/// see each other, FSYNC is answered, and the host has the bytes.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn a_share_on_a_dax_file_system() {
    for how in ["auto", "sync", "cacheline"] {
        let below = from_env("VUD_DAX_DIR");
        let host = FsHost::with(FsOptions { persist: how.into(), below, ..FsOptions::default() });
        assert!(host.said().contains("the share is in a DAX file system"), "{}", host.said());
        host.put("file", &vec![1; 2 * RANGE as usize]);
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, 2 * RANGE, MAP_READ | MAP_WRITE, 0).unwrap();
        assert!(guest.vmm.store(RANGE - 2, b"stored"));
        assert_eq!(guest.write(node, fh, RANGE + 100, b"written"), Ok(7));
        assert_eq!(guest.vmm.fetch(RANGE + 100, 7).unwrap(), b"written");
        assert_eq!(guest.read(node, fh, RANGE - 2, 6).unwrap(), b"stored");
        guest.fsync(node, fh).unwrap();
        let bytes = host.get("file");
        assert_eq!(&bytes[RANGE as usize - 2..][..6], b"stored");
        assert_eq!(&bytes[RANGE as usize + 100..][..7], b"written");
        guest.power_off();
        assert!(host.ended().success());
    }
}

/// Shows: an access to a page behind the end of a node is an error, and does not end the process.
/// The kernel can't unmap a part of a node's map that is smaller than its alignment.
#[test]
#[ignore = "needs a device-DAX node: run by tests/guest"]
fn behind_the_end_of_a_device_dax_node() {
    let node = from_env("VUD_DAX_DEVICE");
    let file = Arc::new(OpenOptions::new().read(true).write(true).open(&node).unwrap());
    let DaxNode { bytes, align } = DaxNode::of(&file).unwrap().unwrap();
    assert!(align > PAGE, "its alignment is {align} bytes: this shows nothing");
    let lines = Durability::choose(Backing::DeviceDax, PersistMode::Auto).unwrap();
    let direct = lines.persist(&file, bytes + align).unwrap().direct.unwrap();
    direct.store(FileOffset(bytes - 4), b"last").unwrap();
    let mut found = [0; 4];
    direct.load(FileOffset(bytes - 4), &mut found).unwrap();
    assert_eq!(&found, b"last");
    let gone = direct.store(FileOffset(bytes + 5000), b"lost").unwrap_err();
    assert_eq!(gone.raw_os_error(), Some(nix::libc::EIO));
    assert!(
        direct.load(FileOffset(bytes - 4), &mut found).is_err(),
        "what was done before may be lost"
    );
    let again = lines.persist(&file, bytes).unwrap().direct.unwrap();
    again.load(FileOffset(bytes - 4), &mut found).unwrap();
    assert_eq!(&found, b"last");
}
