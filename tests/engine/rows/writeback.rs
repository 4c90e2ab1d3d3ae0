// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 9: what is dirty, and until when.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;

use super::{ALL, Fixture, pmd, until};
use testkit::fakes::{Event, lock};

/// Row 9: store, fsync, store, fsync: both flush, since nobody can see the second store; and there
/// is no flush once the grant is gone, but a last one.
#[test]
fn row_09_under_a_write_grant_every_fsync_flushes() {
    let fixture = Fixture::new(PMD_PAGES + 1);
    fixture.grant(0, 0, PMD_PAGES + 1, Access::Write).unwrap();
    let both = [(0, PMD_PAGES), (PMD_PAGES, 1)];
    for _ in 0..3 {
        fixture.log.take();
        fixture.sync().unwrap();
        assert_eq!(fixture.flushed(), both);
        assert_eq!(fixture.dirty(), [0, PMD_PAGES], "dirty until the grant is gone");
    }
    fixture.revoke(&[(0, PMD_PAGES + 1)]).unwrap();
    assert_eq!(fixture.flushed(), both, "a last flush");
    assert_eq!(fixture.entries(), []);
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed(), []);
}

/// Row 9: where a read grant stays behind, the entry stays too, and is clean.
#[test]
fn row_09_clean_when_the_last_write_grant_is_gone() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    fixture.grant(0, PMD_PAGES, PMD_PAGES, Access::Read).unwrap();
    fixture.grant(8, 2 * PMD_PAGES, 1, Access::Write).unwrap();
    fixture.log.take();
    fixture.revoke(&[(0, PMD_PAGES)]).unwrap();
    assert_eq!(
        (fixture.flushed(), fixture.dirty()),
        (vec![], vec![0]),
        "page 8 may still be written"
    );
    fixture.revoke(&[(2 * PMD_PAGES, 1)]).unwrap();
    assert_eq!((fixture.flushed(), fixture.dirty()), (vec![(0, PMD_PAGES)], vec![]));
    assert_eq!(fixture.entries(), [(0, pmd(0))]);
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed(), [], "nobody can have written");
    fixture.revoke(&[(PMD_PAGES, PMD_PAGES)]).unwrap();
    assert_eq!((fixture.flushed(), fixture.entries()), (vec![], vec![]));
}

/// Row 9: a downgrade to read on the same place counts as the removal of the write grant.
#[test]
fn row_09_a_downgrade_cleans() {
    let fixture = Fixture::new(1);
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    fixture.grant(0, 0, 1, Access::Read).unwrap();
    assert_eq!((fixture.dirty(), fixture.flushed()), (vec![], vec![(0, 1)]));
    fixture.sync().unwrap();
    assert_eq!((fixture.flushed(), fixture.entries().len()), (vec![], 1));
}

/// Row 9: a write grant on what is granted to read already only tags it: no message, no new entry.
#[test]
fn row_09_an_upgrade_sends_no_message() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.source.fill(0, 2 * PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    let before = fixture.entries();
    fixture.log.take();
    fixture.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    assert_eq!(fixture.messages(), []);
    assert_eq!((fixture.entries(), fixture.dirty()), (before.clone(), vec![0]));
    // Nor does one of a part.
    fixture.grant(3, 3, 4, Access::Write).unwrap();
    assert_eq!(fixture.messages(), []);
    assert_eq!((fixture.entries(), fixture.engine.sizes()), (before, (3, 1)));
}

/// Row 9: a grant that goes during a flush may have stored behind it: the entry is not clean by
/// that flush, and the grant's own last flush still comes.
#[test]
fn row_09_a_grant_that_goes_during_a_flush() {
    let fixture = Fixture::new(2);
    fixture.grant(0, 0, 2, Access::Write).unwrap();
    fixture.log.take();
    let step = Arc::new(AtomicU32::new(0));
    let now = step.clone();
    *lock(&fixture.persist.state().during) = Some(Arc::new(move |from| {
        match (from / PAGE_BYTES, now.load(SeqCst)) {
            // The flusher, at page 1: the grant goes meanwhile.
            (1, 0) => {
                now.store(1, SeqCst);
                until(|| now.load(SeqCst) >= 2);
            }
            // The removal, at page 0: the flusher ends meanwhile.
            (0, 1) => {
                now.store(2, SeqCst);
                until(|| now.load(SeqCst) >= 3);
            }
            _ => {}
        }
    }));
    thread::scope(|scope| {
        scope.spawn(|| {
            fixture.engine.writeback(&fixture.space, PageIndex(1), PageIndex(1)).unwrap();
            step.store(3, SeqCst);
        });
        until(|| step.load(SeqCst) == 1);
        fixture.revoke(&[(0, 2)]).unwrap();
    });
    assert_eq!(fixture.flushed(), [(1, 1), (0, 1), (1, 1)]);
    assert_eq!(fixture.entries(), []);
}

/// Row 9: where the kernel knows what is dirty nothing is tagged, and a flush is one sync.
#[test]
fn row_09_where_the_kernel_tracks_nothing_is_tagged() {
    let fixture = Fixture::with(8 * PMD_PAGES * PAGE_BYTES, true);
    fixture.grant(0, 0, 8 * PMD_PAGES, Access::Write).unwrap();
    assert!(fixture.dirty().is_empty());
    fixture.log.take();
    let before = fixture.space.entries().steps();
    fixture.sync().unwrap();
    assert_eq!(fixture.log.take(), [Event::Sync]);
    assert_eq!(fixture.space.entries().steps(), before, "and walks nothing");
    fixture.revoke(&[(0, 8 * PMD_PAGES)]).unwrap();
    assert!(!fixture.log.take().contains(&Event::Sync), "the kernel still knows");
}

/// Rows 9 and 10: a failure is final for its file, whoever meets it, and for no other file.
#[test]
fn row_10_a_failed_flush_is_final_for_its_file() {
    for kernel_tracks in [false, true] {
        let fixture = Fixture::with(PAGE_BYTES, kernel_tracks);
        let other = fixture.another_file(1);
        fixture.grant(0, 0, 1, Access::Write).unwrap();
        fixture.grant_of(&other, 0, 1, 1, Access::Write).unwrap();
        fixture.persist.state().fails.store(true, SeqCst);
        assert!(fixture.sync().is_err());
        fixture.persist.state().fails.store(false, SeqCst);
        fixture.log.take();
        assert!(fixture.sync().is_err(), "a later success must not hide it");
        assert_eq!(fixture.log.take(), [], "and is not even tried");
        fixture.engine.writeback(&other, ALL.0, ALL.1).unwrap();
        fixture.revoke(&[(0, 2)]).unwrap();
        assert!(fixture.entries().is_empty(), "nothing is left behind for ever");
        fixture.grant(0, 0, 1, Access::Write).unwrap();
        assert!(fixture.sync().is_err());
    }
}

/// Row 9: the failure of a grant's last flush is not lost, though nobody waited for it.
#[test]
fn row_09_a_failed_last_flush_is_told_by_the_next() {
    let fixture = Fixture::new(1);
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    fixture.persist.state().fails.store(true, SeqCst);
    fixture.revoke(&[(0, 1)]).unwrap();
    fixture.persist.state().fails.store(false, SeqCst);
    assert!(fixture.sync().is_err());
    assert_eq!(fixture.entries(), []);
}
