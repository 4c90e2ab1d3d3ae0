// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cache lines on aarch64: DC CVAP and DC CVAC.

use std::arch::{asm, is_aarch64_feature_detected};

use super::lines;

/// An instruction that writes a cache line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// To the point of persistence (FEAT_DPB).
    Cvap,
    /// To the point of coherency.
    Cvac,
}

impl Instruction {
    /// From the best to the worst.
    pub const ALL: [Self; 2] = [Self::Cvap, Self::Cvac];

    /// Whether this processor has it.
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

    /// Starts to write back all lines that hold a byte of the range. They are in memory after the
    /// next [`fence`] of this thread.
    ///
    /// # Safety
    /// The processor has the instruction, and all of the range is mapped readable.
    pub unsafe fn write_back(self, from: *const u8, bytes: usize) {
        let lines = lines(from, bytes, line_bytes());
        match self {
            // SAFETY (both): each line holds a byte of the range. DC CVAP by its encoding:
            // assemblers want FEAT_DPB for the name.
            Self::Cvap => lines.for_each(|at| unsafe {
                asm!("sys #3, c7, c12, #1, {}", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Cvac => lines.for_each(|at| unsafe {
                asm!("dc cvac, {}", in(reg) at, options(nostack, preserves_flags));
            }),
        }
    }

    /// Copies, and writes the lines back: after the next [`fence`] of this thread the copy is in
    /// memory. (There is no store that is sure to bypass the cache.)
    ///
    /// # Safety
    /// The processor has the instruction. `from` is readable and `to` is writable for `bytes`, and
    /// they do not overlap. Others may change the bytes of both meanwhile (they are guest memory):
    /// what is copied then is any mixture.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the caller's.
        unsafe { self.copy_and_write_back(to, from, bytes) }
    }
}

/// The length of the smallest line: CTR_EL0.DminLine is log2 of its words. Linux lets user mode
/// read that register.
fn line_bytes() -> usize {
    let ctr: u64;
    // SAFETY: reads a register.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) }
    4 << (ctr >> 16 & 0xf)
}

/// Returns once all lines that this thread has written back are in memory.
pub fn fence() {
    // SAFETY: a barrier, for all of the system. No `nomem`: stores stay where they are.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) }
}
