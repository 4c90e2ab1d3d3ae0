// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 6 to 8: holes, private mappings, and the order of replacements.

use vhost_user_dax::dax::entry::{Entry, Order, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::Mark;

use super::entries::{new_entries, no_unmap, put};
use super::{Fixture, map, own_block, pmd, pte, unmap_hole, zero};
use testkit::fakes::Event;

/// Row 6: a read grant over holes makes ZERO entries of either order, and allocates no block.
#[test]
fn row_06_load_hole_allocates_nothing() {
    let fixture = Fixture::new(PMD_PAGES + 2);
    fixture.source.fill(PMD_PAGES + 1, PMD_PAGES + 2);
    fixture.grant(0, 0, PMD_PAGES + 2, Access::Read).unwrap();
    let expected =
        [(0, zero(Order::Pmd)), (PMD_PAGES, zero(Order::Pte)), (PMD_PAGES + 1, pte(PMD_PAGES + 1))];
    assert_eq!(fixture.entries(), expected);
    assert_eq!(
        fixture.log.take(),
        [map(0, 0, PMD_PAGES + 2)],
        "a block was allocated, or other maps were made"
    );
    assert_eq!(fixture.source.allocated().len(), 1);
    assert_eq!(fixture.counted().holes, 2);
}

/// Row 6: unwritten blocks are a hole for a reader.
#[test]
fn row_06_load_hole_treats_unwritten_blocks_as_a_hole() {
    let fixture = Fixture::new(1);
    fixture.source.fill(0, 1);
    fixture.source.set_unwritten(0);
    fixture.grant(0, 0, 1, Access::Read).unwrap();
    assert_eq!(fixture.entries(), [(0, zero(Order::Pte))]);
}

/// Row 6: ZERO and EMPTY entries are never written back, even if they are marked.
#[test]
fn row_06_holes_are_never_written_back() {
    for order in [Order::Pte, Order::Pmd] {
        for entry in [Entry::empty(order), zero(order)] {
            let fixture = Fixture::new(PMD_PAGES);
            put(fixture.space.entries(), 0, entry);
            let held = fixture.space.entries().grab(PageIndex(0), order, &mut no_unmap).unwrap();
            held.mark(Mark::Dirty, true);
            held.mark(Mark::ToWrite, true);
            drop(held);
            fixture.sync().unwrap();
            assert_eq!(fixture.flushed(), [], "{entry:?}");
        }
    }
}

/// Row 7: a guest's private mapping asks for a read grant: no page becomes dirty, no block is
/// allocated, and existing entries and blocks remain.
#[test]
fn row_07_a_private_mapping_dirties_and_allocates_nothing() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.source.fill(PMD_PAGES, 2 * PMD_PAGES);
    let before = fixture.source.allocated();
    for at in [0, 2 * PMD_PAGES] {
        fixture.grant(0, at, 2 * PMD_PAGES, Access::Read).unwrap();
        assert_eq!(fixture.entries(), [(0, zero(Order::Pmd)), (PMD_PAGES, pmd(PMD_PAGES))]);
        assert_eq!((fixture.dirty(), fixture.source.allocated()), (vec![], before.clone()));
    }
    fixture.sync().unwrap();
    fixture.revoke(&[(0, 5 * PMD_PAGES)]).unwrap();
    assert!(!fixture.log.take().iter().any(|event| matches!(event, Event::Flush { .. })));
}

/// Row 8: a hole gets blocks only after its maps are unmapped, under the entry's lock.
#[test]
fn row_08_insert_mapping_entry_unmaps_the_hole_first() {
    for (order, page) in [(Order::Pte, 5), (Order::Pmd, PMD_PAGES)] {
        let (entries, _) = new_entries();
        put(&entries, page, zero(order));
        let mut held = entries.grab(PageIndex(page), order, &mut no_unmap).unwrap();
        let mut unmapped = 0;
        let real = Entry::real(order, own_block(page));
        held.fill(real, &mut |start, of| {
            assert_eq!((start, of), (PageIndex(page), order));
            let there = entries.next(start, start, None).unwrap().1;
            assert_eq!(there, zero(order).locked(), "the entry was replaced before the unmap");
            unmapped += 1;
        });
        assert_eq!((held.entry(), unmapped), (real, 1));
        drop(held);
        assert_eq!(entries.next(PageIndex(0), PageIndex::LAST, None).unwrap().1, real);
    }
}

/// Row 8: the order at a write grant of a hole: first blocks, then the unmap, then, if there was no
/// map yet, the map. The entry is dirty afterwards.
#[test]
fn row_08_insert_mapping_entry_order_of_events() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    fixture.log.take();
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    let allocate = Event::Allocate { first: 0, last: PMD_PAGES - 1 };
    assert_eq!(fixture.log.take(), [allocate, unmap_hole(0, PMD_PAGES)]);
    assert_eq!((fixture.entries(), fixture.dirty()), (vec![(0, pmd(0))], vec![0]));
}

/// Rows 8 and 3: a write grant of one page of a 2 MiB hole unmaps the whole hole, and splits its
/// entry.
#[test]
fn row_08_a_write_to_one_page_of_a_large_hole() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    fixture.log.take();
    fixture.grant(9, PMD_PAGES, 1, Access::Write).unwrap();
    let allocate = Event::Allocate { first: 9, last: 9 };
    assert_eq!(fixture.log.take(), [allocate, unmap_hole(0, PMD_PAGES), map(PMD_PAGES, 9, 1)]);
    assert_eq!((fixture.entries(), fixture.dirty()), (vec![(9, pte(9))], vec![9]));
    assert_eq!((fixture.counted().splits, fixture.source.allocated().len()), (1, 1));
}

/// Row 8: an entry with blocks is never overwritten, neither by another block nor by a hole.
#[test]
fn row_08_a_real_entry_is_never_overwritten() {
    for other in [None, Some(77)] {
        let fixture = Fixture::new(PMD_PAGES + 1);
        fixture.source.fill(0, PMD_PAGES + 1);
        let expected = [(0, pmd(0)), (PMD_PAGES, pte(PMD_PAGES))];
        fixture.grant(0, 0, PMD_PAGES + 1, Access::Read).unwrap();
        assert_eq!(fixture.entries(), expected);
        (0..=PMD_PAGES)
            .for_each(|page| fixture.source.set_block(page, other.map(|n| n + 3 * page)));
        fixture.log.take();
        fixture.grant(0, 2 * PMD_PAGES, PMD_PAGES + 1, Access::Read).unwrap();
        assert_eq!(fixture.entries(), expected);
        assert!(!fixture.log.take().iter().any(|event| matches!(event, Event::UnmapHole { .. })));
    }
}
