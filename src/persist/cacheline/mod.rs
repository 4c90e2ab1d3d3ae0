// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cache lines: the instructions that write them back, and copies whose lines are written back at
//! once. Knows no file.
//!
//! Lines are written back by the first of these instructions that the processor has: CLWB,
//! CLFLUSHOPT, CLFLUSH on x86-64; DC CVAP, DC CVAC on aarch64. No line is durable before a
//! [`fence`].

#![allow(unsafe_code)] // Inline assembly, intrinsics, and stores by raw pointers.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fmt;

#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

pub use arch::{Instruction, fence};

/// The first address of each cache line that holds a byte of the range of `bytes` bytes from `from`
/// on. `line_bytes`, the length of a line, is a power of two.
#[inline(always)]
fn lines(from: *const u8, bytes: usize, line_bytes: usize) -> impl Iterator<Item = *const u8> {
    let skipped = from.addr() & (line_bytes - 1);
    let covered = if bytes == 0 { 0 } else { skipped + bytes };
    (0..covered).step_by(line_bytes).map(move |at| from.wrapping_sub(skipped).wrapping_add(at))
}

impl Instruction {
    /// The first instruction of [`ALL`](Self::ALL) that this processor has. None if it has none.
    pub fn best() -> Option<Self> {
        Self::ALL.into_iter().find(|instruction| instruction.is_here())
    }

    /// Copies `bytes` bytes, and writes back the lines of the copy.
    ///
    /// # Safety
    /// As [`copy`](Self::copy).
    unsafe fn copy_and_write_back(self, to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the caller guarantees it; the written-back range is the range stored to.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, bytes);
            self.write_back(to, bytes);
        }
    }

    /// Zeroes `bytes` bytes, and writes their lines back: after the next [`fence`] of this thread
    /// the zeros are in memory.
    ///
    /// # Safety
    /// The processor has the instruction, and `to` is writable for `bytes` bytes.
    pub unsafe fn zero(self, to: *mut u8, bytes: usize) {
        // SAFETY: the caller guarantees it; the written-back range is the range stored to.
        unsafe {
            std::ptr::write_bytes(to, 0, bytes);
            self.write_back(to, bytes);
        }
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// The instructions that this processor has. Each missing one is reported on stderr as skipped.
    fn all_here() -> Vec<Instruction> {
        let (here, missing): (Vec<_>, Vec<_>) =
            Instruction::ALL.into_iter().partition(|instruction| instruction.is_here());
        for instruction in missing {
            // Not println!: the test runner captures its output.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED {instruction}: this processor does not have it"
            );
        }
        assert_eq!(here.first().copied(), Instruction::best());
        here
    }

    /// Shows: lines() returns each line that holds a byte of the range, once, in ascending order.
    #[test]
    fn the_lines_of_a_range() {
        for line in [16, 64, 128] {
            for (skipped, bytes) in (0..300).flat_map(|n| [0, 1, line - 1].map(|skip| (skip, n))) {
                let from = std::ptr::without_provenance(4096 + skipped);
                let found: Vec<_> = lines(from, bytes, line).map(<*const u8>::addr).collect();
                let holds = |at: &usize| at + line > 4096 + skipped && bytes > 0;
                let end = 4096 + skipped + bytes;
                let expected: Vec<_> = (4096..end).step_by(line).filter(holds).collect();
                assert_eq!(found, expected, "{bytes} bytes from {skipped} on, lines of {line}");
            }
        }
    }

    /// Shows: each instruction writes back ranges of any alignment and length, and changes no byte.
    #[test]
    fn each_instruction_writes_back_and_changes_nothing() {
        let byte = |at: usize| (at % 251) as u8;
        let memory: Vec<u8> = (0..64 * 1024).map(byte).collect();
        for instruction in all_here() {
            for (from, bytes) in [(0, 0), (0, 1), (63, 2), (1, 64), (8, 4096), (0, 64 * 1024)] {
                // SAFETY: the range is inside `memory`, and the processor has the instruction.
                unsafe { instruction.write_back(memory[from..].as_ptr(), bytes) };
            }
            fence();
            assert!(memory.iter().enumerate().all(|(at, found)| *found == byte(at)));
        }
    }

    /// Shows: each instruction's copies and zeros change exactly their range, at any alignment and
    /// length.
    #[test]
    fn copies_and_zeros_are_exact() {
        let source: Vec<u8> = (0..16_384).map(|at| (at % 253 + 1) as u8).collect();
        for instruction in all_here() {
            for (to, from, bytes) in (0..500).map(|n| (n * 13 % 130, n * 7 % 66, n * 37 % 8_000)) {
                let mut memory = vec![0xff_u8; 8_192];
                // SAFETY: both ranges are inside their vectors.
                unsafe {
                    instruction.copy(memory[to..].as_mut_ptr(), &raw const source[from], bytes)
                };
                fence();
                assert_eq!(memory[to..to + bytes], source[from..from + bytes], "{to} {bytes}");
                // SAFETY: the range of the copy.
                unsafe { instruction.zero(memory[to..].as_mut_ptr(), bytes) };
                fence();
                let expected = |at: usize| if (to..to + bytes).contains(&at) { 0 } else { 0xff };
                assert!(memory.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
            }
        }
    }
}
