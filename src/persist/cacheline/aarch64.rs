// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cache lines on aarch64: DC CVAP and DC CVAC.

use std::arch::{asm, is_aarch64_feature_detected};

use super::lines;

/// An instruction that writes a cache line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// DC CVAP: writes the line back to the point of persistence (FEAT_DPB).
    Cvap,
    /// DC CVAC: writes the line back to the point of coherency.
    Cvac,
}

impl Instruction {
    /// All instructions, in order of preference.
    pub const ALL: [Self; 2] = [Self::Cvap, Self::Cvac];

    /// Whether this processor has the instruction.
    pub fn is_here(self) -> bool {
        match self {
            Self::Cvap => is_aarch64_feature_detected!("dpb"),
            Self::Cvac => true,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cvap => "DC CVAP",
            Self::Cvac => "DC CVAC",
        }
    }

    /// Starts to write back each line that holds a byte of the range of `bytes` bytes from `from`
    /// on. The lines are in memory after the next [`fence`] of this thread.
    ///
    /// # Safety
    /// The processor has the instruction, and the whole range is mapped and readable.
    pub unsafe fn write_back(self, from: *const u8, bytes: usize) {
        let lines = lines(from, bytes, line_bytes());
        match self {
            // SAFETY (both): each line holds a byte of the mapped range. DC CVAP is written by its
            // encoding: the assembler accepts its name only with FEAT_DPB enabled.
            Self::Cvap => lines.for_each(|at| unsafe {
                asm!("sys #3, c7, c12, #1, {}", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Cvac => lines.for_each(|at| unsafe {
                asm!("dc cvac, {}", in(reg) at, options(nostack, preserves_flags));
            }),
        }
    }

    /// Copies `bytes` bytes, and writes their lines back. After the next [`fence`] of this thread
    /// the copy is in memory. (aarch64 has no store that is guaranteed to bypass the cache.)
    ///
    /// # Safety
    /// The processor has the instruction. `from` is readable and `to` is writable for `bytes`
    /// bytes, and the two ranges do not overlap. The guest may change the bytes of both meanwhile:
    /// the copy is then a mixture of old and new bytes.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the caller guarantees it.
        unsafe { self.copy_and_write_back(to, from, bytes) }
    }
}

/// The length in bytes of the smallest data cache line: CTR_EL0.DminLine is log2 of its number of
/// 4-byte words. Linux lets user mode read that register.
fn line_bytes() -> usize {
    let ctr: u64;
    // SAFETY: the instruction only reads a register.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) }
    4 << (ctr >> 16 & 0xf)
}

/// Returns once all lines that this thread has written back are in memory.
pub fn fence() {
    // SAFETY: a barrier of the whole system. Without `nomem` the compiler moves no store past it.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) }
}
