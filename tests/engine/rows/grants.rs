// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 14 and 16: the end of the file, and a full disk, are checked before a grant is made.

use std::sync::atomic::Ordering::SeqCst;

use nix::errno::Errno;
use vhost_user_dax::dax::engine::GrantError;
use vhost_user_dax::dax::entry::{Order, PAGE_BYTES, PMD_PAGES};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::window::{FileOffset, WindowBytes, WindowOffset};

use super::{Fixture, MOST_MAPS, WINDOW_PAGES, map, pte, zero};
use testkit::fakes::{Event, lock};

/// Row 14: a grant completely beyond the end of the file is refused, and has no effect.
#[test]
fn row_14_wholly_past_eof_is_refused() {
    for (bytes, from) in [(0, 0), (3 * PAGE_BYTES, 3), (2 * PAGE_BYTES + 1, 3), (PAGE_BYTES, 9)] {
        for access in [Access::Read, Access::Write] {
            let fixture = Fixture::with(bytes, false);
            let refused = fixture.grant(from, 0, 4, access).unwrap_err();
            assert!(matches!(refused, GrantError::PastEof), "{refused}");
            assert_eq!(refused.errno(), Errno::ENXIO);
            assert_eq!((fixture.log.take(), fixture.entries()), (vec![], vec![]));
            assert_eq!((fixture.counted().grants, fixture.counted().grants_failed), (0, 1));
        }
    }
}

/// Row 14: of a grant that begins inside the file and ends at or beyond its end, exactly the pages
/// inside the file are faulted in, allocated and mapped.
#[test]
fn row_14_inside_eof_page_by_page() {
    for asked in [3, 4, PMD_PAGES] {
        let fixture = Fixture::new(3);
        fixture.source.fill(1, 2);
        fixture.grant(0, 0, asked, Access::Read).unwrap();
        assert_eq!(fixture.entries(), [(0, zero(Order::Pte)), (1, pte(1)), (2, zero(Order::Pte))]);
        assert_eq!(fixture.log.take(), [map(0, 0, 3)]);
        fixture.grant(0, 0, asked, Access::Write).unwrap();
        assert_eq!(fixture.entries(), [(0, pte(0)), (1, pte(1)), (2, pte(2))]);
        assert_eq!(fixture.source.allocated().into_iter().collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(fixture.messages(), []);
    }
}

/// Row 14: an incomplete last page belongs to the file: it is granted if the front-end can map it,
/// else refused with an error of its own, without effect.
#[test]
fn row_14_a_last_page_that_is_not_whole() {
    let fixture = Fixture::with(2 * PAGE_BYTES + 5, false);
    let refused = fixture.grant(0, 0, 4, Access::Write).unwrap_err();
    assert!(matches!(refused, GrantError::Tail), "{refused}");
    assert_eq!((fixture.log.take(), fixture.entries()), (vec![], vec![]));
    // A range that ends before the last page is granted.
    fixture.grant(0, 0, 2, Access::Read).unwrap();
    assert_eq!(fixture.entries().len(), 2);
}

/// Row 14: invalid numbers are refused with EINVAL, without effect.
#[test]
fn row_14_invalid_numbers_are_refused() {
    let fixture = Fixture::new(1);
    let span = |at, bytes| fixture.engine.span(WindowOffset(at), WindowBytes(bytes));
    let window = WINDOW_PAGES * PAGE_BYTES;
    for (at, bytes) in [
        (0, 0),
        (1, PAGE_BYTES),
        (0, PAGE_BYTES + 1),
        (window, PAGE_BYTES),
        (0, window + PAGE_BYTES),
        (u64::MAX - PAGE_BYTES + 1, PAGE_BYTES),
        (PAGE_BYTES, u64::MAX - PAGE_BYTES + 1),
    ] {
        assert_eq!(span(at, bytes).unwrap_err().errno(), Errno::EINVAL, "{at:#x} {bytes:#x}");
    }
    for from in [1, u64::MAX, u64::MAX - PAGE_BYTES + 1, 1 << 63, (1 << 63) - PAGE_BYTES] {
        let span = span(0, PAGE_BYTES).unwrap();
        let refused =
            fixture.engine.grant(&fixture.space, FileOffset(from), span, Access::Write, || true);
        assert_eq!(refused.unwrap_err().errno(), Errno::EINVAL, "{from:#x}");
    }
    assert_eq!((fixture.log.take(), fixture.entries()), (vec![], vec![]));
}

/// Row 16: a write grant allocates blocks before anything else.
#[test]
fn row_16_a_write_grant_allocates_first() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, 8, Access::Write).unwrap();
    assert_eq!(fixture.log.take(), [Event::Allocate { first: 0, last: 7 }, map(0, 0, 8)]);
}

/// Row 16: on a full disk a write grant fails with ENOSPC and leaves no map, no entry and no grant;
/// an older grant of the same pages remains.
#[test]
fn row_16_a_full_disk_is_enospc_before_anything_is_promised() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.grant(0, 0, 2 * PMD_PAGES, Access::Read).unwrap();
    let before = (fixture.entries(), fixture.mapper.maps());
    fixture.log.take();
    fixture.source.state().free.store(20, SeqCst);
    let refused = fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENOSPC);
    let asked = Event::Allocate { first: 0, last: PMD_PAGES - 1 };
    assert_eq!(fixture.log.take(), [asked], "the grant did more than try to allocate");
    assert_eq!((fixture.entries(), fixture.mapper.maps()), before);
    assert_eq!((fixture.dirty(), fixture.engine.sizes()), (vec![], (1, 1)));
    // A range that has no older grant.
    fixture.grant(0, 4 * PMD_PAGES, PMD_PAGES, Access::Write).unwrap_err();
    assert_eq!(fixture.engine.sizes(), (1, 1));
}

/// Row 16: if the file system fails in the middle of a fault, the grant fails with its error, and
/// the entries made so far are removed.
#[test]
fn row_16_a_lookup_that_fails_leaves_nothing() {
    let (chunk, two) = (PMD_PAGES, 2 * PMD_PAGES);
    for (bad, asked, access) in [
        (4, 9, Access::Read),
        (0, chunk, Access::Read),
        (0, chunk, Access::Write),
        (chunk, two, Access::Read),
        (chunk, two, Access::Write),
    ] {
        let fixture = Fixture::new(two);
        fixture.source.fill(0, 4);
        *lock(&fixture.source.state().bad_page) = Some(bad);
        let refused = fixture.grant(0, 0, asked, access).unwrap_err();
        assert_eq!(refused.errno(), Errno::EIO);
        assert_eq!((fixture.entries(), fixture.engine.sizes()), (vec![], (0, 0)), "page {bad}");
        assert_eq!(fixture.messages(), []);
    }
}

/// Row 16, and Q2 of docs/front-ends.md: a grant that needs more maps than the VM can take is
/// refused before any message is sent.
#[test]
fn row_16_too_many_maps_are_refused_before_anything_is_sent() {
    let fixture = Fixture::new(1);
    for n in 0..MOST_MAPS as u64 {
        fixture.grant(0, 2 * n, 1, Access::Read).unwrap();
    }
    fixture.log.take();
    let refused = fixture.grant(0, 1000, 1, Access::Read).unwrap_err();
    assert_eq!((refused.errno(), fixture.messages()), (Errno::ENOMEM, vec![]));
    fixture.revoke(&[(0, WINDOW_PAGES)]).unwrap();
    assert_eq!((fixture.engine.sizes(), fixture.entries()), ((0, 0), vec![]));
}
