// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Model checking with loom: the interleavings of two or three threads (with at most 3 preemptions)
//! over the entry lock, the wait table, splits and writebacks. Loom reports a lost wake-up as a
//! deadlock. Run by `ci/loom`.

use std::fs::File;
use std::io;

use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use loom::thread;

use super::engine::{Engine, Space, Span};
use super::entries::Entries;
use super::entry::{Block, Entry, Order, PAGE_BYTES, PMD_PAGES, PageIndex};
use super::extent::{Access, Backed, Extent, ExtentSource};
use super::index::Mark;
use super::sync::Arc;
use super::wait::{SpaceId, WaitTable};
use crate::persist::{LineFlush, Persist};
use crate::window::{FileOffset, FileRange, MapError, Mapper, WindowBytes, WindowOffset};

fn check(test: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(test);
}

fn no_unmap(_: PageIndex, _: Order) {}

fn entries(filled: Option<(PageIndex, Entry)>) -> (Arc<Entries>, Arc<WaitTable>) {
    let waits = Arc::new(WaitTable::default());
    let entries = Entries::new(SpaceId(1), waits.clone());
    if let Some((page, entry)) = filled {
        entries.index().insert(page, entry).unwrap();
    }
    (Arc::new(entries), waits)
}

/// Runs `a` and `b` in two new threads and `c` in this thread, and waits until all have ended.
fn together(
    a: impl FnOnce() + Send + 'static,
    b: impl FnOnce() + Send + 'static,
    c: impl FnOnce(),
) {
    let (a, b) = (thread::spawn(a), thread::spawn(b));
    c();
    a.join().unwrap();
    b.join().unwrap();
}

fn real(order: Order) -> Entry {
    Entry::real(order, Block::new(PMD_PAGES).unwrap())
}

/// Shows: of three threads that grab different pages of one PMD, one at a time holds the entry, and
/// each gets it (rows 2 and 3).
#[test]
fn one_holder_at_a_time() {
    check(|| {
        let (entries, waits) = entries(Some((PageIndex(0), real(Order::Pmd))));
        let inside = Arc::new(AtomicUsize::new(0));
        let turn = |page: u64| {
            let (entries, inside) = (entries.clone(), inside.clone());
            move || {
                let held = entries.grab(PageIndex(page), Order::Pte, &mut no_unmap).unwrap();
                let holders = inside.fetch_add(1, Ordering::SeqCst);
                assert_eq!(holders, 0, "two threads hold one entry");
                inside.fetch_sub(1, Ordering::SeqCst);
                drop(held);
            }
        };
        together(turn(3), turn(500), turn(7));
        assert_eq!(waits.waiting(), 0);
    });
}

/// Shows: a thread that is woken for an entry and does not lock it wakes the next waiter (row 4).
#[test]
fn a_wake_up_that_is_not_used_is_passed_on() {
    check(|| {
        let (entries, waits) = entries(Some((PageIndex(0), real(Order::Pte))));
        entries.index().set_mark(PageIndex(0), Mark::Dirty, true);
        let grab = || {
            let entries = entries.clone();
            move || drop(entries.grab(PageIndex(0), Order::Pte, &mut no_unmap).unwrap())
        };
        let looker = entries.clone();
        let look = move || assert!(!looker.invalidate_clean(PageIndex(0)), "it is dirty");
        together(grab(), look, grab());
        assert_eq!(waits.waiting(), 0);
    });
}

/// Shows: a deletion wakes all waiting threads, and each finds that the entry was deleted (rows 2
/// and 5).
#[test]
fn a_deletion_wakes_all_waiters() {
    check(|| {
        let (entries, waits) = entries(Some((PageIndex(9), real(Order::Pte))));
        let delete = || {
            let entries = entries.clone();
            move || {
                let _ = entries.delete(PageIndex(9));
            }
        };
        let grabber = entries.clone();
        together(delete(), delete(), || {
            drop(grabber.grab(PageIndex(9), Order::Pte, &mut no_unmap).unwrap());
        });
        assert_eq!(waits.waiting(), 0);
    });
}

/// Shows: two threads that write to different pages of one PMD hole split it once, and the entries
/// of both stay (row 3).
#[test]
fn a_split_beside_a_write() {
    check(|| {
        let (entries, waits) = entries(Some((PageIndex(0), Entry::zero(Order::Pmd))));
        let unmapped = Arc::new(AtomicUsize::new(0));
        let write = |page: u64| {
            let (entries, unmapped) = (entries.clone(), unmapped.clone());
            move || {
                let mut count = |_, _| {
                    unmapped.fetch_add(1, Ordering::SeqCst);
                };
                let mut held = entries.grab(PageIndex(page), Order::Pte, &mut count).unwrap();
                assert_eq!(held.entry(), Entry::empty(Order::Pte));
                held.fill(real(Order::Pte), &mut no_unmap);
                held.mark(Mark::Dirty, true);
            }
        };
        together(write(1), write(2), || {});
        let index = entries.index();
        for page in [1, 2] {
            assert_eq!(index.get(PageIndex(page)), Some((PageIndex(page), real(Order::Pte))));
            assert!(index.is_marked(PageIndex(page), Mark::Dirty));
        }
        assert_eq!((index.len(), unmapped.load(Ordering::SeqCst), waits.waiting()), (2, 1, 0));
    });
}

struct OneExtent(Arc<File>);

impl ExtentSource for OneExtent {
    fn file(&self) -> &Arc<File> {
        &self.0
    }

    fn file_bytes(&self) -> io::Result<u64> {
        Ok(PAGE_BYTES)
    }

    fn maps_pmd(&self) -> bool {
        false
    }

    fn allocate(&self, _: PageIndex, _: PageIndex) -> io::Result<()> {
        Ok(())
    }

    fn extent(&self, start: PageIndex, pages: u64, _: Access) -> io::Result<Extent> {
        Ok(Extent { start, pages, backed: Backed::Mapped(Block::new(start.0).unwrap()) })
    }

    fn set_bytes(&self, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn zero(&self, _: FileRange, _: bool) -> io::Result<()> {
        Ok(())
    }
}

struct Yes;

impl Mapper for Yes {
    fn map(
        &self,
        _: WindowOffset,
        _: &File,
        _: FileOffset,
        _: WindowBytes,
    ) -> Result<(), MapError> {
        Ok(())
    }

    fn unmap(&self, _: WindowOffset, _: WindowBytes) -> Result<(), MapError> {
        Ok(())
    }
}

/// One page of memory: whether a store is in its cache line, and whether a flush has made that
/// store durable. If the second field is true, each flush fails.
#[derive(Clone, Default)]
struct Line(Arc<(AtomicBool, AtomicBool)>, bool);

impl Line {
    fn broken() -> Self {
        Self(Arc::default(), true)
    }

    fn store(&self) {
        self.0.0.store(true, Ordering::SeqCst);
    }

    fn is_durable(&self) -> bool {
        self.0.1.load(Ordering::SeqCst)
    }
}

impl LineFlush for Line {
    fn flush(&self, _: FileRange) -> io::Result<()> {
        if self.1 {
            return Err(io::Error::other("the flush of this line fails"));
        }
        self.0.1.fetch_or(self.0.0.load(Ordering::SeqCst), Ordering::SeqCst);
        Ok(())
    }

    fn fence(&self) {}
}

fn engine(line: &Line) -> (Arc<Engine>, Arc<Space>, Span) {
    let window = WindowBytes(PAGE_BYTES);
    let engine = Engine::new(window, Arc::new(Yes), 8);
    let file = Arc::new(File::open("/dev/null").unwrap());
    let space = engine.space(Box::new(OneExtent(file)), Persist::lines(line.clone()));
    let span = engine.span(WindowOffset(0), window).unwrap();
    (Arc::new(engine), space, span)
}

fn fsync(engine: &Engine, space: &Space) {
    engine.writeback(space, PageIndex(0), PageIndex(0)).unwrap();
}

/// Shows: of two threads that write back one entry, neither returns before the line is flushed (row
/// 10).
#[test]
fn neither_of_two_flushers_returns_early() {
    check(|| {
        let line = Line::default();
        let (engine, space, span) = engine(&line);
        engine.grant(&space, FileOffset(0), span, Access::Write, || true).unwrap();
        line.store();
        let flusher = || {
            let (engine, space, line) = (engine.clone(), space.clone(), line.clone());
            move || {
                fsync(&engine, &space);
                assert!(line.is_durable());
            }
        };
        together(flusher(), flusher(), || {});
    });
}

/// Shows: of two threads that write back one entry whose flush fails, neither returns success (row
/// 10).
#[test]
fn both_of_two_flushers_learn_of_a_failure() {
    check(|| {
        let (engine, space, span) = engine(&Line::broken());
        engine.grant(&space, FileOffset(0), span, Access::Write, || true).unwrap();
        let flusher = || {
            let (engine, space) = (engine.clone(), space.clone());
            move || assert!(engine.writeback(&space, PageIndex(0), PageIndex(0)).is_err())
        };
        together(flusher(), flusher(), || {});
    });
}

/// Shows: a write grant is made while another thread writes back. A store under it is durable after
/// the next writeback (row 9).
#[test]
fn a_write_grant_beside_a_writeback() {
    check(|| {
        let line = Line::default();
        let (engine, space, span) = engine(&line);
        engine.grant(&space, FileOffset(0), span, Access::Read, || true).unwrap();
        let (other, there) = (engine.clone(), space.clone());
        let (guest, store, stores_into) = (engine.clone(), space.clone(), line.clone());
        together(
            move || fsync(&other, &there),
            move || {
                guest.grant(&store, FileOffset(0), span, Access::Write, || true).unwrap();
                stores_into.store();
                fsync(&guest, &store);
                assert!(stores_into.is_durable());
            },
            || {},
        );
    });
}

/// Shows: one thread writes back while another removes the grant. No entry is left, and each thread
/// returns only after the store before is durable (rows 9 and 11).
#[test]
fn a_removal_beside_a_writeback() {
    check(|| {
        let line = Line::default();
        let (engine, space, span) = engine(&line);
        engine.grant(&space, FileOffset(0), span, Access::Write, || true).unwrap();
        line.store();
        let (other, there, after) = (engine.clone(), space.clone(), line.clone());
        let (guest, gone) = (engine.clone(), line.clone());
        together(
            move || {
                fsync(&other, &there);
                assert!(after.is_durable());
            },
            move || {
                guest.revoke(&[span]).unwrap();
                assert!(gone.is_durable());
            },
            || {},
        );
        assert!(space.entries().index().is_empty());
    });
}
