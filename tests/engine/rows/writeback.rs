// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 9: which entries are dirty, and until when.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;

use super::{ALL, Fixture, pmd, until};
use testkit::fakes::{Event, lock};

/// Row 9: both fsyncs of store, fsync, store, fsync flush, because no fault reports the second
/// store. The removal of the grant flushes a last time; later fsyncs flush nothing.
#[test]
fn row_09_under_a_write_grant_every_fsync_flushes() {
    let fixture = Fixture::new(PMD_PAGES + 1);
    fixture.grant(0, 0, PMD_PAGES + 1, Access::Write).unwrap();
    let both = [(0, PMD_PAGES), (PMD_PAGES, 1)];
    for _ in 0..3 {
        fixture.log.take();
        fixture.sync().unwrap();
        assert_eq!(fixture.flushed(), both);
        assert_eq!(fixture.dirty(), [0, PMD_PAGES], "not dirty under a write grant");
    }
    fixture.revoke(&[(0, PMD_PAGES + 1)]).unwrap();
    assert_eq!(fixture.flushed(), both, "the removal of the grant did not flush");
    assert_eq!(fixture.entries(), []);
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed(), []);
}

/// Row 9: if a read grant remains, the entry remains, and is clean.
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
        "flushed or clean while page 8 still has a write grant"
    );
    fixture.revoke(&[(2 * PMD_PAGES, 1)]).unwrap();
    assert_eq!((fixture.flushed(), fixture.dirty()), (vec![(0, PMD_PAGES)], vec![]));
    assert_eq!(fixture.entries(), [(0, pmd(0))]);
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed(), [], "flushed without a write grant");
    fixture.revoke(&[(PMD_PAGES, PMD_PAGES)]).unwrap();
    assert_eq!((fixture.flushed(), fixture.entries()), (vec![], vec![]));
}

/// Row 9: a read grant over a write grant, in the same window range, counts as the write grant's
/// removal.
#[test]
fn row_09_a_downgrade_cleans() {
    let fixture = Fixture::new(1);
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    fixture.grant(0, 0, 1, Access::Read).unwrap();
    assert_eq!((fixture.dirty(), fixture.flushed()), (vec![], vec![(0, 1)]));
    fixture.sync().unwrap();
    assert_eq!((fixture.flushed(), fixture.entries().len()), (vec![], 1));
}

/// Row 9: a write grant over a read grant only marks the entry: no message, no new entry.
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
    // The same for a part of the range.
    fixture.grant(3, 3, 4, Access::Write).unwrap();
    assert_eq!(fixture.messages(), []);
    assert_eq!((fixture.entries(), fixture.engine.sizes()), (before, (3, 1)));
}

/// Row 9: the guest may store while its grant's pages are flushed and the grant is removed: that
/// flush does not clean the entry, and the removal flushes a last time.
#[test]
fn row_09_a_grant_that_goes_during_a_flush() {
    let fixture = Fixture::new(2);
    fixture.grant(0, 0, 2, Access::Write).unwrap();
    fixture.log.take();
    let step = Arc::new(AtomicU32::new(0));
    let now = step.clone();
    *lock(&fixture.persist.state().during) = Some(Arc::new(move |from| {
        match (from / PAGE_BYTES, now.load(SeqCst)) {
            // The flusher is at page 1, and the main thread removes the grant.
            (1, 0) => {
                now.store(1, SeqCst);
                until(|| now.load(SeqCst) >= 2);
            }
            // The removal is at page 0, and the flusher ends.
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

/// Row 9: if the kernel tracks dirty pages, no entry is marked, and a flush is one sync.
#[test]
fn row_09_nothing_is_marked_if_the_kernel_tracks() {
    let fixture = Fixture::with(8 * PMD_PAGES * PAGE_BYTES, true);
    fixture.grant(0, 0, 8 * PMD_PAGES, Access::Write).unwrap();
    assert!(fixture.dirty().is_empty());
    fixture.log.take();
    let before = fixture.space.entries().steps();
    fixture.sync().unwrap();
    assert_eq!(fixture.log.take(), [Event::Sync]);
    assert_eq!(fixture.space.entries().steps(), before, "the sync walked the entries");
    fixture.revoke(&[(0, 8 * PMD_PAGES)]).unwrap();
    assert!(!fixture.log.take().contains(&Event::Sync), "the removal of the grant synced");
}

/// Rows 9 and 10: a failed flush is final for its file, and does not affect other files.
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
        assert!(fixture.sync().is_err(), "a later sync hides the error");
        assert_eq!(fixture.log.take(), [], "a later sync called the disk again");
        fixture.engine.writeback(&other, ALL.0, ALL.1).unwrap();
        fixture.revoke(&[(0, 2)]).unwrap();
        assert!(fixture.entries().is_empty(), "entries are left");
        fixture.grant(0, 0, 1, Access::Write).unwrap();
        assert!(fixture.sync().is_err());
    }
}

/// Row 9: the error of a grant's last flush is not lost, although no request waits for it.
#[test]
fn row_09_a_failed_last_flush_fails_the_next_sync() {
    let fixture = Fixture::new(1);
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    fixture.persist.state().fails.store(true, SeqCst);
    fixture.revoke(&[(0, 1)]).unwrap();
    fixture.persist.state().fails.store(false, SeqCst);
    assert!(fixture.sync().is_err());
    assert_eq!(fixture.entries(), []);
}
