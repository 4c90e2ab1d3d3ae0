// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A backing file on the host, and the judge of its bytes. Nothing is mounted: the
//! guest says where a file's bytes should be, and they are read from there.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tempfile::TempDir;
use twox_hash::XxHash3_128;

use crate::report::CaseReport;

/// Outlives daemons and VMs, so that a test can start new ones on it.
pub struct Disk {
    folder: TempDir,
    bytes: u64,
    args: Vec<String>,
}

impl Disk {
    /// The file itself is made by the daemon (`--size`).
    pub fn new(mib: u64) -> Self {
        let folder = TempDir::new().expect("make a folder for the disk");
        Self { folder, bytes: mib << 20, args: Vec::new() }
    }

    /// The same, in a folder of its own below `dir`.
    pub fn below(dir: &Path, mib: u64) -> Self {
        let folder = TempDir::new_in(dir).expect("make a folder for the disk");
        Self { folder, bytes: mib << 20, args: Vec::new() }
    }

    /// More arguments for its daemon.
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

    /// The bytes of the guest's file that `report` describes, read at their place.
    pub fn file_bytes(&self, report: &CaseReport) -> Vec<u8> {
        let total = report.number("bytes");
        let mut bytes = Vec::new();
        for extent in report.extents() {
            assert_eq!(extent.logical, bytes.len() as u64, "a hole in {report:#?}");
            // The last block of a file is longer than what the file has in it.
            let len = extent.len_bytes.min(total - extent.logical);
            bytes.extend(self.read(extent.physical, len));
        }
        assert_eq!(bytes.len() as u64, total, "the extents don't cover the file: {report:#?}");
        bytes
    }

    /// The guest fsynced a file and told its sha256: the host has those bytes.
    pub fn check(&self, report: &CaseReport) {
        let sha256 = sha256(&self.file_bytes(report));
        assert_eq!(sha256, report.get("sha256"), "other bytes on the host: {report:#?}");
    }

    /// The same, and the host knows by itself what the bytes must be.
    pub fn check_is(&self, report: &CaseReport, expected: &[u8]) {
        assert!(self.file_bytes(report) == expected, "other bytes on the host: {report:#?}");
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

/// What `mapio sums` tells of these bytes.
pub fn xxh3(bytes: &[u8]) -> String {
    format!("{:032x}", XxHash3_128::oneshot(bytes))
}

/// What `pattern` in guest-tests/lib.sh makes.
pub fn pattern(seed: &str, len: usize) -> Vec<u8> {
    format!("{seed}\n").into_bytes().into_iter().cycle().take(len).collect()
}

/// What the case mmap-write stores: one value a page.
pub fn page_pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|offset| u8::try_from((seed + offset / 4096) % 251).unwrap()).collect()
}
