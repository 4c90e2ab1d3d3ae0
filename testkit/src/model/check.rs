// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The checks after every step.

use std::sync::atomic::Ordering;

use vhost_user_dax::dax::entry::{PAGE_BYTES, PageIndex};
use vhost_user_dax::dax::extent::{Access, ExtentSource};

use super::guest::Cell;
use super::op::WINDOW_PAGES;
use super::pages::Pages;
use super::world::{Checked, World, shown_pages};
use crate::fakes::lock;

impl World {
    /// Checks that the window shows every granted page of the file, and nothing else.
    pub fn check_window(&mut self) -> Checked {
        let guest = lock(&self.guest);
        let now: Vec<_> = self.files.iter().map(|file| file.bytes() / PAGE_BYTES).collect();
        let mut shown = [false; WINDOW_PAGES as usize];
        for (at, file, page, pages) in guest.shown() {
            shown[at as usize..(at + pages) as usize].fill(true);
            for n in 0..pages {
                let granted = guest.cells[(at + n) as usize];
                let right = granted.is_some_and(|cell| cell.file == file && cell.page == page + n);
                if !right || page + n >= now[file] {
                    return Err(format!(
                        "window page {:#x} shows page {:#x} of file {file}, but the grant is \
                         {granted:x?}; the file has {:#x} pages",
                        at + n,
                        page + n,
                        now[file]
                    ));
                }
            }
        }
        for (at, cell) in guest.cells.iter().enumerate() {
            let Some(Cell { file, page, .. }) = *cell else { continue };
            if shown[at] || self.loose[at] {
                continue;
            }
            if page < now[file].min(self.files[file].known) {
                return Err(format!(
                    "window page {at:#x} does not show page {page:#x} of file {file}"
                ));
            }
        }
        Ok(())
    }

    /// Checks that a grant that has just succeeded shows all its pages of the file.
    pub fn shows_all(&self, at: u64, pages: u64, whole_pages: u64) -> Checked {
        let guest = lock(&self.guest);
        let shown = shown_pages(&self.strict.maps());
        for window in at..at + pages {
            let cell = guest.cells[window as usize];
            let must = cell.is_some_and(|cell| cell.page < whole_pages);
            if must != shown[window as usize] {
                return Err(format!(
                    "the grant is {cell:x?}, but the page is shown: {}",
                    shown[window as usize]
                ));
            }
        }
        Ok(())
    }

    /// Checks that the counters equal the calls of the doubles, and that no flush was needless.
    pub fn check_numbers(&self) -> Checked {
        let sum = |of: fn(&super::guest::Disk) -> &std::sync::atomic::AtomicU64| -> u64 {
            self.files.iter().map(|file| of(&file.disk).load(Ordering::Relaxed)).sum()
        };
        let counters = self.engine.counters().snapshot();
        for (name, counted, seen) in [
            ("grants", counters.grants, self.grants),
            ("grants_failed", counters.grants_failed, self.grants_failed),
            ("flushes", counters.flushes + self.own_flushes[0], sum(|disk| &disk.flushes)),
            (
                "bytes",
                counters.bytes_written_back + self.own_flushes[1],
                sum(|disk| &disk.flushed_bytes),
            ),
            ("syncs", counters.syncs, sum(|disk| &disk.syncs)),
            ("maps", self.engine.sizes().1 as u64, self.strict.maps().len() as u64),
        ] {
            if counted != seen {
                return Err(format!("counter {name}: {counted}, but the doubles counted {seen}"));
            }
        }
        match lock(&self.guest).needless.first() {
            Some(flush) => Err(format!("a flush of clean pages: {flush}")),
            None => Ok(()),
        }
    }

    /// Checks that entries cover granted pages only, have the right blocks, and have the dirty
    /// marks.
    pub fn check_entries(&self) -> Checked {
        let guest = lock(&self.guest);
        for (number, (file, pages)) in self.files.iter().zip(&guest.files).enumerate() {
            let file_pages = file.bytes().div_ceil(PAGE_BYTES);
            let mut known = Pages::default();
            let mut at = PageIndex(0);
            while let Some((start, entry, dirty)) = file.space.next_entry(at) {
                let end = start.0 + entry.order().pages();
                at = PageIndex(end);
                let about = || format!("file {number} page {:#x} {entry:?}", start.0);
                if entry.is_locked() || entry.is_empty() || end > file_pages {
                    return Err(format!(
                        "{}: locked, empty or beyond the end of the file",
                        about()
                    ));
                }
                if !pages.covered.any(start.0, end) {
                    return Err(format!("{}: no grant covers it", about()));
                }
                if dirty && file.disk.kernel {
                    return Err(format!(
                        "{}: marked dirty, although the kernel tracks dirty pages",
                        about()
                    ));
                }
                let size = entry.order().pages();
                if entry.block().is_some_and(|block| !block.number().is_multiple_of(size)) {
                    return Err(format!("{}: its block is not aligned", about()));
                }
                if dirty && entry.is_real() {
                    known.insert(start.0, end);
                }
                let asked = (!file.bad_page() && entry.is_real())
                    .then(|| file.source.extent(start, entry.order().pages(), Access::Read));
                if let Some(extent) = asked {
                    let extent = extent.unwrap();
                    let right = extent.block(start) == entry.block()
                        && extent.holds(start, entry.order().pages());
                    if !right {
                        return Err(format!("{}: the file has {extent:?}", about()));
                    }
                }
            }
            let failed = file.may_fail || file.disk.failed.load(Ordering::Relaxed);
            let lost = pages.dirty.first_missing(&known, 0, u64::MAX);
            if let Some(page) = lost.filter(|_| !failed && !file.disk.kernel) {
                return Err(format!(
                    "LOST: file {number} page {page:#x} is dirty, but no entry is marked"
                ));
            }
            if !failed && pages.unfenced.any(0, u64::MAX) {
                return Err(format!("LOST: file {number}: flushed, but no fence followed"));
            }
            let mut blocks = Pages::default();
            file.source.allocated().iter().for_each(|page| blocks.insert(*page, page + 1));
            if let Some(page) = pages.written.first_missing(&blocks, 0, u64::MAX) {
                return Err(format!("file {number} page {page:#x} is stored to, but has no block"));
            }
        }
        Ok(())
    }

    /// Checks that nothing is left when all grants are revoked.
    pub fn check_end(&mut self) -> Checked {
        self.check_entries()?;
        let whole = super::op::Op::Revoke { spans: vec![(0, WINDOW_PAGES * PAGE_BYTES)] };
        self.step(&super::op::Step { op: whole, refuse: 0 })?;
        self.check_entries()?;
        if self.engine.sizes() != (0, 0) {
            return Err(format!("grants and maps are left: {:?}", self.engine.sizes()));
        }
        for file in &self.files {
            let left = (file.space.entry_count(), file.space.index_bytes());
            if left != (0, 0) {
                return Err(format!("entries and bytes of the index are left: {left:?}"));
            }
        }
        Ok(())
    }
}
