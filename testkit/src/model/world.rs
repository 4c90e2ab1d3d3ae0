// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An engine with its test doubles, and the model. Each step runs on both (`calls.rs`).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{PAGE_BYTES, PMD_BYTES, PMD_PAGES};
use vhost_user_dax::dax::extent::ExtentSource;
use vhost_user_dax::window::WindowBytes;

use super::guest::{Disk, DiskOf, FrontEnd, Guest};
use super::op::{FILES, Op, Step, WINDOW_PAGES};
use crate::fakes::{FakeSource, Log, StrictMapper, lock};

/// Limit on the number of maps, low enough that programs reach it.
pub const MOST_MAPS: usize = 24;
/// Number of free blocks that no step can use up.
const PLENTY: u64 = 1 << 40;

/// The result of a check; the error says what is wrong.
pub type Checked = Result<(), String>;

/// One file with its doubles and the model's knowledge about it.
pub struct ModelFile {
    pub space: Arc<Space>,
    pub source: FakeSource,
    pub log: Log,
    pub disk: Arc<Disk>,
    /// The file's length in whole pages at the engine's last successful change of length.
    pub known: u64,
    /// A lookup of extents failed in the middle of a change: every later writeback may fail, too.
    pub may_fail: bool,
}

impl ModelFile {
    pub fn bytes(&self) -> u64 {
        self.source.file_bytes().unwrap()
    }

    pub fn bad_page(&self) -> bool {
        lock(&self.source.state().bad_page).is_some()
    }

    pub fn may_err(&self) -> bool {
        self.bad_page()
            || self.may_fail
            || self.disk.failed.load(Ordering::Relaxed)
            || self.source.state().free.load(Ordering::Relaxed) < PLENTY / 2
    }
}

pub struct World {
    pub engine: Engine,
    pub strict: Arc<StrictMapper>,
    pub front: Arc<FrontEnd>,
    pub guest: Arc<Mutex<Guest>>,
    pub files: Vec<ModelFile>,
    /// Window pages that may show nothing after a failed rollback.
    pub loose: Vec<bool>,
    pub grants: u64,
    pub grants_failed: u64,
    /// Number of flushes, and number of bytes, that belong to no entry.
    pub own_flushes: [u64; 2],
    /// Number of steps so far; every 16th step checks the entries, too.
    pub steps: u64,
}

/// The state before a step.
pub struct Before {
    pub maps: BTreeMap<u64, (u64, u64, u64)>,
    pub grants: usize,
}

pub fn fail<T>(why: impl Into<String>) -> Result<T, String> {
    Err(why.into())
}

impl World {
    pub fn new() -> Self {
        let window_bytes = WINDOW_PAGES * PAGE_BYTES;
        let strict = StrictMapper::new(window_bytes, Log::default());
        let guest = Guest::new(strict.clone());
        let (refuse, refused) = (AtomicU64::new(0), AtomicU64::new(0));
        let front = FrontEnd { strict: strict.clone(), guest: guest.clone(), refuse, refused };
        let front = Arc::new(front);
        let engine = Engine::new(WindowBytes(window_bytes), front.clone(), MOST_MAPS);
        let mut world = Self {
            engine,
            strict,
            front,
            guest,
            files: Vec::new(),
            loose: vec![false; WINDOW_PAGES as usize],
            grants: 0,
            grants_failed: 0,
            own_flushes: [0; 2],
            steps: 0,
        };
        for (file, bytes) in
            [2 * PMD_BYTES, PMD_BYTES + 7 * PAGE_BYTES, 3 * PMD_BYTES + 77].into_iter().enumerate()
        {
            world.add_file(file, bytes);
        }
        assert_eq!(world.files.len(), FILES);
        world
    }

    fn add_file(&mut self, file: usize, bytes: u64) {
        use std::os::unix::fs::MetadataExt;
        let log = Log::default();
        let source = FakeSource::new(bytes, log.clone());
        source.state().free.store(PLENTY, Ordering::Relaxed);
        lock(&self.guest).files[file].inode = source.file().metadata().unwrap().ino();
        let disk = Arc::new(Disk {
            file,
            kernel: file == 1,
            guest: self.guest.clone(),
            fails: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            flushed_bytes: AtomicU64::new(0),
            syncs: AtomicU64::new(0),
        });
        let space = self.engine.space(Box::new(source.clone()), DiskOf(disk.clone()).persist());
        let known = bytes / PAGE_BYTES;
        self.files.push(ModelFile { space, source, log, disk, known, may_fail: false });
    }

    /// Runs a step, and checks the state after it.
    pub fn step(&mut self, step: &Step) -> Checked {
        {
            let mut guest = lock(&self.guest);
            guest.store();
            guest.trying = None;
            guest.files.iter_mut().for_each(|file| file.flushed = Default::default());
        }
        self.strict.log.take();
        self.files.iter().for_each(|file| drop(file.log.take()));
        self.front.refused.store(0, Ordering::Relaxed);
        self.front.refuse.store(step.refuse, Ordering::Relaxed);
        let before = Before { maps: self.strict.maps(), grants: self.engine.sizes().0 };
        self.act(&step.op, step.refuse, &before)?;
        self.front.refuse.store(0, Ordering::Relaxed);
        lock(&self.guest).store();
        self.steps += 1;
        self.check_window()?;
        self.check_numbers()?;
        if self.steps.is_multiple_of(16) || self.front.refused.load(Ordering::Relaxed) > 0 {
            self.check_entries()?;
        }
        Ok(())
    }

    fn act(&mut self, op: &Op, refuse: u64, before: &Before) -> Checked {
        match op {
            Op::Grant { file, from, at, bytes, write } => {
                self.grant(*file, *from, (*at, *bytes), *write, before)
            }
            Op::Revoke { spans } => {
                // After a failed rollback the doubles do not show how many ranges of the list were
                // done.
                let most = if refuse.count_ones() > 1 { 1 } else { spans.len() };
                self.revoke(&spans[..most], before)
            }
            Op::Resize { file, bytes } => self.resize(*file, *bytes, before),
            Op::Grow { file, bytes } => {
                let file = &self.files[*file];
                if *bytes > file.bytes() {
                    let _too_long = file.source.set_bytes(*bytes);
                }
                Ok(())
            }
            Op::HostResize { file, bytes } => {
                if *bytes < self.files[*file].bytes() {
                    // If the front-end refused here, pages beyond the new end could not be mapped
                    // again.
                    self.front.refuse.store(0, Ordering::Relaxed);
                }
                let _too_long = self.files[*file].source.set_bytes(*bytes);
                self.resized(*file, before)
            }
            Op::Resized { file } => self.resized(*file, before),
            Op::Punch { file, from, bytes } => self.punch(*file, *from, *bytes, before),
            Op::Write { file, from, bytes } => self.write(*file, *from, *bytes, before),
            Op::Writeback { file, first, last } => self.writeback(*file, *first, *last),
            Op::Reset => {
                self.strict.drop_all();
                lock(&self.guest).dropped();
                self.engine.reset();
                lock(&self.guest).set_cells(0, WINDOW_PAGES, |_| None);
                self.loose.fill(false);
                Ok(())
            }
            Op::MapAgain => {
                self.front.refuse.store(0, Ordering::Relaxed);
                self.strict.drop_all();
                lock(&self.guest).dropped();
                self.engine.map_again().map_err(|e| e.to_string())?;
                if self.strict.maps() == before.maps {
                    Ok(())
                } else {
                    fail("map_again made other maps than before")
                }
            }
            Op::Free { file, blocks } => {
                self.files[*file].source.state().free.store(*blocks, Ordering::Relaxed);
                Ok(())
            }
            Op::Blocks { file, contiguous, maps_pmd } => {
                let state = self.files[*file].source.state();
                state.contiguous.store(*contiguous, Ordering::Relaxed);
                state.maps_pmd.store(*maps_pmd, Ordering::Relaxed);
                Ok(())
            }
            Op::Fill { file, chunk } => {
                let source = &self.files[*file].source;
                let there = source.allocated();
                let end = self.files[*file].bytes().div_ceil(PAGE_BYTES);
                for page in (chunk * PMD_PAGES..(chunk + 1) * PMD_PAGES).take_while(|p| *p < end) {
                    if !there.contains(&page) {
                        source.set_block(page, Some((1 << 31) + page + 1));
                    }
                }
                Ok(())
            }
            Op::BadPage { file, page } => {
                *lock(&self.files[*file].source.state().bad_page) = *page;
                Ok(())
            }
            Op::FailDisk { file } => {
                self.files[*file].disk.fails.store(true, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

/// For each page of the window, whether the front-end shows anything there.
pub fn shown_pages(maps: &BTreeMap<u64, (u64, u64, u64)>) -> Vec<bool> {
    let mut shown = vec![false; WINDOW_PAGES as usize];
    for (at, (bytes, ..)) in maps {
        let at = (at / PAGE_BYTES) as usize;
        shown[at..at + (bytes / PAGE_BYTES) as usize].fill(true);
    }
    shown
}
