// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel's side: a file on a DAX file system, mapped once, and the trace events about it.

#![allow(unsafe_code)] // Maps a file, and touches it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::OnceLock;

use nix::fcntl::{FallocateFlags, fallocate};

use super::ops::{MOST_PAGES, Op};

const PAGE: u64 = 4096;
const CHUNK: usize = 2 << 20;
const TRACING: &str = "/sys/kernel/tracing";

/// The kernel's reaction to one access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// No fault: the page was mapped.
    None,
    Pmd {
        hole: bool,
    },
    Pte {
        hole: bool,
    },
}

pub struct Kernel {
    pub file: Arc<File>,
    _named: tempfile::NamedTempFile,
    inode: String,
    place: *mut u8,
    reserved: (*mut libc::c_void, usize),
}

fn enable() {
    static DONE: OnceLock<()> = OnceLock::new();
    DONE.get_or_init(|| {
        if !Path::new(TRACING).join("events/fs_dax").exists() {
            let _ = Command::new("mount").args(["-t", "tracefs", "none", TRACING]).status();
        }
        fs::write(format!("{TRACING}/events/fs_dax/enable"), "1").expect("fs_dax trace events");
    });
}

impl Kernel {
    pub fn new() -> Self {
        enable();
        let dir = std::env::var_os("VUD_DAX_DIR").expect("VUD_DAX_DIR is not set");
        let named = tempfile::NamedTempFile::new_in(dir).unwrap();
        let file = named.reopen().unwrap();
        let inode = format!(" ino {:#x} ", file.metadata().unwrap().ino());
        let bytes = (MOST_PAGES * PAGE) as usize;
        let room = bytes + CHUNK;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let base = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(std::ptr::null_mut(), room, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        let place = base.wrapping_byte_add(base.addr().next_multiple_of(CHUNK) - base.addr());
        // SAFETY: inside the range that was just reserved.
        let map = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::mmap(place, bytes, protection, flags, file.as_raw_fd(), 0)
        };
        assert_eq!(map, place);
        Self {
            file: Arc::new(file),
            _named: named,
            inode,
            place: place.cast(),
            reserved: (base, room),
        }
    }

    /// Runs the operation, and returns the trace events about this file.
    pub fn act(&self, op: Op) -> Vec<String> {
        fs::write(format!("{TRACING}/trace"), "").unwrap();
        let file = &*self.file;
        let range = |page: u64, pages: u64| ((page * PAGE) as i64, (pages * PAGE) as i64);
        match op {
            Op::Read(page) => {
                // SAFETY: inside the mapping, and inside the file: patterns stay below the file's
                // end.
                std::hint::black_box(unsafe { self.at(page).read_volatile() });
            }
            // SAFETY: as for the read.
            Op::Store(page) => unsafe { self.at(page).write_volatile(1) },
            Op::Fsync => file.sync_data().unwrap(),
            Op::Write(page, pages) => {
                file.write_all_at(&vec![7; (pages * PAGE) as usize], page * PAGE).unwrap();
            }
            Op::Fallocate(page, pages) => {
                let (from, bytes) = range(page, pages);
                fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes).unwrap();
            }
            Op::Punch(page, pages) => {
                let (from, bytes) = range(page, pages);
                let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE;
                fallocate(file, punch | FallocateFlags::FALLOC_FL_KEEP_SIZE, from, bytes).unwrap();
            }
            Op::Truncate(pages) => file.set_len(pages * PAGE).unwrap(),
        }
        let trace = fs::read_to_string(format!("{TRACING}/trace")).unwrap();
        let about = |line: &&str| line.contains(&self.inode) && line.contains(": dax_");
        trace.lines().filter(about).map(|line| line[line.find("dax_").unwrap()..].into()).collect()
    }

    fn at(&self, page: u64) -> *mut u8 {
        self.place.wrapping_add((page * PAGE) as usize)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // SAFETY: the whole range belongs to this value.
        unsafe { libc::munmap(self.reserved.0, self.reserved.1) };
    }
}

/// The reaction that the trace events of one access show.
pub fn fault(events: &[String]) -> Fault {
    let is = |name: &str| events.iter().any(|line| line.starts_with(&format!("{name}:")));
    let done = |name: &str| {
        let name = format!("{name}:");
        events.iter().any(|line| line.starts_with(&name) && line.contains("NOPAGE"))
    };
    if done("dax_pmd_fault_done") {
        Fault::Pmd { hole: is("dax_pmd_load_hole") }
    } else if done("dax_pte_fault_done") || is("dax_insert_pfn_mkwrite") {
        Fault::Pte { hole: is("dax_load_hole") }
    } else {
        assert!(!is("dax_pte_fault"), "a fault failed: {events:?}");
        Fault::None
    }
}

/// The entries that a sync wrote back: first page and number of pages of each.
pub fn written_back(events: &[String]) -> BTreeSet<(u64, u64)> {
    let hex = |line: &str, key: &str| {
        let text = line.split(&format!(" {key} 0x")).nth(1)?.split_whitespace().next()?;
        u64::from_str_radix(text, 16).ok()
    };
    let ones = events.iter().filter(|line| line.starts_with("dax_writeback_one:"));
    ones.map(|line| (hex(line, "pgoff").expect(line), hex(line, "pglen").expect(line))).collect()
}
