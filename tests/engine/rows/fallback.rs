// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 15: one test per condition for a PMD entry; the trace line contains the reason of a
//! fallback.

use std::sync::atomic::Ordering::SeqCst;

use vhost_user_dax::dax::counters::Snapshot;
use vhost_user_dax::dax::entry::{Order, PMD_PAGES};
use vhost_user_dax::dax::extent::Access;

use super::trace::record;
use super::{Fixture, pmd, zero};

/// Grants, and checks that only PTE entries were made, and that one fallback was counted and
/// traced.
fn falls_back(
    fixture: &Fixture,
    (from, at, pages): (u64, u64, u64),
    access: Access,
    why: &str,
    counter: fn(&Snapshot) -> u64,
) {
    let before = fixture.counted();
    let lines = record(|| fixture.grant(from, at, pages, access).unwrap());
    let after = fixture.counted();
    assert_eq!(after.pmd, before.pmd, "{why}: a PMD entry was made");
    assert_eq!((counter(&after) - counter(&before), all(&after) - all(&before)), (1, 1), "{why}");
    let done: Vec<_> =
        lines.iter().filter(|line| line.starts_with("dax_pmd_fault_done:")).collect();
    assert_eq!(done.len(), 1, "{lines:#?}");
    assert!(done[0].ends_with(&format!("fallback={why}")), "{done:?}");
}

fn all(snapshot: &Snapshot) -> u64 {
    snapshot.fallback_partial
        + snapshot.fallback_eof
        + snapshot.fallback_window
        + snapshot.fallback_backing
        + snapshot.fallback_pte
        + snapshot.fallback_extent
}

fn chunk_of_blocks() -> Fixture {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.source.fill(0, 2 * PMD_PAGES);
    fixture
}

/// Row 15: if all conditions hold, the fault makes one PMD entry: for read or write, of blocks or
/// of a hole.
#[test]
fn row_15_pmd_fault_if_all_conditions_hold() {
    for access in [Access::Read, Access::Write] {
        let fixture = chunk_of_blocks();
        let lines = record(|| fixture.grant(PMD_PAGES, 0, PMD_PAGES, access).unwrap());
        assert_eq!(fixture.entries(), [(PMD_PAGES, pmd(PMD_PAGES))]);
        assert!(lines.last().unwrap().ends_with("mapped"), "{lines:?}");
        assert_eq!(
            (fixture.counted().pmd, fixture.counted().pte, all(&fixture.counted())),
            (1, 0, 0)
        );
    }
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    assert_eq!(fixture.entries(), [(0, zero(Order::Pmd))]);
}

/// Row 15: the grant must contain the whole chunk: one page less at either end is a fallback.
#[test]
fn row_15_fallback_when_the_grant_holds_a_part() {
    for range in [(1, 1, PMD_PAGES - 1), (0, 0, PMD_PAGES - 1)] {
        let fixture = chunk_of_blocks();
        falls_back(&fixture, range, Access::Read, "Partial", |c| c.fallback_partial);
        assert_eq!(fixture.entries().len() as u64, PMD_PAGES - 1);
    }
}

/// Row 15: the whole chunk must lie inside the file.
#[test]
fn row_15_fallback_at_the_end_of_the_file() {
    let fixture = Fixture::new(PMD_PAGES - 1);
    fixture.source.fill(0, PMD_PAGES - 1);
    falls_back(&fixture, (0, 0, PMD_PAGES), Access::Write, "Eof", |c| c.fallback_eof);
    assert_eq!(fixture.entries().len() as u64, PMD_PAGES - 1);
}

/// Row 15: the offsets in the file and in the window must be equal modulo 2 MiB.
#[test]
fn row_15_fallback_when_the_window_disagrees() {
    let fixture = chunk_of_blocks();
    falls_back(&fixture, (0, 1, PMD_PAGES), Access::Read, "Window", |c| c.fallback_window);
}

/// Row 15: the backing must be able to map 2 MiB.
#[test]
fn row_15_fallback_when_the_backing_cannot() {
    let fixture = chunk_of_blocks();
    fixture.source.state().maps_pmd.store(false, SeqCst);
    falls_back(&fixture, (0, 0, PMD_PAGES), Access::Read, "Backing", |c| c.fallback_backing);
}

/// Row 15: the chunk's block must be aligned to 2 MiB.
#[test]
fn row_15_fallback_when_the_block_is_not_aligned() {
    let fixture = Fixture::new(PMD_PAGES);
    (0..PMD_PAGES).for_each(|page| fixture.source.set_block(page, Some(PMD_PAGES * 9 + 1 + page)));
    falls_back(&fixture, (0, 0, PMD_PAGES), Access::Write, "Extent", |c| c.fallback_extent);
}

/// Row 15: one extent must cover the chunk: not two runs of blocks, and not a hole and blocks.
#[test]
fn row_15_fallback_with_two_extents() {
    for other in [None, Some(5)] {
        for page in [1, 300, PMD_PAGES - 1] {
            let fixture = chunk_of_blocks();
            fixture.source.set_block(page, other);
            falls_back(&fixture, (0, 0, PMD_PAGES), Access::Read, "Extent", |c| c.fallback_extent);
        }
    }
}

/// Row 15: the chunk must have no PTE entry; PTE entries are never merged.
#[test]
fn row_15_fallback_when_a_pte_is_in_the_way() {
    for page in [0, 1, PMD_PAGES - 1] {
        let fixture = chunk_of_blocks();
        fixture.grant(page, 4 * PMD_PAGES, 1, Access::Read).unwrap();
        falls_back(&fixture, (0, 0, PMD_PAGES), Access::Write, "Pte", |c| c.fallback_pte);
        assert_eq!(fixture.entries().len() as u64, PMD_PAGES);
    }
}
