// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The operations on a file. A page has 4 KiB, a chunk 512 pages.

/// The length of the longest file, in pages.
pub const MOST_PAGES: u64 = 4 * 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// A load from this page through a shared mapping.
    Read(u64),
    /// A store to this page through a shared mapping.
    Store(u64),
    Fsync,
    /// write(2): first page, number of pages.
    Write(u64, u64),
    Fallocate(u64, u64),
    Punch(u64, u64),
    /// ftruncate(2) to this number of pages. Every pattern begins with it.
    Truncate(u64),
}

use Op::{Fallocate, Fsync, Punch, Read, Store, Truncate, Write};

/// Hand-written patterns, with names.
pub fn scripted() -> Vec<(&'static str, Vec<Op>)> {
    vec![
        ("a hole is read", vec![Truncate(1024), Read(3), Read(600)]),
        ("a hole is stored to", vec![Truncate(1024), Store(3), Fsync]),
        ("a hole is read, then stored to", vec![Truncate(512), Read(5), Store(5), Fsync]),
        ("another page of a hole is stored to", vec![Truncate(512), Read(5), Store(6), Read(7)]),
        ("blocks are read", vec![Truncate(512), Write(0, 512), Read(9), Fsync]),
        ("blocks are stored to", vec![Truncate(512), Write(0, 512), Store(9), Fsync]),
        (
            "blocks are read, then stored to",
            vec![Truncate(512), Write(0, 512), Read(9), Store(9), Fsync],
        ),
        (
            "unwritten blocks are read",
            vec![Truncate(1024), Fallocate(0, 1024), Read(0), Read(1000)],
        ),
        (
            "unwritten blocks are stored to",
            vec![Truncate(1024), Fallocate(0, 1024), Store(0), Fsync],
        ),
        (
            "stored to, synced, stored to again",
            vec![Truncate(512), Fallocate(0, 512), Store(0), Fsync, Store(0), Fsync, Fsync],
        ),
        (
            "a part of a chunk has blocks",
            vec![Truncate(512), Write(100, 50), Read(120), Read(5), Store(7)],
        ),
        (
            "blocks here, unwritten there",
            vec![
                Truncate(512),
                Fallocate(0, 512),
                Write(10, 5),
                Read(11),
                Read(100),
                Store(100),
                Fsync,
            ],
        ),
        (
            "the end of the file is in the chunk",
            vec![Truncate(700), Read(5), Read(600), Store(650), Fsync],
        ),
        ("an odd start", vec![Truncate(1024), Write(1, 1000), Store(3), Store(513), Fsync]),
        (
            "a hole in the middle of blocks",
            vec![
                Truncate(512),
                Write(0, 512),
                Punch(100, 8),
                Read(100),
                Read(50),
                Store(100),
                Fsync,
            ],
        ),
        (
            "a mapped chunk gets a hole",
            vec![
                Truncate(512),
                Fallocate(0, 512),
                Store(0),
                Punch(8, 8),
                Read(8),
                Read(0),
                Store(9),
                Fsync,
            ],
        ),
        (
            "a mapped chunk is punched whole",
            vec![
                Truncate(1024),
                Fallocate(0, 1024),
                Store(0),
                Store(600),
                Punch(0, 512),
                Fsync,
                Read(0),
                Store(0),
                Fsync,
            ],
        ),
        (
            "cut off and grown again",
            vec![
                Truncate(1024),
                Fallocate(0, 1024),
                Store(0),
                Store(700),
                Truncate(300),
                Fsync,
                Truncate(1024),
                Read(700),
                Store(700),
                Fsync,
            ],
        ),
        (
            "cut in the middle of a chunk",
            vec![
                Truncate(512),
                Write(0, 512),
                Store(0),
                Truncate(100),
                Store(50),
                Fsync,
                Truncate(512),
                Read(50),
                Read(400),
            ],
        ),
        (
            "write(2) fills a hole that is shown",
            vec![Truncate(512), Read(10), Write(10, 1), Read(10), Store(10), Fsync],
        ),
        (
            "write(2) fills a whole hole",
            vec![Truncate(512), Read(10), Write(0, 512), Read(10), Store(400), Fsync],
        ),
        (
            "four chunks, stored to out of order",
            vec![
                Truncate(2048),
                Fallocate(0, 2048),
                Store(1600),
                Store(0),
                Store(1100),
                Store(513),
                Fsync,
                Store(1),
                Fsync,
            ],
        ),
        (
            "many pages of one chunk",
            vec![
                Truncate(512),
                Store(0),
                Store(2),
                Store(4),
                Store(6),
                Fsync,
                Store(4),
                Fsync,
                Read(1),
                Store(1),
                Fsync,
            ],
        ),
        ("an empty file grows", vec![Truncate(0), Truncate(512), Read(0), Store(511), Fsync]),
    ]
}

/// A random pattern; equal seeds give equal patterns.
pub fn random(seed: u64) -> Vec<Op> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |n: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 20) % n
    };
    let mut pages = [512, 700, 1024, 2048][below(4) as usize];
    let mut ops = vec![Truncate(pages)];
    for _ in 0..3 + below(9) {
        if pages == 0 {
            pages = 512;
            ops.push(Truncate(pages));
        }
        let page = if below(2) == 0 { below(pages) } else { below(pages.div_ceil(512)) * 512 };
        let most = pages - page;
        let run = if below(2) == 0 { most.min(512) } else { 1 + below(most.min(600)) };
        let op = match below(16) {
            0..4 => Read(page),
            4..9 => Store(page),
            9..11 => Fsync,
            11 => Write(page, run),
            12..14 => Fallocate(page, run),
            14 => Punch(page, run),
            _ => {
                pages = [0, 1, 300, 512, 1024, 1500, 2048][below(7) as usize];
                Truncate(pages)
            }
        };
        ops.push(op);
    }
    ops.push(Fsync);
    ops
}
