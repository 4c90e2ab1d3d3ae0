// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the DAX engine: what the kernel's `fs/dax.c` does for page tables, for a guest's
//! window. Knows no virtio, no vhost-user and no FUSE: a file is an
//! [`ExtentSource`](extent::ExtentSource), the window a [`Mapper`](crate::window::Mapper), and
//! durability a [`Persist`](crate::persist::Persist).
//!
//! A [`Space`](engine::Space) is one host file, with an [`Entry`](entry::Entry) for each page or
//! chunk of 2 MiB that is granted: a hole, or a block; locked, or not; clean, or dirty. A *grant*
//! is what the guest may touch without asking again.
//!
//! Where the kernel knows what is dirty ([`Persist::Kernel`](crate::persist::Persist::Kernel)), no
//! flush reads an entry. Entries are made there too, and a read grant asks SEEK_DATA and SEEK_HOLE
//! for them: row 6 (a hole is a ZERO entry) holds for each backing, and a WRITE over a hole (row
//! 13), the trace points (row 17) and the counters rest on it. A write grant asks SEEK_HOLE in the
//! place of an fallocate (row 16). All look-ups take 1 % of a mapping's processor time.
//!
//! # The steps of a grant
//! 1. [`Engine::span`](engine::Engine::span) checks the numbers.
//! 2. The invalidate lock is read-locked: no one changes the file's length or takes its blocks
//!    until the grant is there.
//! 3. Past the end of the file? Refused. To write? Blocks first: a full disk is told now or never.
//! 4. The grant is counted, so that whoever removes another one sees that these pages are wanted.
//! 5. The fault: chunk by chunk a PMD entry where all conditions hold, else PTE entries. Each is
//!    grabbed (locked), filled if it was a hole or empty, marked dirty if it may be written, and
//!    let go.
//! 6. The window shows it: the few maps and unmaps that get there, or the way back if one is
//!    refused.
//! 7. What was granted there before is retired: flushed a last time where nobody may write any
//!    more, and forgotten where nobody may read either.
//!
//! # Lock order
//! Take them from the top down. Only those above the line may be held over a front-end round trip,
//! a file-system call or a flush. A debug build asserts the order of those with a rank
//! (`support/lock.rs`); ARCHITECTURE.md has the whole crate's.
//!
//! | lock | which | guards | held over |
//! |---|---|---|---|
//! | `Rank::Times` | times (one per file, in `fs`) | what was seen of a file's times | system calls, all below |
//! | `Rank::Invalidate` | invalidate lock (one per space) | length and blocks; read by grants, reads, writes and writebacks | all of them |
//! | `Rank::Window` | checkout of the window (one per engine) | grants and maps | round trips; allocation in a re-fault |
//! | no mutex | an entry's lock bit | that entry; more than one only in a writeback's batch, in the file's order | its flush, its `unmap_hole`, its lookup |
//! | ------ | | | |
//! | `Rank::Index` | index mutex (one per space) | entries, their marks and lock bits | nothing |
//! | `Rank::Bucket` | wait bucket | which threads wait for an entry | nothing |
//! | `Rank::Leaf` | coverage; failed; a waiter's flag | how often each page is granted; whether a writeback has failed; whether the waiter was woken | nothing |
//!
//! # From behaviour to test
//! (Linux's own decisions stand beside the engine's in `tests/engine/oracle`: docs/kernel-oracle.md.)
//!
//! The rows are those of the project's table of the kernel's behaviours. Tests named `row_*` are in
//! `tests/engine/rows`, unless a module is given. Where the model checker looks as well:
//! `loom_tests`.
//!
//! | row | behaviour | tests |
//! |---|---|---|
//! | 1 | one word per entry | `row_01_an_entry_is_one_word` in [`entry`], and its size assertion |
//! | 2 | who waits, and who is woken | `waits.rs`: `row_02_*` |
//! | 3 | an entry is got, inserted, split, or refused | `entries.rs`: `row_03_grab_mapping_entry_*` |
//! | 4 | an unused wake-up is passed on | `waits.rs`: `row_04_*` |
//! | 5 | deletion, truncation, invalidate if clean | `entries.rs`, `resize.rs`: `row_05_*` |
//! | 6 | holes are shown, not filled, not written back | `holes.rs`: `row_06_*`; `real_files.rs`: `row_06_a_sparse_gibibyte_stays_sparse` |
//! | 7 | private mappings only read | `holes.rs`: `row_07_a_private_mapping_dirties_and_allocates_nothing` |
//! | 8 | what replaces what, and in which order | `holes.rs`, `refusals.rs`: `row_08_*` |
//! | 9 | dirty until the last write grant is gone | `writeback.rs`, `refusals.rs`: `row_09_*` |
//! | 10 | one entry written back | `flushers.rs`, `writeback.rs`: `row_10_*` |
//! | 11 | the cost of a writeback | `walk.rs`: `row_11_*`; `a_search_skips_what_is_clean` in [`index`] |
//! | 12 | zeroing | `resize.rs`: `row_12_*`; `real_files.rs`: `row_12_zeroing_a_real_file_at_odd_offsets` |
//! | 13 | READ and WRITE beside the window | `rw.rs`: `row_13_*`; `real_files.rs`: `row_13_read_and_write_against_mmap` |
//! | 14 | the end of the file | `grants.rs`, `resize.rs`: `row_14_*` |
//! | 15 | when it is a PMD | `fallback.rs`: `row_15_*`, one per condition |
//! | 16 | blocks before promises | `grants.rs`: `row_16_*`; `real_files.rs`: `row_16_a_real_full_disk` |
//! | 17 | trace points | `trace.rs`: `row_17_*`; `row_17_a_trace_point_is_cheap_when_off` in `trace` here |

pub mod counters;
mod coverage;
pub mod direct;
pub mod engine;
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
