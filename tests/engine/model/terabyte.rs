// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file of 1 TiB: a million steps of random grants and removals.

use std::env;
use std::fs;
use std::process::Command;
use std::sync::Arc;

use nix::unistd::{SysconfVar, sysconf};
use vhost_user_dax::dax::engine::{Engine, GrantError, Space};
use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_BYTES};
use vhost_user_dax::dax::extent::{Access, ExtentSource, FileExtents};
use vhost_user_dax::window::layout::ShowError;
use vhost_user_dax::window::{FileOffset, WindowBytes, WindowOffset};

use super::run::Random;
use testkit::fakes::{FakePersist, Log, StrictMapper};
use testkit::model::op::Choose;

const FILE_BYTES: u64 = 1 << 40;
const WINDOW_BYTES: u64 = 1 << 30;
const MOST_MAPS: usize = 100;
/// Number of steps for each of two files.
const STEPS: u64 = 500_000;
/// Write grants of a file with holes allocate blocks, so they stay within the first bytes of the
/// file.
const WRITTEN_BYTES: u64 = 16 * PMD_BYTES;
/// Allowed growth of the process in the second half of the steps: caches of the allocator.
const GROWTH_BYTES: u64 = 1 << 20;

/// Resident memory of this process in bytes.
fn memory() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap().cast_unsigned()
}

/// Grants or revokes mostly 2 MiB, as guests do, sometimes a few pages at any page.
fn step(engine: &Engine, space: &Arc<Space>, random: &mut Random, most_written: u64) {
    let chunks = WINDOW_BYTES / PMD_BYTES;
    let (at, bytes) = match random.below(8) {
        0 => (random.below(chunks * 512 - 4) * PAGE_BYTES, (1 + random.below(4)) * PAGE_BYTES),
        _ => (random.below(chunks) * PMD_BYTES, PMD_BYTES),
    };
    let span = engine.span(WindowOffset(at), WindowBytes(bytes)).unwrap();
    // Two removals for three grants; when the limit on maps is reached, more removals follow.
    let done = if random.below(5) < 2 {
        engine.revoke(&[span])
    } else {
        // Small write grants within these few chunks would make 512 entries per chunk, which is
        // slow.
        let small = bytes < PMD_BYTES && most_written < FILE_BYTES;
        let write = random.once_in(3) && !small;
        let within = if write { most_written } else { FILE_BYTES };
        let from = random.below(within / PMD_BYTES) * PMD_BYTES + at % PMD_BYTES;
        let access = if write { Access::Write } else { Access::Read };
        engine.grant(space, FileOffset(from), span, access, || true)
    };
    match done {
        Ok(()) => {}
        Err(GrantError::Window(ShowError::TooMany(_))) => {
            let from = at / PMD_BYTES / 16 * 16 * PMD_BYTES;
            let spans: Vec<_> = (0..16)
                .map(|n| WindowOffset(from + n * PMD_BYTES))
                .map(|at| engine.span(at, WindowBytes(PMD_BYTES)).unwrap())
                .collect();
            // The removal can exceed the limit on maps, too, because it may split a map.
            let _too_many = engine.revoke(&spans);
        }
        Err(e) => panic!("{e:?}"),
    }
}

fn file() -> Arc<fs::File> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(FILE_BYTES).unwrap();
    Arc::new(file)
}

fn run(source: FileExtents, most_written: u64) {
    let log = Log::default();
    let mapper = StrictMapper::new(WINDOW_BYTES, log.clone());
    let engine = Engine::new(WindowBytes(WINDOW_BYTES), mapper.clone(), MOST_MAPS);
    let written = source.file().clone();
    let persist = FakePersist::new(false, log.clone()).persist();
    let space = engine.space(Box::new(source), persist);
    let mut random = Random(1);
    let mut half = 0;
    for number in 0..STEPS {
        step(&engine, &space, &mut random, most_written);
        if number.is_multiple_of(1000) {
            drop(log.take());
        }
        if number == STEPS / 2 {
            half = memory();
        }
    }
    let grown = memory().saturating_sub(half);
    assert!(
        grown <= GROWTH_BYTES,
        "the process has grown by {grown} bytes in half of {STEPS} steps"
    );
    let counters = engine.counters().snapshot();
    assert!(counters.pmd > STEPS / 4 && counters.pte > STEPS / 100, "{counters:?}");
    assert!(counters.flushes > STEPS / 100, "{counters:?}");
    let whole = engine.span(WindowOffset(0), WindowBytes(WINDOW_BYTES)).unwrap();
    assert!(space.entry_count() > 0 && engine.sizes().1 > 0);
    engine.revoke(&[whole]).unwrap();
    assert_eq!(engine.sizes(), (0, 0), "grants and maps are left");
    assert!(mapper.maps().is_empty());
    assert_eq!((space.entry_count(), space.index_bytes()), (0, 0), "entries are left");
    assert_eq!(space.granted_runs(), 0, "runs of granted pages are left");
    use std::os::unix::fs::MetadataExt;
    assert!(written.metadata().unwrap().blocks() * 512 <= 2 * WRITTEN_BYTES);
}

/// No test of its own: the next test runs it in a process of its own, to measure its memory.
#[test]
#[ignore = "a_million_steps_over_a_tebibyte_leave_nothing_behind runs it"]
fn in_a_process_of_its_own() {
    run(FileExtents::new(file()), WRITTEN_BYTES);
    run(FileExtents::preallocated(file(), FILE_BYTES), FILE_BYTES);
}

/// Shows: a million random grants and removals on files of 1 TiB leave no entry and no map, and the
/// process does not grow; for a source that looks up holes and for one that does not.
#[test]
fn a_million_steps_over_a_tebibyte_leave_nothing_behind() {
    let me = "model::terabyte::in_a_process_of_its_own";
    let output = Command::new(env::current_exe().unwrap())
        .args([me, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}\n{output:?}");
}
