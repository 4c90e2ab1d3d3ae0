// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The steps of the crash workload, as a function of the stream's number and the step's number. The
//! guest runs the steps, and the host computes from them which bytes must be there afterwards.
//! (tests/guest includes this file.)

/// Number of streams. The streams run at the same time, each with files of its own.
pub const STREAMS: u64 = 2;
/// The stream that uses write(2); the other one stores through mappings.
pub const WRITES: u64 = 0;
/// Number of bytes of a bare device that each stream uses.
pub const RAW_BYTES: usize = 16 << 20;
/// Length of a mapped file, in bytes.
pub const MAPPED_BYTES: usize = 3 << 20;
/// Number of files that a stream changes in place.
const FILES: u64 = 3;
/// Length of each record at the end of the log, in bytes.
const RECORD_BYTES: usize = 3_000;

/// One step: it changes these bytes of this file, and they are durable when it is acknowledged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The file's name; empty on a bare device.
    pub file: String,
    pub at: usize,
    pub bytes: usize,
}

/// A pseudo-random function of `n` (splitmix64).
fn scatter(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// The byte that step `n` of `stream` stores at offset `at`. It is never 0.
pub fn byte(stream: u64, n: u64, at: usize) -> u8 {
    (scatter(stream << 56 | n << 24 | (at as u64 >> 3)) >> (8 * (at & 7))) as u8 | 1
}

/// Step `n` of `stream`, in a directory or on a bare device.
pub fn step(stream: u64, n: u64, raw: bool) -> Step {
    let random = scatter(stream << 32 | n);
    let (mapped, file) = (stream != WRITES, random % FILES);
    let bytes = match n % 16 {
        15 => 2_200_000,
        4 | 9 => 100,
        2 | 7 | 12 => 10_000,
        5 => 70_000,
        _ => 4096,
    };
    let odd = (random >> 8) as usize;
    if raw {
        let at = odd % (RAW_BYTES - bytes);
        return Step { file: String::new(), at: stream as usize * RAW_BYTES + at, bytes };
    }
    if mapped {
        let at = odd % (MAPPED_BYTES - bytes);
        return Step { file: format!("mapped-{file}"), at, bytes };
    }
    match n % 8 {
        3 => Step { file: format!("new-{n}"), at: 0, bytes },
        6 => {
            let at = n as usize / 8 * RECORD_BYTES;
            Step { file: "log".into(), at, bytes: RECORD_BYTES }
        }
        _ => Step { file: format!("written-{file}"), at: odd % 100_000, bytes },
    }
}
