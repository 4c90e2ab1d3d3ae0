// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 13: READ and WRITE besides the window.

use std::sync::atomic::Ordering::SeqCst;

use nix::errno::Errno;
use vhost_user_dax::dax::entry::{Order, PAGE_BYTES, PMD_BYTES, PMD_PAGES};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::window::FileOffset;

use super::{Fixture, map, pmd, pte, unmap_hole};
use testkit::fakes::Event;

fn write(fixture: &Fixture, from: u64, data: &[u8]) -> usize {
    fixture.engine.write(&fixture.space, FileOffset(from), data).unwrap()
}

/// Row 13: a read stops at the end of the file, reads holes as zeros, and allocates no block.
#[test]
fn row_13_a_read_stops_at_eof_and_reads_holes_as_zeros() {
    let fixture = Fixture::with(3 * PAGE_BYTES + 5, false);
    write(&fixture, PAGE_BYTES, b"data");
    let allocated = fixture.source.allocated();
    fixture.log.take();
    let mut to = vec![0xff; 4 * PAGE_BYTES as usize];
    let read =
        |from, to: &mut [u8]| fixture.engine.read(&fixture.space, FileOffset(from), to).unwrap();
    assert_eq!(read(0, &mut to), 3 * PAGE_BYTES as usize + 5);
    let (file, behind) = to.split_at(3 * PAGE_BYTES as usize + 5);
    assert_eq!(&file[PAGE_BYTES as usize..][..4], b"data");
    assert_eq!(file.iter().filter(|byte| **byte != 0).count(), 4);
    assert!(behind.iter().all(|byte| *byte == 0xff), "the read stored beyond the end of the file");
    assert_eq!(read(3 * PAGE_BYTES + 4, &mut to), 1);
    assert_eq!(read(3 * PAGE_BYTES + 5, &mut to), 0);
    assert_eq!(read(u64::MAX, &mut to), 0);
    assert_eq!((fixture.log.take(), fixture.source.allocated()), (vec![], allocated));
}

/// Row 13: a write to a hole makes the window show the new blocks: the hole is unmapped, and its
/// entries are replaced.
#[test]
fn row_13_a_write_to_a_hole_shows_in_the_window() {
    let fixture = Fixture::new(2 * PMD_PAGES);
    fixture.grant(0, 0, 2 * PMD_PAGES, Access::Read).unwrap();
    fixture.log.take();
    assert_eq!(write(&fixture, 5 * PAGE_BYTES + 1, &[1; 4096]), 4096);
    let allocated = Event::Allocate { first: 5, last: 6 };
    let events = fixture.log.take();
    assert_eq!(events[0], allocated);
    assert_eq!(events.last(), Some(&unmap_hole(0, PMD_PAGES)));
    for (page, entry) in fixture.entries().into_iter().take(PMD_PAGES as usize) {
        assert_eq!((entry.order(), entry.is_real()), (Order::Pte, (5..=6).contains(&page)));
    }
    assert!(fixture.dirty().is_empty(), "the written pages are dirty");
    // A whole chunk is one entry.
    write(&fixture, PMD_BYTES, &vec![2; PMD_BYTES as usize]);
    assert_eq!(fixture.entries().last(), Some(&(PMD_PAGES, pmd(PMD_PAGES))));
    // Entries with blocks remain, and nothing is unmapped.
    fixture.log.take();
    write(&fixture, PMD_BYTES, &[3; 10]);
    assert!(!fixture.log.take().iter().any(|event| matches!(event, Event::UnmapHole { .. })));
}

/// Row 13: a write to pages without a grant makes no entry. The write itself flushes its lines,
/// because no entry tracks them.
#[test]
fn row_13_a_write_is_written_back_without_entries() {
    let fixture = Fixture::new(8);
    write(&fixture, 2 * PAGE_BYTES - 1, &[1; 2]);
    assert_eq!((fixture.flushed(), fixture.entries()), (vec![(1, 2)], vec![]));
    fixture.persist.state().fails.store(true, SeqCst);
    assert!(fixture.engine.write(&fixture.space, FileOffset(0), b"x").is_err());
    fixture.persist.state().fails.store(false, SeqCst);
    assert!(fixture.sync().is_err(), "a sync succeeded after a failed write");
    let kernel_tracks = Fixture::with(PAGE_BYTES, true);
    write(&kernel_tracks, 0, b"x");
    assert_eq!(
        kernel_tracks.flushed(),
        [],
        "a flush of a file whose dirty pages the kernel tracks"
    );
}

/// Row 13: a write beyond the end makes the file longer, and live grants show the new pages.
#[test]
fn row_13_a_write_that_makes_the_file_longer() {
    let fixture = Fixture::new(2);
    fixture.grant(0, 0, 8, Access::Write).unwrap();
    fixture.log.take();
    write(&fixture, 4 * PAGE_BYTES, &[7; PAGE_BYTES as usize]);
    assert_eq!(fixture.messages(), [map(2, 2, 3)]);
    assert_eq!(fixture.entries(), (0..5).map(|page| (page, pte(page))).collect::<Vec<_>>());
    let mut to = [0; 1];
    assert_eq!(
        fixture.engine.read(&fixture.space, FileOffset(5 * PAGE_BYTES - 1), &mut to).unwrap(),
        1
    );
    assert_eq!(to, [7]);
    let too_long = fixture.engine.write(&fixture.space, FileOffset(i64::MAX as u64), b"xy");
    assert_eq!(too_long.unwrap_err().errno(), Errno::EINVAL);
}

/// Row 13: a write without a free block fails with ENOSPC.
#[test]
fn row_13_a_write_on_a_full_disk() {
    let fixture = Fixture::new(8);
    fixture.source.state().free.store(0, SeqCst);
    let full = fixture.engine.write(&fixture.space, FileOffset(0), b"x").unwrap_err();
    assert_eq!(full.errno(), Errno::ENOSPC);
}
