// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A backing file on the host, and the comparison of its bytes. The host mounts nothing: the guest
//! reports the extents of a file, and the host reads them from the backing file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use twox_hash::XxHash3_128;

use crate::report::CaseReport;

/// A backing file in a temporary folder. It outlives daemons and VMs, so that a test can start new
/// ones on it.
pub struct Disk {
    folder: TempDir,
    bytes: u64,
    args: Vec<String>,
}

impl Disk {
    /// The daemon creates the file itself (`--size`).
    pub fn new(mib: u64) -> Self {
        let folder = TempDir::new().expect("make a folder for the disk");
        Self { folder, bytes: mib << 20, args: Vec::new() }
    }

    /// As `new`, in a temporary folder below `dir`.
    pub fn below(dir: &Path, mib: u64) -> Self {
        let folder = TempDir::new_in(dir).expect("make a folder for the disk");
        Self { folder, bytes: mib << 20, args: Vec::new() }
    }

    /// Sets additional arguments for the daemon.
    pub fn args(self, args: &[&str]) -> Self {
        Self { args: args.iter().map(|arg| (*arg).to_owned()).collect(), ..self }
    }

    pub fn daemon_args(&self) -> &[String] {
        &self.args
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("pmem")
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn read(&self, offset: u64, len: u64) -> Vec<u8> {
        read_at(&self.path(), offset, len)
    }

    /// The bytes of the guest's file that `report` describes, read at their extents.
    pub fn file_bytes(&self, report: &CaseReport) -> Vec<u8> {
        let total = report.number("bytes");
        let mut bytes = Vec::new();
        for extent in report.extents() {
            assert_eq!(extent.logical, bytes.len() as u64, "a hole in {report:#?}");
            // The last block extends beyond the end of the file.
            let len = extent.len_bytes.min(total - extent.logical);
            bytes.extend(self.read(extent.physical, len));
        }
        assert_eq!(bytes.len() as u64, total, "the extents don't cover the file: {report:#?}");
        bytes
    }

    /// Checks that the host has the bytes of a file that the guest has fsynced, by the SHA-256 in
    /// the report.
    pub fn check(&self, report: &CaseReport) {
        let sha256 = sha256(&self.file_bytes(report));
        assert_eq!(sha256, report.get("sha256"), "the bytes on the host differ: {report:#?}");
    }

    /// As `check`, and compares the bytes with `expected`.
    pub fn check_is(&self, report: &CaseReport, expected: &[u8]) {
        assert!(self.file_bytes(report) == expected, "the bytes on the host differ: {report:#?}");
        self.check(report);
    }
}

fn read_at(path: &Path, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(len).unwrap()];
    let file = File::open(path).expect("open the backing file");
    file.read_exact_at(&mut bytes, offset).expect("read the backing file");
    bytes
}

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The checksum that `mapio sums` prints for these bytes.
pub fn xxh3(bytes: &[u8]) -> String {
    format!("{:032x}", XxHash3_128::oneshot(bytes))
}

/// The bytes that the function `pattern` in guest-tests/lib.sh writes.
pub fn pattern(seed: &str, len: usize) -> Vec<u8> {
    format!("{seed}\n").into_bytes().into_iter().cycle().take(len).collect()
}

/// The bytes that the case `mmap-write` stores: one value per page.
pub fn page_pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|offset| u8::try_from((seed + offset / 4096) % 251).unwrap()).collect()
}
