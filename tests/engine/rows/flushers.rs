// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 10: the writeback of one entry, by one thread and by several.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use vhost_user_dax::dax::entry::{Block, Entry, Order, PAGE_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::Mark;

use super::entries::no_unmap;
use super::{Fixture, receive};
use testkit::fakes::lock;

fn flusher(fixture: &Arc<Fixture>, first: u64, last: u64) -> Receiver<io::Result<()>> {
    let (sender, receiver) = channel();
    let fixture = fixture.clone();
    thread::spawn(move || {
        let done = fixture.engine.writeback(&fixture.space, PageIndex(first), PageIndex(last));
        sender.send(done).unwrap();
    });
    receiver
}

/// Row 10: an entry is flushed completely, a PMD entry even if the writeback is of one page in its
/// middle.
#[test]
fn row_10_writeback_one_flushes_the_whole_entry() {
    let fixture = Fixture::new(3 * PMD_PAGES);
    fixture.grant(0, 0, 3 * PMD_PAGES, Access::Write).unwrap();
    fixture.log.take();
    let middle = PageIndex(PMD_PAGES + 77);
    fixture.engine.writeback(&fixture.space, middle, middle).unwrap();
    assert_eq!(fixture.flushed(), [(PMD_PAGES, PMD_PAGES)]);
    assert_eq!((fixture.counted().flushes, fixture.counted().bytes_written_back), (1, 2 << 20));
}

/// Row 10: a writeback skips an entry that was deleted after its search, and one whose block has
/// changed.
#[test]
fn row_10_writeback_one_skips_what_has_gone_or_moved() {
    for moved in [false, true] {
        let fixture = Fixture::new(3);
        fixture.grant(0, 0, 1, Access::Write).unwrap();
        fixture.grant(1, 1, 1, Access::Write).unwrap();
        fixture.grant(2, 2, 1, Access::Write).unwrap();
        fixture.log.take();
        let space = fixture.space.clone();
        *lock(&fixture.persist.state().during) = Some(Arc::new(move |from| {
            if from == 0 {
                space.entries().delete(PageIndex(1)).unwrap();
                if moved {
                    let page = PageIndex(1);
                    let mut held = space.entries().grab(page, Order::Pte, &mut no_unmap).unwrap();
                    held.fill(Entry::real(Order::Pte, Block::new(5).unwrap()), &mut no_unmap);
                    held.mark(Mark::ToWrite, true);
                }
            }
        }));
        fixture.sync().unwrap();
        assert_eq!(fixture.flushed(), [(0, 1), (2, 1)], "moved: {moved}");
    }
}

/// Row 10: two flushers of one entry: the second does not return before the first has flushed it.
#[test]
fn row_10_two_flushers_of_one_entry() {
    let fixture = Arc::new(Fixture::new(1));
    fixture.grant(0, 0, 1, Access::Write).unwrap();
    let stop = fixture.persist.stop_in_flush();
    let first = flusher(&fixture, 0, 0);
    stop.wait_stopped();
    let second = flusher(&fixture, 0, 0);
    fixture.until_waits(1);
    assert!(second.try_recv().is_err() && first.try_recv().is_err());
    stop.open();
    receive(&first).unwrap();
    receive(&second).unwrap();
}

/// Row 10: the second flusher waits, too, if the first one clears the entry's mark between the
/// second one's marking and its search.
#[test]
fn row_10_two_flushers_when_the_mark_is_gone_before_the_search() {
    // 65 entries are one more than a batch, so the last one is searched for later.
    let fixture = Arc::new(Fixture::new(65));
    fixture.source.state().maps_pmd.store(false, SeqCst);
    fixture.grant(0, 0, 65, Access::Write).unwrap();
    let (batch, last) =
        (testkit::fakes::FlushStop::default(), testkit::fakes::FlushStop::default());
    let (batch_stops, last_stops) = (batch.clone(), last.clone());
    *lock(&fixture.persist.state().during) = Some(Arc::new(move |from| match from / PAGE_BYTES {
        63 => batch_stops.stop(),
        64 => last_stops.stop(),
        _ => {}
    }));
    let second = flusher(&fixture, 0, 64);
    batch.wait_stopped();
    let first = flusher(&fixture, 64, 64);
    last.wait_stopped();
    batch.open();
    fixture.until_waits(1);
    assert!(second.try_recv().is_err(), "the second writeback returned before page 64 was flushed");
    last.open();
    receive(&first).unwrap();
    receive(&second).unwrap();
}

/// Row 10: a flusher that waited for another one's flush gets its error.
#[test]
fn row_10_a_flusher_that_waited_gets_the_error() {
    for _ in 0..50 {
        let fixture = Arc::new(Fixture::new(1));
        fixture.grant(0, 0, 1, Access::Write).unwrap();
        let stop = fixture.persist.stop_in_flush();
        let first = flusher(&fixture, 0, 0);
        stop.wait_stopped();
        let second = flusher(&fixture, 0, 0);
        fixture.until_waits(1);
        fixture.persist.state().fails.store(true, SeqCst);
        stop.open();
        assert!(receive(&first).is_err());
        assert!(receive(&second).is_err());
    }
}

/// Row 10: a flush does not cover a store made during it: a write grant made during the flush makes
/// the entry dirty after it.
#[test]
fn row_10_a_grant_during_the_flush_dirties_after_it() {
    let fixture = Arc::new(Fixture::new(1));
    fixture.source.fill(0, 1);
    fixture.grant(0, 0, 1, Access::Read).unwrap();
    let held = fixture.space.entries().grab(PageIndex(0), Order::Pte, &mut no_unmap).unwrap();
    held.mark(Mark::Dirty, true);
    drop(held);
    let stop = fixture.persist.stop_in_flush();
    let flush = flusher(&fixture, 0, 0);
    stop.wait_stopped();
    thread::scope(|scope| {
        scope.spawn(|| fixture.grant(0, 1, 1, Access::Write).unwrap());
        fixture.until_waits(1);
        stop.open();
    });
    receive(&flush).unwrap();
    assert_eq!(fixture.dirty(), [0]);
}
