// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Many threads at once: grants, removals, stores, writebacks, growth, truncation and punches.
//! `cargo test` runs it, and `ci/races` runs it under ThreadSanitizer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use testkit::fakes::{FakePersist, FakeSource, Log, StrictMapper, lock};

const THREADS: u64 = 4;
const SLOTS_EACH: u64 = 4;
const FILE_CHUNKS: u64 = 4;
const ROUNDS: u64 = 400;

/// An xorshift generator; each thread has one.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// The version number that the guest last stored in each page, and the one that a flush last made
/// durable.
struct Memory {
    stored: Vec<AtomicU64>,
    durable: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Arc<Self> {
        let zeros = || (0..FILE_CHUNKS * PMD_PAGES).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { stored: zeros(), durable: zeros() })
    }

    /// Makes all pages of a chunk durable: the steady file has PMD entries only.
    fn flush(&self, chunk: u64) {
        assert!(chunk.is_multiple_of(PMD_BYTES), "a PTE entry in the steady file");
        let first = (chunk / PAGE_BYTES) as usize;
        for page in first..first + PMD_PAGES as usize {
            let stored = self.stored[page].load(Ordering::SeqCst);
            self.durable[page].fetch_max(stored, Ordering::SeqCst);
        }
    }
}

struct World {
    engine: Engine,
    mapper: Arc<StrictMapper>,
    /// The space of a file that is never resized; the test checks its pages.
    steady: Arc<Space>,
    /// The space of a file that grows, shrinks and gets holes.
    restless: Arc<Space>,
    memory: Arc<Memory>,
    log: Log,
}

fn world() -> World {
    let log = Log::default();
    let window = WindowBytes(THREADS * SLOTS_EACH * PMD_BYTES);
    let mapper = StrictMapper::new(window.0, log.clone());
    let engine = Engine::new(window, mapper.clone(), 256);
    let memory = Memory::new();
    let persist = FakePersist::new(false, log.clone());
    let flushed = memory.clone();
    *lock(&persist.state().during) = Some(Arc::new(move |from| flushed.flush(from)));
    let file = || Box::new(FakeSource::new(FILE_CHUNKS * PMD_BYTES, log.clone()));
    let steady = engine.space(file(), persist.persist());
    let restless = engine.space(file(), FakePersist::new(false, log.clone()).persist());
    World { engine, mapper, steady, restless, memory, log }
}

/// One guest CPU: it has slots of the window for itself, and shares the files with the other CPUs.
fn guest_cpu(world: &World, thread: u64) {
    let mut random = Random(thread + 1);
    let spans: Vec<_> = (0..SLOTS_EACH)
        .map(|slot| {
            let at = WindowOffset((thread * SLOTS_EACH + slot) * PMD_BYTES);
            world.engine.span(at, WindowBytes(PMD_BYTES)).unwrap()
        })
        .collect();
    for round in 1..=ROUNDS {
        let span = spans[random.below(SLOTS_EACH) as usize];
        let chunk = random.below(FILE_CHUNKS);
        let from = FileOffset(chunk * PMD_BYTES);
        if random.below(3) == 0 {
            let access = [Access::Read, Access::Write][random.below(2) as usize];
            let restless = world.engine.grant(&world.restless, from, span, access, || true);
            assert!(
                restless.is_ok() || chunk > 0,
                "a grant of the first chunk, which is never cut, failed: {restless:?}"
            );
        } else {
            world.engine.grant(&world.steady, from, span, Access::Write, || true).unwrap();
            let page = chunk * PMD_PAGES + thread * 100 + random.below(100);
            let version = &world.memory.stored[page as usize];
            version.fetch_add(1, Ordering::SeqCst);
            let stored = version.load(Ordering::SeqCst);
            if random.below(2) == 0 {
                // The removal of the last write grant makes the store durable; otherwise the fsync
                // below does.
                world.engine.revoke(&[span]).unwrap();
            }
            let last = PageIndex(page + random.below(PMD_PAGES));
            world.engine.writeback(&world.steady, PageIndex(page), last).unwrap();
            let durable = world.memory.durable[page as usize].load(Ordering::SeqCst);
            assert!(
                durable >= stored,
                "round {round}: page {page}: version {durable} is durable, {stored} was stored"
            );
        }
        if round % 8 == 0 {
            world.engine.revoke(&spans).unwrap();
            world.log.take();
        }
    }
    world.engine.revoke(&spans).unwrap();
}

/// Another process changes the restless file and always leaves its first chunk.
fn change_file(world: &World, stop: &AtomicBool) {
    let mut random = Random(99);
    while !stop.load(Ordering::Relaxed) {
        let bytes = PMD_BYTES + random.below(FILE_CHUNKS * PMD_PAGES - PMD_PAGES + 1) * PAGE_BYTES;
        match random.below(3) {
            0 => drop(world.engine.resize(&world.restless, bytes).unwrap()),
            1 => {
                let from = FileOffset(random.below(bytes));
                let range = FileRange::new(from, 1 + random.below(PMD_BYTES));
                world.engine.punch(&world.restless, range).unwrap();
            }
            _ => {
                world.engine.writeback(&world.restless, PageIndex(0), PageIndex::LAST).unwrap();
            }
        }
    }
}

/// Shows: under this load no store is lost, no rule of the front-end is broken, no thread waits for
/// ever, and no grant, map or entry is left.
#[test]
fn many_threads_lose_nothing_and_leave_nothing() {
    let world = world();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let cpus: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn({
                    let world = &world;
                    move || guest_cpu(world, thread)
                })
            })
            .collect();
        let changer = scope.spawn(|| change_file(&world, &stop));
        let ended: Vec<_> = cpus.into_iter().map(|cpu| cpu.join()).collect();
        stop.store(true, Ordering::Relaxed);
        changer.join().unwrap();
        for cpu in ended {
            cpu.unwrap();
        }
    });
    assert_eq!(world.engine.sizes(), (0, 0), "grants and maps are left");
    assert!(world.mapper.maps().is_empty());
    for space in [&world.steady, &world.restless] {
        assert_eq!(space.entry_count(), 0);
    }
}
