// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 5, 12 and 14: the file's length changes, and ranges are zeroed, under live grants.

use std::sync::atomic::Ordering::SeqCst;

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES};
use vhost_user_dax::dax::extent::{Access, ExtentSource};
use vhost_user_dax::dax::resize::Resized;

use super::{Fixture, map, pmd, pte, unmap};
use testkit::fakes::Event;

fn resize(fixture: &Fixture, bytes: u64) -> Resized {
    fixture.engine.resize(&fixture.space, bytes).unwrap()
}

const SHOWN: Resized = Resized { tail_hidden: false };

/// Row 5: before the file shrinks, the window stops showing the pages beyond the new end, and their
/// entries are removed. The remaining pages of a split chunk have entries, dirty under a write
/// grant.
#[test]
fn row_05_truncation_under_a_live_grant() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.grant(0, 0, 2 * PMD_PAGES, Access::Write).unwrap();
    fixture.log.take();
    let keep = PMD_PAGES + 3;
    assert_eq!(resize(&fixture, keep * PAGE_BYTES), SHOWN);
    let sent: Vec<_> = fixture.log.take();
    let shrunk = sent.iter().position(|event| matches!(event, Event::SetBytes(_))).unwrap();
    assert_eq!(sent[..shrunk], [unmap(0, 2 * PMD_PAGES), map(0, 0, keep)]);
    let left: Vec<_> =
        [(0, pmd(0))].into_iter().chain((PMD_PAGES..keep).map(|n| (n, pte(n)))).collect();
    assert_eq!(fixture.entries(), left);
    assert_eq!(fixture.dirty(), left.iter().map(|(page, _)| *page).collect::<Vec<_>>());
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed().len(), 4);
    // The file shrinks to 0 bytes while the guest keeps its grant.
    assert_eq!(resize(&fixture, 0), SHOWN);
    assert_eq!(
        (fixture.entries(), fixture.mapper.maps().len(), fixture.engine.sizes().0),
        (vec![], 0, 1)
    );
    fixture.revoke(&[(0, 2 * PMD_PAGES)]).unwrap();
    assert_eq!(fixture.engine.sizes(), (0, 0));
}

/// Row 5: the part of a dirty chunk before the new end is flushed before its entry is removed; the
/// part beyond it no longer exists.
#[test]
fn row_05_truncation_writes_back_what_a_cut_chunk_keeps() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    fixture.log.take();
    resize(&fixture, 7 * PAGE_BYTES);
    assert_eq!(fixture.flushed(), [(0, 7)]);
    fixture.punch(3 * PAGE_BYTES, PAGE_BYTES).unwrap();
    assert_eq!(fixture.flushed(), [], "the punch of a whole PTE entry flushed something");
}

/// Row 14: a live grant shows the pages by which the file has grown, and never stops showing the
/// old ones.
#[test]
fn row_14_growth_under_a_live_grant() {
    for access in [Access::Read, Access::Write] {
        let fixture = Fixture::new(3);
        fixture.grant(0, 0, PMD_PAGES, access).unwrap();
        fixture.log.take();
        assert_eq!(resize(&fixture, 10 * PAGE_BYTES), SHOWN);
        assert_eq!(fixture.messages(), [map(3, 3, 7)]);
        assert_eq!(fixture.entries().len(), 10);
        assert_eq!(fixture.dirty().len(), if access == Access::Write { 10 } else { 0 });
        assert_eq!(fixture.source.allocated().len(), fixture.dirty().len());
        assert_eq!(resize(&fixture, 2 * PMD_PAGES * PAGE_BYTES), SHOWN);
        assert_eq!(
            fixture.messages(),
            [map(10, 10, PMD_PAGES - 10)],
            "the new map does not end where the grant ends"
        );
        fixture.revoke(&[(0, PMD_PAGES)]).unwrap();
        assert_eq!((fixture.entries(), fixture.mapper.maps().len()), (vec![], 0));
    }
}

/// Row 14: the window follows growth and shrinking by another process, too.
#[test]
fn row_14_resized_by_other_hands() {
    let fixture = Fixture::new(3);
    fixture.grant(0, 0, 8, Access::Read).unwrap();
    for pages in [6, 8, 2, 0, 5] {
        fixture.source.file().set_len(pages * PAGE_BYTES).unwrap();
        assert_eq!(fixture.engine.resized(&fixture.space).unwrap(), SHOWN);
        let shown: u64 = fixture.mapper.maps().values().map(|(bytes, ..)| bytes / PAGE_BYTES).sum();
        assert_eq!((shown, fixture.entries().len() as u64), (pages, pages));
    }
}

/// Row 14: an incomplete last page that the front-end can't map is reported; the window shows the
/// page as soon as it is complete.
#[test]
fn row_14_a_tail_that_cannot_be_mapped_is_reported() {
    let fixture = Fixture::new(4);
    fixture.grant(0, 0, 8, Access::Read).unwrap();
    fixture.log.take();
    assert_eq!(resize(&fixture, 2 * PAGE_BYTES + 1), Resized { tail_hidden: true });
    assert_eq!(fixture.messages(), [unmap(0, 4), map(0, 0, 2)]);
    assert_eq!(resize(&fixture, 5 * PAGE_BYTES - 1), Resized { tail_hidden: true });
    assert_eq!(resize(&fixture, 5 * PAGE_BYTES), SHOWN);
    let shown: u64 = fixture.mapper.maps().values().map(|(bytes, ..)| bytes / PAGE_BYTES).sum();
    assert_eq!(shown, 5);
}

/// Row 5: if the file system refuses a truncation, the window shows all granted pages again.
#[test]
fn row_05_a_refused_truncation_shows_all_again() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    let before = (fixture.entries(), fixture.dirty());
    fixture.source.state().refuses_bytes.store(true, SeqCst);
    assert!(fixture.engine.resize(&fixture.space, PAGE_BYTES).is_err());
    let shown: u64 = fixture.mapper.maps().values().map(|(bytes, ..)| bytes / PAGE_BYTES).sum();
    assert_eq!((shown, (fixture.entries(), fixture.dirty())), (PMD_PAGES, before));
}

/// Row 12: the file system zeroes partial blocks, too: it gets exactly the byte range, as a punch
/// where no write grant is, and as zeroing that keeps the blocks under a write grant.
#[test]
fn row_12_zeroing_at_odd_offsets() {
    let (from, end) = (3 * PAGE_BYTES + 5, 9 * PAGE_BYTES - 7);
    let zeroed = |fixture: &Fixture| {
        fixture.log.take();
        fixture.punch(from, end - from).unwrap();
        let is_zero = |event: &Event| matches!(event, Event::Zero { .. });
        fixture.log.take().into_iter().filter(is_zero).collect::<Vec<_>>()
    };
    let fixture = Fixture::new(PMD_PAGES);
    fixture.source.fill(0, PMD_PAGES);
    let all = Event::Zero { from, bytes: end - from, keep: false };
    assert_eq!(zeroed(&fixture), [all]);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    fixture.grant(5, PMD_PAGES, 2, Access::Write).unwrap();
    let (start, stop) = (5 * PAGE_BYTES, 7 * PAGE_BYTES);
    assert_eq!(
        zeroed(&fixture),
        [
            Event::Zero { from, bytes: start - from, keep: false },
            Event::Zero { from: start, bytes: stop - start, keep: true },
            Event::Zero { from: stop, bytes: end - stop, keep: false },
        ]
    );
    // The range begins inside a page with a write grant.
    fixture.grant(3, 2 * PMD_PAGES, 1, Access::Write).unwrap();
    let next = 4 * PAGE_BYTES;
    assert_eq!(zeroed(&fixture)[0], Event::Zero { from, bytes: next - from, keep: true });
}

/// Rows 12 and 5: after a punch the entries match the file: holes under read grants, blocks under
/// write grants. Nothing beyond the end of the file changes.
#[test]
fn row_12_entries_follow_a_punch() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.source.fill(0, PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    assert_eq!(fixture.entries(), [(0, pmd(0))]);
    fixture.punch(2 * PAGE_BYTES, 3 * PAGE_BYTES).unwrap();
    for (page, entry) in fixture.entries() {
        assert_eq!(entry.is_zero(), (2..5).contains(&page), "page {page}");
    }
    assert_eq!((fixture.entries().len() as u64, fixture.dirty()), (PMD_PAGES, vec![]));
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    fixture.punch(0, u64::from(u32::MAX)).unwrap();
    assert!(
        fixture.entries().iter().all(|(_, entry)| entry.is_real()),
        "a page with a write grant has no block"
    );
    assert_eq!(fixture.dirty().len(), fixture.entries().len());
    fixture.log.take();
    fixture.punch(PMD_PAGES * PAGE_BYTES, 100).unwrap();
    assert_eq!(fixture.log.take(), []);
    assert!(fixture.punch(0, 0).is_err());
    assert!(fixture.punch(u64::MAX, 2).is_err());
}
