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
    /// Writes the line back, and may keep it in the cache. Ordered by [`fence`] only.
    Clwb,
    /// Writes the line back, and drops it from the cache. Ordered by [`fence`] only.
    Clflushopt,
    /// Writes the line back, and drops it from the cache. Executed one at a time, in program order.
    Clflush,
}

/// CPUID leaf 7, EBX: the processor has CLFLUSHOPT.
const CLFLUSHOPT_BIT: u32 = 1 << 23;
/// CPUID leaf 7, EBX: the processor has CLWB.
const CLWB_BIT: u32 = 1 << 24;
/// CPUID leaf 1, EDX: the processor has CLFLUSH.
const CLFSH_BIT: u32 = 1 << 19;

/// The length of a cache line in bytes, on all x86-64 processors so far. On a processor whose CPUID
/// reports another length no instruction is used.
const LINE_BYTES: usize = 64;

/// A copy of fewer bytes is done by ordinary stores and a write-back of their lines, which takes
/// less time than stores that bypass the cache.
const SHORT_BYTES: usize = 256;

struct Processor {
    leaf_7_ebx: u32,
    leaf_1_edx: u32,
    /// The length in bytes of the line that CLFLUSH writes back.
    line_bytes: u32,
}

#[allow(unused_unsafe)] // __cpuid is an unsafe function in older versions of Rust only.
static PROCESSOR: LazyLock<Processor> = LazyLock::new(|| {
    // SAFETY (all three): each x86-64 processor has CPUID.
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
    /// All instructions, in order of preference.
    pub const ALL: [Self; 3] = [Self::Clwb, Self::Clflushopt, Self::Clflush];

    /// Whether this processor has the instruction.
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

    /// Starts to write back each line that holds a byte of the range of `bytes` bytes from `from`
    /// on. The lines are in memory after the next [`fence`] of this thread.
    ///
    /// # Safety
    /// The processor has the instruction, and the whole range is mapped and readable.
    pub unsafe fn write_back(self, from: *const u8, bytes: usize) {
        let lines = lines(from, bytes, LINE_BYTES);
        match self {
            // SAFETY (all): each line holds a byte of the mapped range. No instruction changes a
            // byte or a register. Without `nomem` the compiler moves no store past them.
            Self::Clwb => lines.for_each(|at| unsafe {
                asm!("clwb [{}]", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Clflushopt => lines.for_each(|at| unsafe {
                asm!("clflushopt [{}]", in(reg) at, options(nostack, preserves_flags));
            }),
            Self::Clflush => lines.for_each(|at| unsafe { _mm_clflush(at) }),
        }
    }

    /// Copies `bytes` bytes past the cache, or copies them and writes their lines back. After the
    /// next [`fence`] of this thread the copy is in memory.
    ///
    /// # Safety
    /// The processor has the instruction. `from` is readable and `to` is writable for `bytes`
    /// bytes, and the two ranges do not overlap. The guest may change the bytes of both meanwhile:
    /// the copy is then a mixture of old and new bytes.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize) {
        let head = if bytes < SHORT_BYTES { bytes } else { to.align_offset(LINE_BYTES) };
        let body = (bytes - head) & !(LINE_BYTES - 1);
        // SAFETY: the three parts make up the range, and the part of `body` bytes begins at a line.
        unsafe {
            self.copy_and_write_back(to, from, head);
            stream(to.add(head), from.add(head), body);
            let (done, tail) = (head + body, bytes - head - body);
            self.copy_and_write_back(to.add(done), from.add(done), tail);
        }
    }
}

/// Copies by stores that bypass the cache, one whole line at a time: four loads, then four stores.
/// A large copy in another order takes half as long again.
///
/// # Safety
/// As `copy_nonoverlapping`; `to` and `bytes` are multiples of 64.
unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE_BYTES) {
        // SAFETY: the line is inside both ranges, and `to` is aligned to 16 bytes.
        unsafe {
            let (to, from) = (to.add(at).cast::<__m128i>(), from.add(at).cast::<__m128i>());
            let line: [__m128i; 4] = std::array::from_fn(|n| _mm_loadu_si128(from.add(n)));
            for (n, vector) in line.into_iter().enumerate() {
                _mm_stream_si128(to.add(n), vector);
            }
        }
    }
}

/// Returns once all lines that this thread has written back, and all its stores past the cache, are
/// in memory, or in a write queue that survives a power loss (ADR, asynchronous DRAM refresh).
pub fn fence() {
    // SAFETY: each x86-64 processor has SFENCE.
    unsafe { _mm_sfence() }
}
