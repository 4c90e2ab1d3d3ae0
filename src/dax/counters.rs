// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the engine's counters. Their atomics are relaxed: no thread orders memory by them.

use crate::support::counter::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one engine.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub(super) $name: Counter,)* }

        /// The values of [`Counters`] at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Reads all counters.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Number of grants that succeeded.
    grants,
    /// Number of grants that were refused or failed.
    grants_failed,
    /// Number of 2 MiB entries that were granted.
    pmd,
    /// Number of 4 KiB entries that were granted.
    pte,
    /// Number of chunks without a PMD because the grant covers only a part of the chunk.
    fallback_partial,
    /// Number of chunks without a PMD because the file ends in the chunk.
    fallback_eof,
    /// Number of chunks without a PMD because file offset and window offset differ modulo 2 MiB.
    fallback_window,
    /// Number of chunks without a PMD because the backing can't be mapped by 2 MiB.
    fallback_backing,
    /// Number of chunks without a PMD because the chunk had PTE entries already.
    fallback_pte,
    /// Number of chunks without a PMD because the chunk has several extents, or blocks that are not
    /// aligned to 2 MiB.
    fallback_extent,
    /// Number of entries that became a hole.
    holes,
    /// Number of write grants that allocated blocks.
    allocations,
    /// Number of PMD entries that were split.
    splits,
    /// Number of entries that were written back.
    flushes,
    /// Number of fences, one behind each batch of written-back entries.
    fences,
    /// Number of syncs of a whole file.
    syncs,
    /// Number of bytes that were written back entry by entry.
    bytes_written_back,
    /// Number of times that a thread waited for a locked entry.
    waits,
}
