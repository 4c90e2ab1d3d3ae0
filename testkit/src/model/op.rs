// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The steps of a program. A step contains all its numbers, so that any other step can be left out.

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_BYTES, PMD_PAGES};

/// Number of pages of the window.
pub const WINDOW_PAGES: u64 = 3 * PMD_PAGES;
/// Number of files. The kernel tracks the dirty pages of file 1; only entries track those of 0 and
/// 2.
pub const FILES: usize = 3;
/// Files seldom grow above this size, in bytes.
const FILE_BYTES: u64 = 3 * PMD_BYTES;

/// The source of choices: a random number generator or a fuzzer's input.
pub trait Choose {
    /// A number below `n`.
    fn below(&mut self, n: u64) -> u64;

    /// Any number.
    fn any(&mut self) -> u64 {
        self.below(1 << 32) << 32 | self.below(1 << 32)
    }

    /// True with probability 1/n.
    fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A call of the engine, or an event around it. The numbers are raw bytes and may be invalid.
#[derive(Debug, Clone)]
pub enum Op {
    Grant {
        file: usize,
        from: u64,
        at: u64,
        bytes: u64,
        write: bool,
    },
    Revoke {
        spans: Vec<(u64, u64)>,
    },
    Resize {
        file: usize,
        bytes: u64,
    },
    /// Another process makes the file longer, and the engine is not notified yet.
    Grow {
        file: usize,
        bytes: u64,
    },
    /// Another process sets the file's length, and the engine is notified.
    HostResize {
        file: usize,
        bytes: u64,
    },
    Resized {
        file: usize,
    },
    Punch {
        file: usize,
        from: u64,
        bytes: u64,
    },
    /// FUSE WRITE.
    Write {
        file: usize,
        from: u64,
        bytes: u64,
    },
    Writeback {
        file: usize,
        first: u64,
        last: u64,
    },
    Reset,
    /// A new front-end has no maps, but the guest keeps its grants.
    MapAgain,
    /// Sets the number of free blocks of this file's disk.
    Free {
        file: usize,
        blocks: u64,
    },
    /// Sets how new blocks are laid out, and whether they can be mapped by 2 MiB.
    Blocks {
        file: usize,
        contiguous: bool,
        maps_pmd: bool,
    },
    /// Another process fills the holes of a chunk, with consecutive blocks that are not aligned to
    /// 2 MiB.
    Fill {
        file: usize,
        chunk: u64,
    },
    /// Lookups of this page fail from now on; `None`: no lookup fails.
    BadPage {
        file: usize,
        page: Option<u64>,
    },
    /// Syncs and flushes of this file's disk fail from now on.
    FailDisk {
        file: usize,
    },
}

/// An operation. Bit n of `refuse`: the front-end refuses the n-th message of the operation.
#[derive(Debug, Clone)]
pub struct Step {
    pub op: Op,
    pub refuse: u64,
}

impl Step {
    pub fn draw(c: &mut dyn Choose) -> Self {
        let refuse = match c.below(32) {
            0 | 1 => 1 << c.below(6),
            // All messages from a random one on, so the rollback is refused, too.
            2 => u64::MAX << c.below(6),
            3 => c.any() & c.any(),
            _ => 0,
        };
        Self { op: Op::draw(c), refuse }
    }
}

impl Op {
    fn draw(c: &mut dyn Choose) -> Self {
        let file = c.below(FILES as u64) as usize;
        match c.below(64) {
            0..=25 => grant(c, file),
            26..=39 => {
                let spans = (0..=c.below(4)).map(|_| {
                    let at = place(c, WINDOW_PAGES);
                    window_range(c, at)
                });
                Self::Revoke { spans: spans.collect() }
            }
            40..=43 => Self::Resize { file, bytes: length(c) },
            44 => Self::Grow { file, bytes: length(c) },
            45 => Self::HostResize { file, bytes: length(c) },
            46 => Self::Resized { file },
            47..=50 => {
                let from = odd(c, FILE_BYTES);
                let bytes = pages(c) * PAGE_BYTES;
                Self::Punch { file, from, bytes: odd_below(c, bytes) }
            }
            51..=57 => writeback(c, file),
            58 if c.once_in(4) => {
                if c.once_in(2) {
                    Self::Reset
                } else {
                    Self::MapAgain
                }
            }
            58 => {
                let from = odd(c, FILE_BYTES);
                Self::Write { file, from, bytes: c.below(5 * PAGE_BYTES) }
            }
            59 | 60 => {
                let blocks = if c.once_in(3) { c.below(600) } else { 1 << 40 };
                Self::Free { file, blocks }
            }
            61 if c.once_in(2) => Self::Fill { file, chunk: c.below(FILE_BYTES / PMD_BYTES) },
            61 => Self::Blocks { file, contiguous: !c.once_in(2), maps_pmd: !c.once_in(3) },
            62 => {
                let page = c.once_in(2).then(|| c.below(FILE_BYTES / PAGE_BYTES));
                Self::BadPage { file, page }
            }
            _ if c.once_in(16) => Self::FailDisk { file },
            _ => Self::BadPage { file, page: None },
        }
    }
}

fn grant(c: &mut dyn Choose, file: usize) -> Op {
    let at = place(c, WINDOW_PAGES);
    let (at, bytes) = window_range(c, at);
    let from = if c.once_in(2) {
        // Equal to the window offset modulo 2 MiB, so that a PMD entry is possible.
        (at % PMD_BYTES).saturating_add(c.below(3) * PMD_BYTES)
    } else {
        place(c, FILE_BYTES / PAGE_BYTES)
    };
    Op::Grant { file, from: weird(c, from), at, bytes, write: c.once_in(2) }
}

fn writeback(c: &mut dyn Choose, file: usize) -> Op {
    let first = place(c, FILE_BYTES / PAGE_BYTES) / PAGE_BYTES;
    let last = match c.below(4) {
        0 => u64::MAX >> 13,
        1 => first,
        _ => first + pages(c),
    };
    Op::Writeback { file, first: weird(c, first), last: weird(c, last) }
}

/// A number of pages. Small numbers are frequent, so that steps are fast.
fn pages(c: &mut dyn Choose) -> u64 {
    match c.below(16) {
        0..=8 => 1 + c.below(4),
        9..=12 => 1 + c.below(40),
        13 | 14 => PMD_PAGES,
        _ => 1 + c.below(1200),
    }
}

/// The offset in bytes of one of the first `pages` pages.
fn place(c: &mut dyn Choose, pages: u64) -> u64 {
    let page = c.below(pages);
    // Half of the offsets are at or near the start of a chunk, so that ranges overlap.
    let page = match c.below(4) {
        0 => page & !(PMD_PAGES - 1),
        1 => (page & !(PMD_PAGES - 1)) + c.below(6),
        _ => page,
    };
    weird(c, page * PAGE_BYTES)
}

fn window_range(c: &mut dyn Choose, at: u64) -> (u64, u64) {
    let bytes = pages(c) * PAGE_BYTES;
    let room = (WINDOW_PAGES * PAGE_BYTES).saturating_sub(at).max(PAGE_BYTES);
    // A range ends beyond the window's end now and then.
    let bytes = if c.once_in(32) { bytes } else { bytes.min(room) };
    (at, weird(c, bytes))
}

fn length(c: &mut dyn Choose) -> u64 {
    match c.below(32) {
        0 => weird(c, FILE_BYTES),
        1 => 1 << (20 + c.below(24)),
        _ => odd(c, FILE_BYTES),
    }
}

/// An offset below `most`, in bytes; it is page-aligned in two of three cases.
fn odd(c: &mut dyn Choose, most: u64) -> u64 {
    let page = place(c, most / PAGE_BYTES);
    if c.once_in(3) { page.saturating_add(c.below(PAGE_BYTES)) } else { page }
}

fn odd_below(c: &mut dyn Choose, most: u64) -> u64 {
    if !c.once_in(3) {
        return most;
    }
    let some = 1 + c.below(most);
    weird(c, some)
}

/// `usual`, replaced by an unusual number once in 200 times.
fn weird(c: &mut dyn Choose, usual: u64) -> u64 {
    if !c.once_in(200) {
        return usual;
    }
    match c.below(10) {
        0 => 0,
        1 => 1,
        2 => PAGE_BYTES - 1,
        3 => usual.wrapping_add(1),
        4 => u64::MAX,
        5 => u64::MAX - PAGE_BYTES + 1,
        6 => i64::MAX as u64,
        7 => (i64::MAX as u64) & !(PAGE_BYTES - 1),
        8 => usual | 1 << 40,
        _ => c.any(),
    }
}
