// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 6: the daemon's cache-line code against libpmem (PMDK): write-back of dirty and of clean
//! lines, and non-temporal copies. Both sides work on the same pages.

#![allow(unsafe_code)] // Calls a C library, and shares memory with it.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::libc;
use vhost_user_dax::persist::{Backing, Direct, Durability, LineFlush, Persist, PersistMode};
use vhost_user_dax::window::{FileOffset, FileRange};

use super::measure::{Effort, Samples, nanos};
use super::report::{Table, Verdicts, headline, short};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Size in bytes, and number of rounds. For 2 MiB of dirty lines the memory's bandwidth is the
/// limit on both sides, so the difference is about a thousandth and needs many rounds.
const SIZES: [(&str, usize, usize); 3] =
    [("4 KiB", 4 * KIB, 16_001), ("2 MiB", 2 * MIB, 64_001), ("256 MiB", BYTES, 401)];
/// The largest size, in bytes.
const BYTES: usize = 256 * MIB;
/// The least speed, relative to libpmem's.
const LEAST: f64 = 0.95;
/// PMEM_F_MEM_NONTEMPORAL, and PMEM_F_MEM_NODRAIN.
const NONTEMPORAL: libc::c_uint = 1 << 1 | 1 << 0;

type Flush = unsafe extern "C" fn(*const u8, usize);
type Drain = unsafe extern "C" fn();
type Memcpy = unsafe extern "C" fn(*mut u8, *const u8, usize, libc::c_uint) -> *mut u8;

/// Functions of libpmem.
struct Libpmem {
    flush: Flush,
    drain: Drain,
    memcpy: Memcpy,
}

impl Libpmem {
    /// `None` if libpmem is not installed.
    fn load() -> Option<Self> {
        // SAFETY: libpmem's constructor has no preconditions; the name ends in 0.
        let library = unsafe { libc::dlopen(c"libpmem.so.1".as_ptr(), libc::RTLD_NOW) };
        let symbol = |name: &std::ffi::CStr| {
            // SAFETY: dlsym(3) of an open library; the name ends in 0.
            let found = unsafe { libc::dlsym(library, name.as_ptr()) };
            (!library.is_null() && !found.is_null()).then_some(found)
        };
        // SAFETY: these are the functions' types in libpmem.h.
        unsafe {
            Some(Self {
                flush: std::mem::transmute::<*mut libc::c_void, Flush>(symbol(c"pmem_flush")?),
                drain: std::mem::transmute::<*mut libc::c_void, Drain>(symbol(c"pmem_drain")?),
                memcpy: std::mem::transmute::<*mut libc::c_void, Memcpy>(symbol(c"pmem_memcpy")?),
            })
        }
    }
}

/// A file on a tmpfs, mapped as the daemon maps it.
struct Fixture {
    libpmem: Libpmem,
    /// As the engine has it.
    lines: Box<dyn LineFlush>,
    direct: Arc<Direct>,
    base: *mut u8,
    from: Vec<u8>,
}

impl Fixture {
    fn new(libpmem: Libpmem) -> Self {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        file.set_len(BYTES as u64).unwrap();
        let file = Arc::new(file);
        let chosen = Durability::choose(Backing::Memory, PersistMode::Cacheline).unwrap();
        let chosen = chosen.persist(&file, BYTES as u64).unwrap();
        let Persist::Lines(lines) = chosen.persist else { panic!("not by cache lines") };
        let (base, direct) = (mapped(&file), chosen.direct.unwrap());
        let fixture = Self { libpmem, lines, direct, base, from: vec![7; BYTES] };
        fixture.dirty(BYTES); // All pages are there.
        fixture
    }

    fn dirty(&self, bytes: usize) {
        // SAFETY: the mapping has at least `bytes` bytes.
        unsafe { self.base.write_bytes(black_box(1), bytes) };
    }

    fn ours(&self, bytes: usize) {
        self.lines.flush(FileRange::new(FileOffset(0), bytes as u64)).unwrap();
        self.lines.fence();
    }

    fn libpmem(&self, bytes: usize) {
        // SAFETY: the mapping has at least `bytes` bytes.
        unsafe {
            (self.libpmem.flush)(self.base, bytes);
            (self.libpmem.drain)();
        }
    }

    fn copy_ours(&self, bytes: usize) {
        self.direct.store(FileOffset(0), &self.from[..bytes]).unwrap();
        self.direct.fence();
    }

    fn copy_libpmem(&self, bytes: usize) {
        // SAFETY: mapping and buffer have at least `bytes` bytes.
        unsafe {
            (self.libpmem.memcpy)(self.base, self.from.as_ptr(), bytes, NONTEMPORAL);
            (self.libpmem.drain)();
        }
    }
}

/// The address at which the daemon's code has mapped the file, so that both sides use the same
/// mapping.
fn mapped(file: &File) -> *mut u8 {
    let inode = file.metadata().unwrap().ino().to_string();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.split_whitespace().nth(4) == Some(&inode)).unwrap();
    let start = line.split('-').next().unwrap();
    std::ptr::with_exposed_provenance_mut(usize::from_str_radix(start, 16).unwrap())
}

/// Runs `work` with `lines` more cache lines of stack. The write-back of a page may take twice as
/// long at some stack addresses (probably a load waits for the write-back of a line with the same
/// offset in its page), so the rounds use different stack depths.
#[inline(never)]
fn deeper<T>(lines: usize, work: &mut dyn FnMut() -> T) -> T {
    let frame = black_box([0_u8; 64]);
    let done = if lines == 0 { work() } else { deeper(lines - 1, work) };
    black_box(frame);
    done
}

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    headline(6, "Cache lines against libpmem: write-back and a fence, copies past the cache");
    let Some(libpmem) = Libpmem::load() else {
        println!("SKIPPED point 6: no libpmem.so.1 here (Debian: libpmem1)");
        return;
    };
    let fixture = Fixture::new(libpmem);
    let mut table = Table::new(&["what", "size", "ours us", "libpmem us", "libpmem / ours"]);
    for (name, bytes, rounds) in SIZES {
        for what in ["dirty", "clean", "copy"] {
            // Each sample is long enough for the clock; making lines dirty is not timed.
            let repeat = (2 * MIB / bytes).max(1);
            let turns = |work: &dyn Fn()| {
                let mut spent = 0.0;
                for _ in 0..repeat {
                    if what == "dirty" {
                        fixture.dirty(bytes);
                    }
                    spent += nanos(work);
                }
                spent / repeat as f64
            };
            let side = |ours: bool| match (what, ours) {
                ("copy", true) => turns(&|| fixture.copy_ours(bytes)),
                ("copy", false) => turns(&|| fixture.copy_libpmem(bytes)),
                (_, true) => turns(&|| fixture.ours(bytes)),
                (_, false) => turns(&|| fixture.libpmem(bytes)),
            };
            // The sides alternate in going first.
            let samples = Samples::of((0..effort.pick(rounds, 5)).map(|round| {
                deeper(round % 64, &mut || {
                    let first = side(round % 2 == 0);
                    let second = side(round % 2 != 0);
                    if round % 2 == 0 { [first, second] } else { [second, first] }
                })
            }));
            let ratio = samples.ratio(1, 0);
            let micros = |side| short(samples.median(side) / 1000.0);
            table.row(&[&what, &name, &micros(0), &micros(1), &format!("{ratio:.4}")]);
            verdicts.aim(
                ratio >= LEAST,
                format!("6. {what}, {name}: {ratio:.4} of libpmem (aim {LEAST})"),
            );
        }
    }
    table.print();
}
