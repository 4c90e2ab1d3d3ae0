// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 10, 12 and 13 where only cache-line flushes make a store durable. The test double counts
//! the flushes of each line, and the fences after them.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use vhost_user_dax::dax::direct::DirectExtents;
use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, ExtentSource, FileExtents};
use vhost_user_dax::persist::{Backing, Direct, Durability, LineFlush, Persist, PersistMode};
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use testkit::fakes::{Log, StrictMapper, lock};

const LINE: u64 = 64;
const FILE_PAGES: u64 = 4 * PMD_PAGES;

#[derive(Default)]
struct Lines {
    /// Line -> number of flushes since the last fence.
    unfenced: BTreeMap<u64, u32>,
    /// For each fence, the lines flushed before it, as in `unfenced`.
    fenced: Vec<BTreeMap<u64, u32>>,
}

/// Durability by cache lines: a flushed line is durable after the next fence.
#[derive(Clone, Default)]
struct LineCounter(Arc<Mutex<Lines>>);

impl LineFlush for LineCounter {
    fn flush(&self, range: FileRange) -> io::Result<()> {
        let mut lines = lock(&self.0);
        for line in range.from.0 / LINE..range.end().0.div_ceil(LINE) {
            *lines.unfenced.entry(line).or_default() += 1;
        }
        Ok(())
    }

    fn fence(&self) {
        let mut lines = lock(&self.0);
        let batch = std::mem::take(&mut lines.unfenced);
        lines.fenced.push(batch);
    }
}

struct LineFixture {
    engine: Engine,
    space: Arc<Space>,
    lines: LineCounter,
}

impl LineFixture {
    fn new() -> Self {
        let window = FILE_PAGES * PAGE_BYTES;
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(window).unwrap();
        let engine =
            Engine::new(WindowBytes(window), StrictMapper::new(window, Log::default()), 256);
        let lines = LineCounter::default();
        let space = engine.space(Box::new(FileExtents::new(file)), Persist::lines(lines.clone()));
        Self { engine, space, lines }
    }

    fn grant(&self, page: u64, pages: u64, access: Access) {
        let at = page * PAGE_BYTES;
        let span = self.engine.span(WindowOffset(at), WindowBytes(pages * PAGE_BYTES)).unwrap();
        self.engine.grant(&self.space, FileOffset(at), span, access, || true).unwrap();
    }

    /// The batches since the last call. Every flushed line must have its fence.
    fn batches(&self) -> Vec<BTreeMap<u64, u32>> {
        let mut lines = lock(&self.lines.0);
        assert!(lines.unfenced.is_empty(), "lines were flushed, and no fence followed");
        std::mem::take(&mut lines.fenced)
    }
}

fn lines_of(page: u64, pages: u64) -> impl Iterator<Item = u64> {
    let per_page = PAGE_BYTES / LINE;
    page * per_page..(page + pages) * per_page
}

/// Shows: of dirty and clean PTE entries and of a dirty and a clean PMD entry, exactly the lines of
/// the dirty entries are flushed, once each, and one fence follows before writeback() returns.
#[test]
fn row_10_exactly_the_dirty_lines_and_one_fence() {
    let fixture = LineFixture::new();
    for page in [1, 3, 77] {
        fixture.grant(page, 1, Access::Write);
    }
    fixture.grant(5, 2, Access::Read);
    fixture.grant(PMD_PAGES, PMD_PAGES, Access::Write);
    fixture.grant(2 * PMD_PAGES, PMD_PAGES, Access::Read);
    let expected: BTreeMap<u64, u32> = [(1, 1), (3, 1), (77, 1), (PMD_PAGES, PMD_PAGES)]
        .into_iter()
        .flat_map(|(page, pages)| lines_of(page, pages))
        .map(|line| (line, 1))
        .collect();
    for _ in 0..2 {
        // Under their write grants the entries stay dirty (row 9).
        fixture.engine.writeback(&fixture.space, PageIndex(0), PageIndex::LAST).unwrap();
        assert_eq!(fixture.batches().as_slice(), std::slice::from_ref(&expected));
    }
    // A writeback of a part of the file flushes the entries in it.
    fixture.engine.writeback(&fixture.space, PageIndex(2), PageIndex(70)).unwrap();
    assert_eq!(fixture.batches(), [lines_of(3, 1).map(|line| (line, 1)).collect()]);
}

/// Shows: of more entries than a batch holds, each batch has a fence, and no line is flushed twice.
#[test]
fn row_10_each_batch_has_its_fence() {
    let fixture = LineFixture::new();
    for page in (0..200).map(|n| 2 * n) {
        fixture.grant(page, 1, Access::Write);
    }
    fixture.batches();
    fixture.engine.writeback(&fixture.space, PageIndex(0), PageIndex::LAST).unwrap();
    let batches = fixture.batches();
    assert_eq!(batches.len() as u64, fixture.engine.counters().snapshot().fences);
    assert_eq!(batches.len(), 200_usize.div_ceil(64));
    let mut all = BTreeMap::new();
    for (line, times) in batches.into_iter().flatten() {
        *all.entry(line).or_insert(0) += times;
    }
    let expected = (0..200).flat_map(|n| lines_of(2 * n, 1)).map(|line| (line, 1)).collect();
    assert_eq!(all, expected);
}

/// Shows: the last flush of an entry that loses its write grant has a fence, too.
#[test]
fn row_10_a_last_flush_has_its_fence() {
    let fixture = LineFixture::new();
    fixture.grant(9, 1, Access::Write);
    let span = fixture.engine.span(WindowOffset(9 * PAGE_BYTES), WindowBytes(PAGE_BYTES)).unwrap();
    fixture.engine.revoke(&[span]).unwrap();
    assert_eq!(fixture.batches(), [lines_of(9, 1).map(|line| (line, 1)).collect()]);
}

/// Shows: the bytes of a WRITE are durable when it returns: its pages' lines are flushed, and a
/// fence follows.
#[test]
fn row_13_a_write_has_its_fence() {
    let fixture = LineFixture::new();
    fixture.engine.write(&fixture.space, FileOffset(5000), b"written").unwrap();
    assert_eq!(fixture.batches(), [lines_of(1, 1).map(|line| (line, 1)).collect()]);
}

/// A file on a tmpfs, mapped into this process as direct memory.
fn direct_file(bytes: u64) -> (Arc<std::fs::File>, Arc<Direct>, DirectExtents<FileExtents>) {
    let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
    file.set_len(bytes).unwrap();
    let chosen = Durability::choose(Backing::Memory, PersistMode::Cacheline).unwrap();
    let direct = chosen.persist(&file, bytes).unwrap().direct.unwrap();
    (file.clone(), direct.clone(), DirectExtents::new(FileExtents::new(file), direct))
}

/// Shows: non-temporal stores put the right bytes into the file, at unaligned offsets, over holes
/// and beyond the end, and read() returns them.
#[test]
fn row_13_non_temporal_writes_reach_the_file() {
    let (file, direct, source) = direct_file(PMD_BYTES);
    let mut expected = vec![0; PMD_BYTES as usize];
    let lengths = [1, 15, 63, 64, 65, 255, 256, 257, 1000, 4096, 5000, 70_000];
    for (n, length) in lengths.into_iter().cycle().take(200).enumerate() {
        let from = (n * 7919 * 13) % (expected.len() - length);
        let bytes: Vec<_> = (0..length).map(|at| (n + at % 250 + 1) as u8).collect();
        // Every other write has its blocks allocated and is stored directly; the others use
        // write(2) if needed.
        if n % 2 == 0 {
            let (first, last) = (from as u64 / PAGE_BYTES, (from + length) as u64 / PAGE_BYTES);
            source.allocate(PageIndex(first), PageIndex(last)).unwrap();
            direct.store(FileOffset(from as u64), &bytes).unwrap();
            direct.fence();
        } else {
            assert_eq!(source.write_at(FileOffset(from as u64), &bytes).unwrap(), length);
        }
        expected[from..from + length].copy_from_slice(&bytes);
        let mut found = vec![0; length];
        source.read_at(FileOffset(from as u64), &mut found).unwrap();
        assert_eq!(found, bytes);
    }
    let mut found = vec![0; expected.len()];
    file.read_exact_at(&mut found, 0).unwrap();
    assert!(found == expected, "the file has other bytes");
    assert_eq!(source.write_at(FileOffset(PMD_BYTES + 5), b"behind").unwrap(), 6);
    assert_eq!(source.file_bytes().unwrap(), PMD_BYTES + 11);
}

/// Shows: zeroing at unaligned offsets zeroes exactly the range, keeps the blocks of partial pages,
/// and allocates none in holes.
#[test]
fn row_12_parts_of_pages_are_zeroed_past_the_cache() {
    use std::os::unix::fs::MetadataExt;
    for keep in [false, true] {
        let (file, _, source) = direct_file(64 * PAGE_BYTES);
        let mut expected = vec![0; 64 * PAGE_BYTES as usize];
        expected[..32 * PAGE_BYTES as usize].fill(7);
        file.write_all_at(&expected[..32 * PAGE_BYTES as usize], 0).unwrap();
        let inside = [(1, 62), (4095, 2), (5000, 9000), (8192, 4096), (31 * 4096, 4000)];
        let in_a_hole = (40 * 4096 + 5, 100);
        for (from, bytes) in inside.into_iter().chain([in_a_hole]) {
            source.zero(FileRange::new(FileOffset(from), bytes), keep).unwrap();
            expected[from as usize..(from + bytes) as usize].fill(0);
        }
        let mut found = vec![0; expected.len()];
        file.read_exact_at(&mut found, 0).unwrap();
        assert!(found == expected, "keep {keep}: the file has other bytes");
        let blocks = file.metadata().unwrap().blocks() / 8;
        assert!(blocks <= 32, "keep {keep}: a hole got a block: {blocks} pages have blocks");
        assert!(!keep || blocks == 32, "a page lost its block: {blocks} pages have blocks");
    }
}
