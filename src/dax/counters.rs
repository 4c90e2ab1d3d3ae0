// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: what the engine has done, in numbers. They order nothing.

use crate::support::counter::Counter;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Counters of one engine.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub(super) $name: Counter,)* }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct Snapshot { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// Reads all of them.
            pub fn snapshot(&self) -> Snapshot {
                Snapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Grants that succeeded.
    grants,
    /// Grants that were refused or failed.
    grants_failed,
    /// 2 MiB entries granted.
    pmd,
    /// 4 KiB entries granted.
    pte,
    /// Chunks that got no PMD: the grant holds only a part of them.
    fallback_partial,
    /// ... the end of the file is in them.
    fallback_eof,
    /// ... file and window disagree modulo 2 MiB.
    fallback_window,
    /// ... the backing can't map 2 MiB.
    fallback_backing,
    /// ... PTE entries are there already.
    fallback_pte,
    /// ... more than one extent, or blocks that are not aligned to 2 MiB.
    fallback_extent,
    /// Entries that show a hole.
    holes,
    /// Write grants that asked for blocks.
    allocations,
    /// PMD entries that were split.
    splits,
    /// Entries written back.
    flushes,
    /// Fences behind batches of them.
    fences,
    /// Syncs of a whole file.
    syncs,
    /// Bytes written back entry by entry.
    bytes_written_back,
    /// Times that somebody waited for a locked entry.
    waits,
}
