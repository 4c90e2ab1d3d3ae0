// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Cache lines: the instructions that write them back, and stores that go past the cache. Knows no
//! file.
//!
//! All that depends on the processor is here. Lines are written back by the first of these that the
//! processor has: CLWB, CLFLUSHOPT, CLFLUSH on x86-64; DC CVAP, DC CVAC on aarch64. Nothing is
//! durable before a [`fence`].

#![allow(unsafe_code)] // Instructions, and stores by raw pointer: what each needs is said there.

use std::fmt;

#[cfg(target_arch = "aarch64")]
use aarch64 as arch;
#[cfg(target_arch = "x86_64")]
use x86_64 as arch;

pub use arch::{Instruction, fence};

/// Below this many bytes, stores and a write-back of their lines cost less than stores past the
/// cache.
const SHORT_BYTES: usize = 256;

/// The length of a line, always a power of two.
#[derive(Clone, Copy)]
struct LineBytes(u32);

impl LineBytes {
    fn here() -> Self {
        Self(arch::line_bytes_log2())
    }

    fn bytes(self) -> usize {
        1 << self.0
    }

    /// What is over after whole lines.
    fn of_end(self, n: usize) -> usize {
        n & (self.bytes() - 1)
    }

    /// How many whole lines.
    fn whole(self, n: usize) -> usize {
        n >> self.0
    }
}

impl Instruction {
    /// The best that this processor has. None on one that can't write back a line from user mode.
    pub fn best() -> Option<Self> {
        Self::ALL.into_iter().find(|instruction| instruction.is_here())
    }

    /// Starts to write back all lines that hold a byte of the range: exactly those, each once. They
    /// are in memory after the next [`fence`] of this thread. Returns how many.
    ///
    /// # Safety
    /// The processor has the instruction, and all of the range is mapped readable.
    #[inline(always)]
    pub unsafe fn write_back(self, from: *const u8, bytes: usize) -> usize {
        if bytes == 0 {
            return 0;
        }
        let line = LineBytes::here();
        // SAFETY: each line holds a byte of the range, which the caller vouches for.
        unsafe { self.write_back_lines(from, bytes, line.bytes()) };
        line.whole(line.of_end(from.addr()) + bytes + line.bytes() - 1)
    }

    /// Copies past the cache, or copies and writes the lines back: after the next [`fence`] of this
    /// thread the copy is in memory.
    ///
    /// # Safety
    /// `from` is readable and `to` is writable for `bytes`, and they do not overlap. Others may
    /// change the bytes of both meanwhile (they are guest memory): what is copied then is any
    /// mixture.
    pub unsafe fn copy(self, to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: as the caller says. The pieces make up the range.
        unsafe {
            self.by_lines(to, bytes, |to, done, bytes, whole| {
                let from = from.add(done);
                if whole {
                    arch::stream(to, from, bytes);
                } else {
                    std::ptr::copy_nonoverlapping(from, to, bytes);
                }
            });
        }
    }

    /// Clears past the cache, like [`copy`](Self::copy).
    ///
    /// # Safety
    /// `to` is writable for `bytes`.
    pub unsafe fn zero(self, to: *mut u8, bytes: usize) {
        // SAFETY: as the caller says.
        unsafe {
            self.by_lines(to, bytes, |to, _, bytes, whole| {
                if whole {
                    arch::stream_zeros(to, bytes);
                } else {
                    std::ptr::write_bytes(to, 0, bytes);
                }
            });
        }
    }

    /// Calls `store` with a pointer, how far it is from `to`, a length, and whether these are whole
    /// lines: for what comes before the first whole line, the whole lines, and the rest. What are
    /// no whole lines is written back.
    ///
    /// # Safety
    /// See [`copy`](Self::copy).
    unsafe fn by_lines(
        self,
        to: *mut u8,
        bytes: usize,
        mut store: impl FnMut(*mut u8, usize, usize, bool),
    ) {
        let line = LineBytes::here();
        let head = if bytes < SHORT_BYTES { bytes } else { line.of_end(to.addr().wrapping_neg()) };
        let body = (bytes - head) - line.of_end(bytes - head);
        let pieces =
            [(0, head, false), (head, body, true), (head + body, bytes - head - body, false)];
        for (done, bytes, whole) in pieces {
            if bytes == 0 {
                continue;
            }
            // SAFETY: the pieces make up the range.
            let to = unsafe { to.add(done) };
            store(to, done, bytes, whole);
            if !whole {
                // SAFETY: the same range, which is mapped: it was just stored to.
                unsafe { self.write_back(to, bytes) };
            }
        }
    }
}

impl fmt::Display for Instruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    use std::arch::x86_64::{
        __cpuid, __cpuid_count, __m256i, _MM_HINT_NTA, _mm_clflush, _mm_loadu_si128, _mm_prefetch,
        _mm_setzero_si128, _mm_sfence, _mm_stream_si128, _mm256_loadu_si256, _mm256_stream_si256,
    };
    use std::sync::LazyLock;

    use crate::support::units::PAGE_BYTES;

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

    /// log2 of a line's bytes: the same on each processor so far. One that says otherwise has no
    /// instruction for us.
    const LINE_BYTES_LOG2: u32 = 6;

    struct Processor {
        leaf_7_ebx: u32,
        leaf_1_edx: u32,
        /// What CLFLUSH writes back.
        line_bytes: u32,
        avx: bool,
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
            avx: is_x86_feature_detected!("avx"),
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
            bit != 0 && PROCESSOR.line_bytes == 1 << LINE_BYTES_LOG2
        }

        pub(super) fn name(self) -> &'static str {
            match self {
                Self::Clwb => "CLWB",
                Self::Clflushopt => "CLFLUSHOPT",
                Self::Clflush => "CLFLUSH",
            }
        }

        /// # Safety
        /// The processor has it, and the range is mapped. It is not empty.
        #[inline(always)]
        pub(super) unsafe fn write_back_lines(self, from: *const u8, bytes: usize, line: usize) {
            // SAFETY (all): the caller's. No instruction changes a byte or a register, and the
            // compiler may not move stores behind them: no `nomem`.
            match self {
                Self::Clwb => each_line(from, bytes, line, |at| unsafe {
                    asm!("clwb [{}]", in(reg) at, options(nostack, preserves_flags));
                }),
                Self::Clflushopt => each_line(from, bytes, line, |at| unsafe {
                    asm!("clflushopt [{}]", in(reg) at, options(nostack, preserves_flags));
                }),
                Self::Clflush => each_line(from, bytes, line, |at| unsafe { _mm_clflush(at) }),
            }
        }
    }

    /// Each takes every fourth line.
    const PASSES: usize = 4;

    /// Calls `write_back` with each line that holds a byte of the range, which is not empty, once.
    #[inline(always)]
    pub(super) fn each_line(
        from: *const u8,
        bytes: usize,
        line: usize,
        write_back: impl Fn(*const u8),
    ) {
        let mut at = from.map_addr(|from| from & !(line - 1));
        let end = from.wrapping_add(bytes);
        if bytes <= PAGE_BYTES as usize {
            return each(at, end, line, write_back);
        }
        // Two pages at a time, in passes: clean lines take 2 % less time than one after the other.
        while at < end {
            let to = end.min(at.wrapping_add(2 * PAGE_BYTES as usize));
            for pass in 0..PASSES {
                let first = at.wrapping_add(pass * line);
                if first < to {
                    each(first, to, PASSES * line, &write_back);
                }
            }
            at = to;
        }
    }

    /// At least with `at`.
    #[inline(always)]
    fn each(mut at: *const u8, end: *const u8, apart: usize, write_back: impl Fn(*const u8)) {
        loop {
            write_back(at);
            at = at.wrapping_add(apart);
            if at >= end {
                break;
            }
        }
    }

    /// Returns once all lines that this thread has written back, and all it has stored past the
    /// cache, are in memory (or in what survives a power loss with it: the platform's ADR).
    pub fn fence() {
        // SAFETY: SFENCE is there on each x86-64 processor.
        unsafe { _mm_sfence() }
    }

    pub(super) const fn line_bytes_log2() -> u32 {
        LINE_BYTES_LOG2
    }

    /// # Safety
    /// As `copy_nonoverlapping`; `to` and `bytes` are whole lines.
    pub(super) unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
        if PROCESSOR.avx {
            // SAFETY: AVX is there; the rest is the caller's.
            return unsafe { stream_avx(to, from, bytes) };
        }
        for at in (0..bytes).step_by(16) {
            // SAFETY: inside the range, and `to` is aligned to lines, so to 16.
            unsafe { _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
        }
    }

    /// How far ahead of the copy its source is fetched, in vectors of 32 bytes: 2 KiB. (A copy of
    /// 256 MiB gains 8 %; 512 bytes to 16 KiB make little difference.)
    const AHEAD: usize = 64;

    #[target_feature(enable = "avx")]
    unsafe fn stream_avx(to: *mut u8, from: *const u8, bytes: usize) {
        let (to, from) = (to.cast::<__m256i>(), from.cast::<__m256i>());
        let vectors = bytes / 32;
        let mut at = 0;
        // Four lines of loads, then as many of stores: the memory is busy with one or the other.
        while at + 8 <= vectors {
            // SAFETY: inside the range, and `to` is aligned to lines, so to 32. A prefetch may be
            // of anything.
            unsafe {
                for line in 0..4 {
                    let ahead = from.wrapping_add(at + AHEAD + 2 * line);
                    _mm_prefetch::<_MM_HINT_NTA>(ahead.cast());
                }
                let lines: [__m256i; 8] =
                    std::array::from_fn(|i| _mm256_loadu_si256(from.add(at + i)));
                for (i, vector) in lines.into_iter().enumerate() {
                    _mm256_stream_si256(to.add(at + i), vector);
                }
            }
            at += 8;
        }
        while at < vectors {
            // SAFETY: the same.
            unsafe { _mm256_stream_si256(to.add(at), _mm256_loadu_si256(from.add(at))) };
            at += 1;
        }
    }

    /// # Safety
    /// `to` is writable; it and `bytes` are whole lines.
    pub(super) unsafe fn stream_zeros(to: *mut u8, bytes: usize) {
        for at in (0..bytes).step_by(16) {
            // SAFETY: inside the range, and aligned to 16.
            unsafe { _mm_stream_si128(to.add(at).cast(), _mm_setzero_si128()) };
        }
    }
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::asm;

    /// An instruction that writes a cache line back.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub enum Instruction {
        /// To the point of persistence (FEAT_DPB).
        Cvap,
        /// To the point of coherency.
        Cvac,
    }

    /// AT_HWCAP bit 16: DC CVAP may be used in user mode.
    const HWCAP_DCPOP: u64 = 1 << 16;

    impl Instruction {
        /// From the best to the worst.
        pub const ALL: [Self; 2] = [Self::Cvap, Self::Cvac];

        /// Whether this processor has it.
        pub fn is_here(self) -> bool {
            match self {
                // SAFETY: getauxval() has no conditions.
                Self::Cvap => (unsafe { libc::getauxval(libc::AT_HWCAP) }) & HWCAP_DCPOP != 0,
                Self::Cvac => true,
            }
        }

        pub(super) fn name(self) -> &'static str {
            match self {
                Self::Cvap => "DC CVAP",
                Self::Cvac => "DC CVAC",
            }
        }

        /// # Safety
        /// The processor has it, and the range is mapped. It is not empty.
        pub(super) unsafe fn write_back_lines(self, from: *const u8, bytes: usize, line: usize) {
            let skipped = from.addr() & (line - 1);
            let addresses = (0..skipped + bytes)
                .step_by(line)
                .map(|at| from.wrapping_add(at).wrapping_sub(skipped));
            match self {
                // SAFETY (both): the caller's. DC CVAP by its encoding: assemblers want FEAT_DPB
                // for the name.
                Self::Cvap => addresses.for_each(|at| unsafe {
                    asm!("sys #3, c7, c12, #1, {}", in(reg) at, options(nostack, preserves_flags));
                }),
                Self::Cvac => addresses.for_each(|at| unsafe {
                    asm!("dc cvac, {}", in(reg) at, options(nostack, preserves_flags));
                }),
            }
        }
    }

    /// Returns once all lines that this thread has written back are in memory.
    pub fn fence() {
        // SAFETY: a barrier, for all of the system. No `nomem`: stores stay where they are.
        unsafe { asm!("dsb sy", options(nostack, preserves_flags)) }
    }

    /// CTR_EL0.DminLine: log2 of the words in the smallest line; Linux lets user mode read it.
    pub(super) fn line_bytes_log2() -> u32 {
        let ctr: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) }
        2 + (ctr >> 16 & 0xf) as u32
    }

    /// There is no store past the cache that is sure to be one: a copy, and its lines written back.
    ///
    /// # Safety
    /// As `copy_nonoverlapping`; `to` and `bytes` are whole lines.
    pub(super) unsafe fn stream(to: *mut u8, from: *const u8, bytes: usize) {
        // SAFETY: the caller's.
        unsafe {
            std::ptr::copy_nonoverlapping(from, to, bytes);
            written_back(to, bytes);
        }
    }

    /// # Safety
    /// `to` is writable; it and `bytes` are whole lines.
    pub(super) unsafe fn stream_zeros(to: *mut u8, bytes: usize) {
        // SAFETY: the caller's.
        unsafe {
            std::ptr::write_bytes(to, 0, bytes);
            written_back(to, bytes);
        }
    }

    unsafe fn written_back(to: *const u8, bytes: usize) {
        // One of the two is always there.
        let best = if Instruction::Cvap.is_here() { Instruction::Cvap } else { Instruction::Cvac };
        // SAFETY: just stored to.
        unsafe { best.write_back_lines(to, bytes, 1 << line_bytes_log2()) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// What this processor lacks can't be forced on it, and must not pass for tested.
    fn all_here() -> Vec<Instruction> {
        let (here, missing): (Vec<_>, Vec<_>) =
            Instruction::ALL.into_iter().partition(|instruction| instruction.is_here());
        for instruction in missing {
            // Not println!: the test runner would swallow it.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED {instruction}: this processor does not have it"
            );
        }
        assert_eq!(here.first().copied(), Instruction::best());
        here
    }

    /// Shows: each instruction, forced: it takes exactly the lines that hold a byte of the range,
    /// and changes no byte.
    #[test]
    fn each_instruction_writes_back_exactly_the_lines() {
        let line = LineBytes::here().bytes();
        let memory: Vec<u8> = (0..64 * 1024).map(|at| (at % 251) as u8).collect();
        let start = memory.as_ptr().addr().wrapping_neg() % line;
        for instruction in all_here() {
            for (from, bytes, lines) in [
                (0, 0, 0),
                (0, 1, 1),
                (line - 1, 1, 1),
                (line - 1, 2, 2),
                (0, line, 1),
                (0, line + 1, 2),
                (1, line, 2),
                (0, 4096, 4096 / line),
                (8, 4096, 4096 / line + 1),
                (0, 32 * 1024, 32 * 1024 / line),
            ] {
                let at = &raw const memory[start + from];
                // SAFETY: inside `memory`, and the instruction is here.
                let taken = unsafe { instruction.write_back(at, bytes) };
                assert_eq!(taken, lines, "{instruction} of {bytes} bytes at {from}");
            }
            fence();
            assert!(memory.iter().enumerate().all(|(at, byte)| *byte == (at % 251) as u8));
        }
    }

    /// Shows: in whatever order lines are written back, it is each of them, once.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn each_line_is_taken_once() {
        for (skipped, bytes) in (0..400).flat_map(|lines| {
            [0, 1, 63]
                .map(|skipped| (skipped, 64 * lines + 1))
                .into_iter()
                .chain([(0, 64 * (lines + 1))])
        }) {
            let taken = std::cell::RefCell::new(Vec::new());
            let line = |at: *const u8| taken.borrow_mut().push(at.addr());
            let from = 4096 + skipped;
            x86_64::each_line(std::ptr::without_provenance(from), bytes, 64, line);
            let mut taken = taken.into_inner();
            taken.sort_unstable();
            let expected: Vec<_> = (4096..from + bytes).step_by(64).collect();
            assert!(taken == expected, "{bytes} bytes from {from} on");
        }
    }

    /// Shows: each instruction's copies and zeros land where they belong, at odd places and of odd
    /// lengths, and nothing beside.
    #[test]
    fn stores_past_the_cache_are_exact() {
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
                // SAFETY: the same range.
                unsafe { instruction.zero(memory[to..].as_mut_ptr(), bytes) };
                fence();
                let expected = |at: usize| if (to..to + bytes).contains(&at) { 0 } else { 0xff };
                assert!(memory.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
            }
        }
    }
}
