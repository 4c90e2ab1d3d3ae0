// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 9: what is dirty, and until when.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::sync::atomic::Ordering::SeqCst;
use std::thread;

use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;

use super::{ALL, Rig, pmd, until};
use crate::fakes::{Event, lock};

/// Row 9: store, fsync, store, fsync: both flush, since nobody can see the second store; and there
/// is no flush once the grant is gone, but a last one.
#[test]
fn row_09_under_a_write_grant_every_fsync_flushes() {
    let rig = Rig::new(PMD_PAGES + 1);
    rig.grant(0, 0, PMD_PAGES + 1, Access::Write).unwrap();
    let both = [(0, PMD_PAGES), (PMD_PAGES, 1)];
    for _ in 0..3 {
        rig.log.take();
        rig.sync().unwrap();
        assert_eq!(rig.flushed(), both);
        assert_eq!(rig.dirty(), [0, PMD_PAGES], "dirty until the grant is gone");
    }
    rig.revoke(&[(0, PMD_PAGES + 1)]).unwrap();
    assert_eq!(rig.flushed(), both, "a last flush");
    assert_eq!(rig.entries(), []);
    rig.sync().unwrap();
    assert_eq!(rig.flushed(), []);
}

/// Row 9: where a read grant stays behind, the entry stays too, and is clean.
#[test]
fn row_09_clean_when_the_last_write_grant_is_gone() {
    let rig = Rig::new(PMD_PAGES);
    rig.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    rig.grant(0, PMD_PAGES, PMD_PAGES, Access::Read).unwrap();
    rig.grant(8, 2 * PMD_PAGES, 1, Access::Write).unwrap();
    rig.log.take();
    rig.revoke(&[(0, PMD_PAGES)]).unwrap();
    assert_eq!((rig.flushed(), rig.dirty()), (vec![], vec![0]), "page 8 may still be written");
    rig.revoke(&[(2 * PMD_PAGES, 1)]).unwrap();
    assert_eq!((rig.flushed(), rig.dirty()), (vec![(0, PMD_PAGES)], vec![]));
    assert_eq!(rig.entries(), [(0, pmd(0))]);
    rig.sync().unwrap();
    assert_eq!(rig.flushed(), [], "nobody can have written");
    rig.revoke(&[(PMD_PAGES, PMD_PAGES)]).unwrap();
    assert_eq!((rig.flushed(), rig.entries()), (vec![], vec![]));
}

/// Row 9: a downgrade to read on the same place counts as the removal of the write grant.
#[test]
fn row_09_a_downgrade_cleans() {
    let rig = Rig::new(1);
    rig.grant(0, 0, 1, Access::Write).unwrap();
    rig.grant(0, 0, 1, Access::Read).unwrap();
    assert_eq!((rig.dirty(), rig.flushed()), (vec![], vec![(0, 1)]));
    rig.sync().unwrap();
    assert_eq!((rig.flushed(), rig.entries().len()), (vec![], 1));
}

/// Row 9: a write grant on what is granted to read already only tags it: no message, no new entry.
#[test]
fn row_09_an_upgrade_sends_no_message() {
    let rig = Rig::new(2 * PMD_PAGES);
    rig.source.fill(0, 2 * PMD_PAGES);
    rig.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    let before = rig.entries();
    rig.log.take();
    rig.grant(0, 0, PMD_PAGES, Access::Write).unwrap();
    assert_eq!(rig.messages(), []);
    assert_eq!((rig.entries(), rig.dirty()), (before.clone(), vec![0]));
    // Nor does one of a part.
    rig.grant(3, 3, 4, Access::Write).unwrap();
    assert_eq!(rig.messages(), []);
    assert_eq!((rig.entries(), rig.engine.sizes()), (before, (3, 1)));
}

/// Row 9: a grant that goes during a flush may have stored behind it: the entry is not clean by
/// that flush, and the grant's own last flush still comes.
#[test]
fn row_09_a_grant_that_goes_during_a_flush() {
    let rig = Rig::new(2);
    rig.grant(0, 0, 2, Access::Write).unwrap();
    rig.log.take();
    let step = Arc::new(AtomicU32::new(0));
    let now = step.clone();
    *lock(&rig.persist.state().during) = Some(Arc::new(move |from| {
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
            rig.engine.writeback(&rig.space, PageIndex(1), PageIndex(1)).unwrap();
            step.store(3, SeqCst);
        });
        until(|| step.load(SeqCst) == 1);
        rig.revoke(&[(0, 2)]).unwrap();
    });
    assert_eq!(rig.flushed(), [(1, 1), (0, 1), (1, 1)]);
    assert_eq!(rig.entries(), []);
}

/// Row 9: where the kernel knows what is dirty nothing is tagged, and a flush is one sync.
#[test]
fn row_09_where_the_kernel_tracks_nothing_is_tagged() {
    let rig = Rig::with(8 * PMD_PAGES * PAGE_BYTES, true);
    rig.grant(0, 0, 8 * PMD_PAGES, Access::Write).unwrap();
    assert!(rig.dirty().is_empty());
    rig.log.take();
    let before = rig.space.entries().steps();
    rig.sync().unwrap();
    assert_eq!(rig.log.take(), [Event::Sync]);
    assert_eq!(rig.space.entries().steps(), before, "and walks nothing");
    rig.revoke(&[(0, 8 * PMD_PAGES)]).unwrap();
    assert!(!rig.log.take().contains(&Event::Sync), "the kernel still knows");
}

/// Rows 9 and 10: a failure is final for its file, whoever meets it, and for no other file.
#[test]
fn row_10_a_failed_flush_is_final_for_its_file() {
    for kernel_tracks in [false, true] {
        let rig = Rig::with(PAGE_BYTES, kernel_tracks);
        let other = rig.another_file(1);
        rig.grant(0, 0, 1, Access::Write).unwrap();
        rig.grant_of(&other, 0, 1, 1, Access::Write).unwrap();
        rig.persist.state().fails.store(true, SeqCst);
        assert!(rig.sync().is_err());
        rig.persist.state().fails.store(false, SeqCst);
        rig.log.take();
        assert!(rig.sync().is_err(), "a later success must not hide it");
        assert_eq!(rig.log.take(), [], "and is not even tried");
        rig.engine.writeback(&other, ALL.0, ALL.1).unwrap();
        rig.revoke(&[(0, 2)]).unwrap();
        assert!(rig.entries().is_empty(), "nothing is left behind for ever");
        rig.grant(0, 0, 1, Access::Write).unwrap();
        assert!(rig.sync().is_err());
    }
}

/// Row 9: the failure of a grant's last flush is not lost, though nobody waited for it.
#[test]
fn row_09_a_failed_last_flush_is_told_by_the_next() {
    let rig = Rig::new(1);
    rig.grant(0, 0, 1, Access::Write).unwrap();
    rig.persist.state().fails.store(true, SeqCst);
    rig.revoke(&[(0, 1)]).unwrap();
    rig.persist.state().fails.store(false, SeqCst);
    assert!(rig.sync().is_err());
    assert_eq!(rig.entries(), []);
}
