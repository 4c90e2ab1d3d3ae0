// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cache lines on x86-64: CLWB, CLFLUSHOPT, CLFLUSH, and stores that bypass the cache.

use std::arch::asm;
use std::arch::x86_64::{
    __cpuid, __cpuid_count, __m128i, _mm_clflush, _mm_loadu_si128, _mm_sfence, _mm_stream_si128,
};
use std::sync::LazyLock;

use super::lines;

/// An instruction that writes a cache line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instruction {
    /// Writes back and may keep the line. Ordered by [`fence`] only.
    Clwb,
    /// Writes back and drops the line. Ordered by [`fence`] only.
    Clflushopt,
    /// Writes back and drops the line, one after the other.
    Clflush,
}

/// CPUID leaf 7, EBX.
const CLFLUSHOPT_BIT: u32 = 1 << 23;
const CLWB_BIT: u32 = 1 << 24;
/// CPUID leaf 1, EDX.
const CLFSH_BIT: u32 = 1 << 19;

/// The same on each processor so far. One that says otherwise has no instruction for us.
const LINE_BYTES: usize = 64;

/// Below this many bytes, stores and a write-back of their lines cost less than stores that bypass
/// the cache.
const SHORT_BYTES: usize = 256;

struct Processor {
    leaf_7_ebx: u32,
    leaf_1_edx: u32,
    /// What CLFLUSH writes back.
    line_bytes: u32,
}

#[allow(unused_unsafe)] // CPUID is there on each x86-64; older compilers want it said.
static PROCESSOR: LazyLock<Processor> = LazyLock::new(|| {
    // SAFETY (all three): see above.
    let leaf_1 = unsafe { __cpuid(1) };
    let leaves = unsafe { __cpuid(0) }.eax;
    Processor {
        leaf_7_ebx: if leaves < 7 { 0 } else { unsafe { __cpuid_count(7, 0) }.ebx },
        leaf_1_edx: leaf_1.edx,
        // EBX bits 15 to 8, in units of 8 bytes.
        line_bytes: (leaf_1.ebx >> 8 & 0xff) * 8,
    }
});

impl Instruction {
    /// From the best to the worst.
    pub const ALL: [Self; 3] = [Self::Clwb, Self::Clflushopt, Self::Clflush];

    /// Whether this processor has it.
    pub fn is_here(self) -> bool {
        let bit = match self {
            Self::Clwb => PROCESSOR.leaf_7_ebx & CLWB_BIT,
            Self::Clflushopt => PROCESSOR.leaf_7_ebx & CLFLUSHOPT_BIT,
            Self::Clflush => PROCESSOR.leaf_1_edx & CLFSH_BIT,
        };
        bit != 0 && PROCESSOR.line_bytes as usize == LINE_BYTES
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Clwb => "CLWB",
            Self::Clflushopt => "CLFLUSHOPT",
            Self::Clflush => "CLFLUSH",
        }
    }

    /// Starts to write back all lines that hold a byte of the range. They are in memory after the
    /// next [`fence`] of this thread.
    ///
    /// # Safety
    /// The processor has the instruction, and all of the range is mapped readable.
    pub unsafe fn write_back(self, from: *const u8, bytes: usize) {
        let lines = lines(from, bytes, LINE_BYTES);
        match self {
            // SAFETY (all): each line holds a byte of the range. No instruction changes a byte or a
            // register, and the compiler may not move stores behind them: no `nomem`.
            Self::Clwb => lines.for_each(|at| unsafe {
                asm!("clwb [{}]", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Clflushopt => lines.for_each(|at| unsafe {
                asm!("clflushopt [{}]", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Clflush => lines.for_each(|at| unsafe { _mm_clflush(at) }),
        }
    }

    /// Copies past the cache, or copies and writes the lines back: after the next [`fence`] of this
    /// thread the copy is in memory.
    ///
    /// # Safety
    /// The processor has the instruction. `from` is readable and `to` is writable for `bytes`, and
    /// they do not overlap. Others may change the bytes of both meanwhile (they are guest memory):
    /// what is copied then is any mixture.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize) {
        let head = if bytes < SHORT_BYTES { bytes } else { to.align_offset(LINE_BYTES) };
        let body = (bytes - head) & !(LINE_BYTES - 1);
        // SAFETY: the three pieces make up the range, and `body` begins at a line.
        unsafe {
            self.copy_and_write_back(to, from, head);
            stream(to.add(head), from.add(head), body);
            let (done, tail) = (head + body, bytes - head - body);
            self.copy_and_write_back(to.add(done), from.add(done), tail);
        }
    }
}

/// Copies by stores that bypass the cache, line by line: one line is filled at once, or a large
/// copy takes half as long again.
///
/// # Safety
/// As `copy_nonoverlapping`; `to` and `bytes` are multiples of 64.
unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE_BYTES) {
        // SAFETY: inside the range, and `to` is aligned to 16.
        unsafe {
            let (to, from) = (to.add(at).cast::<__m128i>(), from.add(at).cast::<__m128i>());
            let line: [__m128i; 4] = std::array::from_fn(|n| _mm_loadu_si128(from.add(n)));
            for (n, vector) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(n), vector);
            }
        }
    }
}

/// Returns once all lines that this thread has written back, and all it has stored past the cache,
/// are in memory (or in what survives a power loss with it: the platform's ADR).
pub fn fence() {
    // SAFETY: SFENCE is there on each x86-64 processor.
    unsafe { _mm_sfence() }
}
