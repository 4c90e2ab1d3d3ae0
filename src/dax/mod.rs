// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the DAX engine. It does for a guest's window what the kernel's `fs/dax.c` does for
//! page tables. Knows no virtio, no vhost-user and no FUSE: a file is an
//! [`ExtentSource`](extent::ExtentSource), the window a [`Mapper`](crate::window::Mapper), and
//! durability a [`Persist`](crate::persist::Persist).
//!
//! A [`Space`](engine::Space) is one host file. It has an [`Entry`](entry::Entry) for each granted
//! page or chunk of 2 MiB: a hole or a block, locked or unlocked, clean or dirty. A *grant* is the
//! guest's right to read or write a range of a file through the window without a further request.
//!
//! Where the kernel tracks dirty pages ([`Persist::Kernel`](crate::persist::Persist::Kernel)), a
//! flush reads no entry. Entries exist there too, and a read grant calls lseek(2) with SEEK_DATA
//! and SEEK_HOLE for them: row 6 (a hole is a ZERO entry) holds for each backing, and a WRITE over
//! a hole (row 13), the trace points (row 17) and the counters need it. A write grant calls lseek
//! with SEEK_HOLE instead of fallocate (row 16). All these look-ups take 1 % of a mapping's
//! processor time.
//!
//! # The steps of a grant
//! 1. [`Engine::span`](engine::Engine::span) checks the guest's numbers.
//! 2. The grant read-locks the invalidate lock: until the grant exists, no thread changes the
//!    file's length or frees its blocks.
//! 3. A range wholly past the end of the file is refused. A write grant allocates blocks first:
//!    a full disk can be reported only now, not at a later store.
//! 4. The grant is counted, so that a thread which releases another grant of the same pages sees
//!    that the pages are still covered.
//! 5. The fault: for each chunk a PMD entry if all conditions of row 15 hold, else PTE entries.
//!    Each entry is grabbed (locked), filled if it was a hole or empty, marked dirty if the grant
//!    is for writing, and unlocked.
//! 6. The window shows the range: the engine sends the maps and unmaps that are needed, and rolls
//!    them back if the front-end refuses one.
//! 7. The grants that were there before are released: an entry without a write grant is flushed
//!    a last time, and an entry without any grant is deleted.
//!
//! # Lock order
//! A thread takes locks from the top of this table down. Only the locks above the line may be held
//! over a front-end round trip, a file-system call or a flush. A debug build asserts the order of
//! the locks with a rank (`support/lock.rs`). ARCHITECTURE.md has the table of the whole crate.
//!
//! | lock | which | guards | held over |
//! |---|---|---|---|
//! | `Rank::Times` | times (one per file, in `fs`) | the file times that were last seen | system calls; the locks below |
//! | `Rank::Invalidate` | invalidate lock (one per space) | length and blocks; read-locked by grants, reads, writes and writebacks | round trips, file-system calls, flushes |
//! | `Rank::Window` | checkout of the window (one per engine) | grants and maps | round trips; allocation in a re-fault |
//! | no mutex | an entry's lock bit | that entry; only a writeback's batch holds several, in the order of the file | the entry's flush, `unmap_hole`, extent look-up |
//! | ------ | | | |
//! | `Rank::Index` | index mutex (one per space) | entries, their marks and lock bits | nothing |
//! | `Rank::Bucket` | wait bucket | which threads wait for an entry | nothing |
//! | `Rank::Leaf` | coverage; failed; a waiter's flag | the number of grants of each page; whether a writeback has failed; whether the waiter was woken | nothing |
//!
//! # From behaviour to test
//! Each row is one behaviour of the kernel's `fs/dax.c` that the engine keeps. Tests named `row_*`
//! are in `tests/engine/rows`, unless the row names a module. `loom_tests` checks rows 2 to 5 and 9
//! to 11 by model checking. `tests/engine/oracle` compares the engine's decisions with those of a
//! running kernel (docs/kernel-oracle.md).
//!
//! | row | behaviour | tests |
//! |---|---|---|
//! | 1 | one word per entry | `row_01_an_entry_is_one_word` in [`entry`], and its size assertion |
//! | 2 | which threads wait for an entry, and which are woken | `waits.rs`: `row_02_*` |
//! | 3 | an entry is got, inserted, split, or refused | `entries.rs`: `row_03_grab_mapping_entry_*` |
//! | 4 | an unused wake-up is passed on | `waits.rs`: `row_04_*` |
//! | 5 | deletion, truncation, invalidate if clean | `entries.rs`, `resize.rs`: `row_05_*` |
//! | 6 | holes are shown, not filled, not written back | `holes.rs`: `row_06_*`; `real_files.rs`: `row_06_a_sparse_gibibyte_stays_sparse` |
//! | 7 | private mappings only read | `holes.rs`: `row_07_a_private_mapping_dirties_and_allocates_nothing` |
//! | 8 | which entry replaces which, and in which order | `holes.rs`, `refusals.rs`: `row_08_*` |
//! | 9 | an entry is dirty until its last write grant is released | `writeback.rs`, `refusals.rs`: `row_09_*` |
//! | 10 | one entry written back | `flushers.rs`, `writeback.rs`: `row_10_*` |
//! | 11 | the cost of a writeback | `walk.rs`: `row_11_*`; `a_search_skips_what_is_clean` in [`index`] |
//! | 12 | zeroing | `resize.rs`: `row_12_*`; `real_files.rs`: `row_12_zeroing_a_real_file_at_odd_offsets` |
//! | 13 | READ and WRITE beside the window | `rw.rs`: `row_13_*`; `real_files.rs`: `row_13_read_and_write_against_mmap` |
//! | 14 | the end of the file | `grants.rs`, `resize.rs`: `row_14_*` |
//! | 15 | when an entry is a PMD | `fallback.rs`: `row_15_*`, one per condition |
//! | 16 | blocks are allocated before a write grant | `grants.rs`: `row_16_*`; `real_files.rs`: `row_16_a_real_full_disk` |
//! | 17 | trace points | `trace.rs`: `row_17_*`; `row_17_a_trace_point_is_cheap_when_off` in `trace` here |

pub mod counters;
mod coverage;
pub mod direct;
pub mod engine;
pub mod entries;
pub mod entry;
pub mod extent;
mod fault;
mod fiemap;
mod grant;
pub mod index;
#[cfg(all(test, loom))]
mod loom_tests;
pub mod resize;
mod rw;
pub mod space;
pub(crate) mod sync;
mod trace;
pub mod wait;
mod writeback;
pub mod written;
