// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 3 and 5: an entry is grabbed, split and deleted.

use std::sync::mpsc;
use std::sync::{Arc, Barrier};
use std::thread;

use vhost_user_dax::dax::entries::Entries;
use vhost_user_dax::dax::entry::{Entry, Order, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::{Mark, Occupied};
use vhost_user_dax::dax::wait::{SpaceId, WaitTable};

use super::{Fixture, own_block, pmd, pte, receive, until, zero};

pub fn no_unmap(at: PageIndex, order: Order) {
    panic!("{order:?} at {at:?} was unmapped");
}

pub fn new_entries() -> (Arc<Entries>, Arc<WaitTable>) {
    let waits = Arc::new(WaitTable::default());
    (Arc::new(Entries::new(SpaceId(7), waits.clone())), waits)
}

/// Puts an unlocked entry into the index.
pub fn put(entries: &Entries, page: u64, entry: Entry) {
    let mut held = entries.grab(PageIndex(page), entry.order(), &mut no_unmap).unwrap();
    if !entry.is_empty() {
        held.fill(entry, &mut no_unmap);
    }
}

fn look(entries: &Entries, page: u64) -> Option<(u64, Entry)> {
    let page = PageIndex(page);
    entries.next(page, page, None).map(|(start, entry)| (start.0, entry))
}

struct Case {
    found: Option<(u64, Entry)>,
    asked: Order,
    /// The entry that `grab` returns, with its first page.
    got: Result<(u64, Entry), Occupied>,
    split: bool,
    unmapped: bool,
}

fn cases() -> Vec<Case> {
    use Order::{Pmd, Pte};
    let at = PMD_PAGES + 7;
    let chunk = PMD_PAGES;
    let case = |found, asked, got| Case { found, asked, got, split: false, unmapped: false };
    let split = |found, unmapped| {
        let got = Ok((at, Entry::empty(Pte)));
        Case { found: Some((chunk, found)), asked: Pte, got, split: true, unmapped }
    };
    let same = |start, entry, asked| case(Some((start, entry)), asked, Ok((start, entry)));
    let refused = |start, entry| case(Some((start, entry)), Pmd, Err(Occupied));
    vec![
        case(None, Pte, Ok((at, Entry::empty(Pte)))),
        case(None, Pmd, Ok((chunk, Entry::empty(Pmd)))),
        same(at, zero(Pte), Pte),
        same(at, Entry::empty(Pte), Pte),
        same(at, pte(at), Pte),
        same(chunk, zero(Pmd), Pmd),
        same(chunk, Entry::empty(Pmd), Pmd),
        same(chunk, pmd(chunk), Pmd),
        // A PTE request gets a PMD entry with blocks unchanged.
        same(chunk, pmd(chunk), Pte),
        split(zero(Pmd), true),
        split(Entry::empty(Pmd), false),
        // PTE entries block a PMD request, at the asked page or anywhere in the chunk.
        refused(at, pte(at)),
        refused(at, zero(Pte)),
        refused(at, Entry::empty(Pte)),
        refused(chunk, pte(chunk)),
        refused(2 * chunk - 1, zero(Pte)),
        // A PTE entry of another page does not block a PTE request.
        case(Some((at + 1, pte(at + 1))), Pte, Ok((at, Entry::empty(Pte)))),
        // An entry of the next chunk blocks nothing.
        case(Some((2 * chunk, pte(2 * chunk))), Pmd, Ok((chunk, Entry::empty(Pmd)))),
    ]
}

/// Row 3: every pair of requested and existing order; PTE entries are never merged into a PMD
/// entry.
#[test]
fn row_03_grab_mapping_entry_every_pair() {
    let at = PMD_PAGES + 7;
    for (n, case) in cases().into_iter().enumerate() {
        let (entries, _) = new_entries();
        if let Some((start, entry)) = case.found {
            put(&entries, start, entry);
        }
        let mut unmapped = Vec::new();
        let held = entries.grab(PageIndex(at), case.asked, &mut |start, order| {
            let there = look(&entries, start.0).unwrap();
            assert!(
                there.1.is_locked(),
                "case {n}: the page was unmapped without the entry's lock"
            );
            unmapped.push((start.0, order));
        });
        let got = held.as_ref().map(|held| (held.start().0, held.entry()));
        assert_eq!(got.map_err(|e| *e), case.got, "case {n}");
        let expected: &[_] = if case.unmapped { &[(PMD_PAGES, Order::Pmd)] } else { &[] };
        assert_eq!(unmapped, expected, "case {n}");
        if let Ok(held) = &held {
            assert_eq!(held.was_split(), case.split, "case {n}");
            let (start, there) = look(&entries, held.start().0).unwrap();
            assert_eq!((start, there), (held.start().0, held.entry().locked()), "case {n}");
        }
        drop(held);
        match (case.got, case.found) {
            (Ok((start, entry)), _) => {
                assert_eq!(
                    look(&entries, start),
                    Some((start, entry)),
                    "case {n}: the entry is not back, unlocked"
                );
                let left = u64::from(case.found.is_some_and(|(other, there)| {
                    other != start && there.order() == Order::Pte
                        || other / PMD_PAGES != start / PMD_PAGES
                }));
                assert_eq!(entries.len(), 1 + left, "case {n}");
            }
            (Err(_), found) => {
                assert_eq!(
                    look(&entries, found.unwrap().0),
                    found,
                    "case {n}: a refused grab changed the entry"
                );
                assert_eq!(entries.len(), 1, "case {n}");
            }
        }
    }
}

/// Row 3: a write grant of one page of a PMD entry with blocks keeps that entry, and marks all of
/// it dirty.
#[test]
fn row_03_grab_mapping_entry_leaves_a_real_pmd_and_dirties_it() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.source.fill(0, PMD_PAGES);
    fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap();
    assert_eq!((fixture.entries(), fixture.dirty()), (vec![(0, pmd(0))], vec![]));
    fixture.grant(100, PMD_PAGES + 100, 1, Access::Write).unwrap();
    assert_eq!((fixture.entries(), fixture.dirty()), (vec![(0, pmd(0))], vec![0]));
    fixture.sync().unwrap();
    assert_eq!(fixture.flushed(), [(0, PMD_PAGES)]);
}

/// Row 3: threads ask for both orders all over one chunk: each entry is held by one thread, and no
/// two entries overlap.
#[test]
fn row_03_grab_mapping_entry_races() {
    let (entries, waits) = new_entries();
    let owners: Arc<Vec<_>> =
        Arc::new((0..PMD_PAGES).map(|_| std::sync::atomic::AtomicBool::new(false)).collect());
    let begin = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..4u64 {
            let (entries, owners, begin) = (&entries, &owners, &begin);
            scope.spawn(move || {
                begin.wait();
                for n in 0..2_000u64 {
                    let page = (n * 7 + thread * 3) % 16 * 31;
                    let order = if (n + thread) % 5 == 0 { Order::Pmd } else { Order::Pte };
                    let Ok(held) = entries.grab(PageIndex(page), order, &mut |_, _| ()) else {
                        continue;
                    };
                    use std::sync::atomic::Ordering::SeqCst;
                    let covered = held.start().0..held.start().0 + held.entry().order().pages();
                    let mine = &owners[covered.start as usize..covered.end as usize];
                    let taken = mine.iter().any(|page| page.swap(true, SeqCst));
                    assert!(!taken, "{covered:?} is held twice");
                    mine.iter().for_each(|page| page.store(false, SeqCst));
                    if n % 3 == 0 { held.delete() } else { drop(held) }
                }
            });
        }
    });
    assert_eq!(waits.waiting(), 0);
}

/// Row 5: a deletion waits for the entry's lock, and deletes dirty entries, too.
#[test]
fn row_05_delete_mapping_entry_waits_for_the_lock() {
    let (entries, waits) = new_entries();
    let mut held = entries.grab(PageIndex(3), Order::Pte, &mut no_unmap).unwrap();
    let (done, deleted) = mpsc::channel();
    let deleter = entries.clone();
    thread::spawn(move || done.send(deleter.delete(PageIndex(3))));
    until(|| waits.waiting() == 1);
    assert!(deleted.try_recv().is_err(), "the entry was deleted while it was locked");
    held.fill(Entry::real(Order::Pte, own_block(3)), &mut no_unmap);
    held.mark(Mark::Dirty, true);
    drop(held);
    assert_eq!(
        receive(&deleted),
        Some((PageIndex(3), pte(3))),
        "the deletion returned another entry than the unlocked one"
    );
    assert!(entries.is_empty());
    assert_eq!(entries.delete(PageIndex(3)), None);
}

/// Row 5: `invalidate_clean` keeps entries marked Dirty or ToWrite, and deletes the others.
#[test]
fn row_05_invalidate_leaves_what_is_dirty() {
    for mark in [Mark::Dirty, Mark::ToWrite] {
        for (page, entry) in [(9, pte(9)), (PMD_PAGES, pmd(PMD_PAGES))] {
            let (entries, _) = new_entries();
            put(&entries, page, entry);
            let set = |on| {
                let order = entry.order();
                entries.grab(PageIndex(page), order, &mut no_unmap).unwrap().mark(mark, on)
            };
            set(true);
            assert!(!entries.invalidate_clean(PageIndex(page)), "{mark:?}");
            assert_eq!(look(&entries, page), Some((page, entry)));
            set(false);
            assert!(
                entries.invalidate_clean(PageIndex(page)),
                "the entry is clean again, but was kept"
            );
            assert!(entries.is_empty());
            assert!(
                !entries.invalidate_clean(PageIndex(page)),
                "it returned true without an entry"
            );
        }
    }
}

/// Row 5: truncations while other threads grant, write back and revoke: no entry remains beyond the
/// end of the file, and none after the last revoke.
#[test]
fn row_05_truncate_under_load() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    thread::scope(|scope| {
        for half in 0..2 {
            let fixture = &fixture;
            scope.spawn(move || {
                for n in 0..300 {
                    let access = if n % 2 == 0 { Access::Write } else { Access::Read };
                    // Fails if the range is beyond the end of the file at this moment.
                    let _ = fixture.grant(half * PMD_PAGES + n % 40, half * PMD_PAGES, 8, access);
                    fixture.sync().unwrap();
                    if n % 3 == 0 {
                        fixture.revoke(&[(half * PMD_PAGES, 8)]).unwrap();
                    }
                }
            });
        }
        for n in 0..150 {
            let pages = if n % 2 == 0 { PMD_PAGES + n % 20 } else { 2 * PMD_PAGES };
            fixture.engine.resize(&fixture.space, pages * 4096).unwrap();
            let past = fixture.space.entries().next(PageIndex(pages), PageIndex::LAST, None);
            assert!(pages == 2 * PMD_PAGES || past.is_none(), "{past:?} at or after page {pages}");
        }
    });
    fixture.revoke(&[(0, 2 * PMD_PAGES)]).unwrap();
    assert_eq!((fixture.entries(), fixture.mapper.maps().len()), (vec![], 0));
}
