// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 8 and 9, the window's side: grants that replace, split and remove other grants, and a
//! front-end that refuses a message of such a change.

use std::sync::atomic::Ordering::SeqCst;

use vhost_user_dax::dax::engine::GrantError;
use vhost_user_dax::dax::entry::{Order, PAGE_BYTES, PMD_PAGES};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::window::layout::ShowError;

use super::{Fixture, map, pte, unmap, zero};
use testkit::fakes::lock;

type Change = fn(&Fixture) -> Result<(), GrantError>;

/// Three adjacent grants.
fn prepared() -> Fixture {
    let fixture = Fixture::new(8 * PMD_PAGES);
    fixture.grant(0, 0, 100, Access::Read).unwrap();
    fixture.grant(1000, 100, 100, Access::Write).unwrap();
    fixture.grant(2000, 200, 100, Access::Read).unwrap();
    fixture.log.take();
    fixture
}

const CHANGES: [(&str, u64, Change); 6] = [
    ("replace one grant", 2, |fixture| fixture.grant(500, 100, 100, Access::Read)),
    ("replace one grant and parts of two", 6, |fixture| fixture.grant(500, 50, 200, Access::Write)),
    ("replace the middle of a grant", 4, |fixture| fixture.grant(500, 120, 10, Access::Write)),
    ("remove the middle of a grant", 3, |fixture| fixture.revoke(&[(120, 10)])),
    ("remove parts of two grants", 4, |fixture| fixture.revoke(&[(50, 100)])),
    ("remove all grants", 3, |fixture| fixture.revoke(&[(0, 300)])),
];

/// Row 8: a refused message, at any position, leaves maps, grants, entries and dirty marks as
/// before, and the same change succeeds afterwards.
#[test]
fn row_08_a_refused_message_leaves_all_as_before() {
    for (what, steps, change) in CHANGES {
        for position in 0..steps {
            let fixture = prepared();
            let state = |fixture: &Fixture| {
                (fixture.mapper.maps(), fixture.engine.sizes(), fixture.entries(), fixture.dirty())
            };
            let before = state(&fixture);
            *lock(&fixture.mapper.refuse_in) = Some(position);
            let refused = change(&fixture).expect_err(what);
            assert!(
                matches!(refused, GrantError::Window(ShowError::Refused(_))),
                "{what}, step {position}: {refused}"
            );
            assert_eq!(state(&fixture), before, "{what}, step {position}");
            *lock(&fixture.mapper.refuse_in) = None;
            change(&fixture).unwrap();
            fixture.revoke(&[(0, 300)]).unwrap();
            assert_eq!((fixture.engine.sizes(), fixture.entries()), ((0, 0), vec![]), "{what}");
        }
        let fixture = prepared();
        *lock(&fixture.mapper.refuse_in) = Some(steps);
        change(&fixture).unwrap_or_else(|e| panic!("{what} takes more than {steps} steps: {e}"));
    }
}

/// Row 8: if the front-end refuses the rollback, too, the error is another one, and the rest can be
/// removed.
#[test]
fn row_08_a_refused_rollback_is_reported() {
    let fixture = prepared();
    fixture.mapper.refuse_for_ever.store(true, SeqCst);
    *lock(&fixture.mapper.refuse_in) = Some(3);
    let torn = fixture.grant(500, 50, 200, Access::Write).unwrap_err();
    assert!(matches!(torn, GrantError::Window(ShowError::Torn(_))), "{torn}");
    assert!(fixture.mapper.maps().is_empty());
    fixture.mapper.refuse_for_ever.store(false, SeqCst);
    *lock(&fixture.mapper.refuse_in) = None;
    fixture.revoke(&[(0, 300)]).unwrap();
    assert_eq!((fixture.engine.sizes(), fixture.entries()), ((0, 0), vec![]));
}

/// Row 8: a grant over others unmaps whole maps, and maps again the parts of the old grants outside
/// the new one.
#[test]
fn row_08_a_grant_over_others_is_planned_in_whole_maps() {
    let fixture = prepared();
    fixture.grant(500, 50, 200, Access::Write).unwrap();
    let mut sent = fixture.messages();
    sent[3..].sort_by_key(|event| format!("{event:?}"));
    let mut expected = [
        unmap(0, 100),
        unmap(100, 100),
        unmap(200, 100),
        map(0, 0, 50),
        map(50, 500, 200),
        map(250, 2050, 50),
    ];
    expected[3..].sort_by_key(|event| format!("{event:?}"));
    assert_eq!(sent, expected);
    assert_eq!(fixture.engine.sizes(), (3, 3));
    let pages: Vec<_> = fixture.entries().into_iter().map(|(page, _)| page).collect();
    let left: Vec<_> = (0..50).chain(500..700).chain(2050..2100).collect();
    assert_eq!(pages, left, "entries without a grant are left, or entries are missing");
    assert_eq!(fixture.dirty(), (500..700).collect::<Vec<_>>());
}

/// Row 8: the limit on maps is lowered below the number of live maps, as when other devices add
/// maps. Removals, replacements and a truncation still succeed; only changes that add maps are
/// refused, and the other ranges of a list are removed.
#[test]
fn row_08_a_lowered_limit_refuses_only_what_adds_maps() {
    for most in 0..=3 {
        let fixture = prepared();
        fixture.engine.set_most_maps(most);
        let full = |done| matches!(done, Err(GrantError::Window(ShowError::TooMany(most_maps))) if most_maps == most);
        assert!(full(fixture.grant(0, 400, 10, Access::Read)), "{most}: one more map was allowed");
        assert!(
            full(fixture.revoke(&[(120, 10), (0, 50)])),
            "{most}: the split of a map was allowed"
        );
        assert_eq!(fixture.engine.sizes(), (3, 3), "{most}: the number of grants or maps changed");
        assert!(!fixture.entries().iter().any(|(page, _)| *page < 50), "{most}");
        fixture.grant(3000, 100, 100, Access::Write).unwrap();
        fixture.engine.resize(&fixture.space, 2010 * PAGE_BYTES).unwrap();
        let end = |(bytes, _, from): (u64, u64, u64)| (from + bytes) / PAGE_BYTES;
        assert!(fixture.mapper.maps().into_values().all(|map| end(map) <= 2010), "{most}");
        fixture.revoke(&[(0, 75), (250, 50), (100, 100), (0, 300)]).unwrap();
        assert_eq!((fixture.engine.sizes(), fixture.entries()), ((0, 0), vec![]), "{most}");
    }
}

/// Row 9: the removal of a part keeps the rest granted: its entries, its dirty marks, and its maps.
#[test]
fn row_09_removal_of_a_part() {
    let fixture = Fixture::new(100);
    fixture.grant(0, 0, 100, Access::Write).unwrap();
    fixture.log.take();
    fixture.revoke(&[(40, 20)]).unwrap();
    let flushed = fixture.flushed();
    assert_eq!(
        flushed,
        (40..60).map(|page| (page, 1)).collect::<Vec<_>>(),
        "the removed pages were not flushed"
    );
    assert_eq!(fixture.dirty(), (0..40).chain(60..100).collect::<Vec<_>>());
    let maps: Vec<_> = fixture
        .mapper
        .maps()
        .into_iter()
        .map(|(at, (bytes, _, from))| (at / PAGE_BYTES, bytes / PAGE_BYTES, from / PAGE_BYTES))
        .collect();
    assert_eq!(maps, [(0, 40, 0), (60, 40, 60)]);
}

/// Row 9: one list removes ranges of several files, in any order, with pages without a grant in
/// between.
#[test]
fn row_09_removal_of_ranges_of_several_files() {
    let fixture = Fixture::new(PMD_PAGES);
    let (second, third) = (fixture.another_file(PMD_PAGES), fixture.another_file(4));
    fixture.grant(0, 0, 10, Access::Write).unwrap();
    fixture.grant_of(&second, 0, 10, 10, Access::Write).unwrap();
    fixture.grant_of(&third, 0, 40, 4, Access::Read).unwrap();
    fixture.revoke(&[(40, 4), (5, 10), (20, 20), (0, 1)]).unwrap();
    assert_eq!(third.entries().len(), 0);
    assert_eq!((fixture.entries().len(), second.entries().len()), (4, 5));
    assert_eq!(fixture.engine.sizes(), (2, 2));
    // The front-end refuses in the middle of a list: the ranges before it are removed.
    *lock(&fixture.mapper.refuse_in) = Some(2);
    assert!(fixture.revoke(&[(1, 2), (3, 1), (15, 5)]).is_err());
    assert_eq!((fixture.entries().len(), second.entries().len()), (2, 5));
    fixture.revoke(&[(0, 1), (0, 64), (0, 64)]).unwrap();
    assert_eq!(
        (fixture.entries().len(), second.entries().len(), fixture.engine.sizes()),
        (0, 0, (0, 0))
    );
}

/// Row 9: at a virtio reset the front-end drops all maps by itself; afterwards all can be granted
/// anew.
#[test]
fn row_09_a_reset_forgets_all_and_flushes_a_last_time() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.grant(0, 0, 4, Access::Write).unwrap();
    fixture.log.take();
    fixture.mapper.drop_all();
    fixture.engine.reset();
    assert_eq!(fixture.flushed().len(), 4);
    assert_eq!((fixture.engine.sizes(), fixture.entries()), ((0, 0), vec![]));
    fixture.grant(0, 0, 2, Access::Read).unwrap();
    assert_eq!(fixture.messages(), [map(0, 0, 2)]);
    assert_eq!(fixture.entries(), [(0, pte(0)), (1, pte(1))]);
    assert_ne!(fixture.entries()[0].1, zero(Order::Pte));
}
