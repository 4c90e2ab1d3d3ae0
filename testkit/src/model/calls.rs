// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs each call of the engine, checks its result, and updates the model.

use std::sync::atomic::Ordering;

use vhost_user_dax::dax::engine::{GrantError, Span};
use vhost_user_dax::dax::entry::{PAGE_BYTES, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::window::layout::ShowError;
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use super::guest::{Cell, Disk};
use super::op::{FILES, WINDOW_PAGES};
use super::world::{Before, Checked, MOST_MAPS, ModelFile, World, fail, shown_pages};
use crate::fakes::lock;

impl World {
    /// Makes a span, and checks that the engine accepts exactly the valid numbers.
    fn span(&self, at: u64, bytes: u64) -> Result<Option<Span>, String> {
        let whole = at.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
        let inside = at.checked_add(bytes).is_some_and(|end| end <= WINDOW_PAGES * PAGE_BYTES);
        match self.engine.span(WindowOffset(at), WindowBytes(bytes)) {
            Ok(span) if whole && inside && bytes > 0 => Ok(Some(span)),
            Err(GrantError::Invalid(_)) if !(whole && inside && bytes > 0) => Ok(None),
            other => fail(format!("span({at:#x}, {bytes:#x}) is {other:?}")),
        }
    }

    pub(super) fn grant(
        &mut self,
        file: usize,
        from: u64,
        (at, bytes): (u64, u64),
        write: bool,
        before: &Before,
    ) -> Checked {
        let Some(span) = self.span(at, bytes)? else { return Ok(()) };
        let access = if write { Access::Write } else { Access::Read };
        let model = &self.files[file];
        {
            let mut guest = lock(&self.guest);
            let behind = from.saturating_add(bytes).div_ceil(PAGE_BYTES);
            guest.trying = write.then_some((file, from / PAGE_BYTES, behind));
            guest.ask(at / PAGE_BYTES..(at + bytes) / PAGE_BYTES);
        }
        let done = self.engine.grant(&model.space, FileOffset(from), span, access, || true);
        lock(&self.guest).ask(0..0);
        let length = model.bytes();
        let (end, pages) = (from.checked_add(bytes), length.div_ceil(PAGE_BYTES));
        let valid =
            from.is_multiple_of(PAGE_BYTES) && end.is_some_and(|end| end <= i64::MAX as u64);
        let past = from / PAGE_BYTES >= pages;
        let tail = !length.is_multiple_of(PAGE_BYTES)
            && end.is_some_and(|end| end > length - length % PAGE_BYTES);
        match &done {
            Ok(()) if valid && !past && !tail => {}
            Err(GrantError::Invalid(_)) if !valid => {}
            Err(GrantError::PastEof) if valid && past => {}
            Err(GrantError::Tail) if valid && !past && tail => {}
            Err(e) if valid && !past && !tail => self.excuse(e, file, before)?,
            other => {
                return fail(format!(
                    "the grant is {other:?}; valid: {valid}, past the end: {past}, tail: {tail}"
                ));
            }
        }
        let (first, count) = (at / PAGE_BYTES, bytes / PAGE_BYTES);
        if done.is_err() {
            self.grants_failed += 1;
            return self.as_before(&done, before);
        }
        self.grants += 1;
        let page = |n| Cell { file, page: from / PAGE_BYTES + n, write };
        lock(&self.guest).set_cells(first, count, |n| Some(page(n)));
        self.loose[first as usize..(first + count) as usize].fill(false);
        self.shows_all(first, count, length / PAGE_BYTES)
    }

    pub(super) fn revoke(&mut self, spans: &[(u64, u64)], before: &Before) -> Checked {
        let mut ranges = Vec::new();
        for (at, bytes) in spans {
            if let Some(span) = self.span(*at, *bytes)? {
                ranges.push((*at / PAGE_BYTES, *bytes / PAGE_BYTES, span));
            }
        }
        let asked: Vec<_> = ranges.iter().map(|(.., span)| *span).collect();
        let shown = shown_pages(&before.maps);
        let done = self.engine.revoke(&asked);
        if let Err(e) = &done {
            self.excuse(e, FILES, before)?;
            if matches!(e, GrantError::Window(ShowError::Torn(_))) {
                return self.as_before(&done, before);
            }
        }
        // A list continues after a range that needs more maps than the limit allows, and ends at a
        // range that the front-end refuses. Each range is removed completely or not at all, and a
        // later range of the list may overlap a failed one and have removed it.
        let still = shown_pages(&self.strict.maps());
        let mut refused = false;
        for (i, &(at, pages, _)) in ranges.iter().enumerate() {
            let range = at as usize..(at + pages) as usize;
            let granted =
                |page: u64| self.engine.granted_at(WindowOffset(page * PAGE_BYTES)).is_some();
            if done.is_err() && (at..at + pages).any(granted) {
                refused |= range.clone().any(|page| shown[page] && still[page]);
                continue;
            }
            refused |= ranges[i + 1..]
                .iter()
                .any(|(other, more, _)| at < other + more && *other < at + pages);
            lock(&self.guest).set_cells(at, pages, |_| None);
            self.loose[range].fill(false);
        }
        if done.is_err() && !refused {
            fail("revoke failed, but the front-end shows none of the ranges any more")
        } else {
            Ok(())
        }
    }

    pub(super) fn resize(&mut self, file: usize, bytes: u64, before: &Before) -> Checked {
        let old = self.files[file].bytes();
        let done = self.engine.resize(&self.files[file].space, bytes);
        let now = self.files[file].bytes();
        match &done {
            Ok(_) if bytes > i64::MAX as u64 => return fail("a length above i64::MAX"),
            Ok(_) if now != bytes => return fail(format!("the file has {now} bytes, not {bytes}")),
            Err(GrantError::Invalid(_)) if bytes > i64::MAX as u64 => return Ok(()),
            Err(GrantError::Source(_)) if bytes > 1 << 43 && now == old => return Ok(()),
            Err(e) if now != old && now != bytes => {
                return fail(format!("the file has {now} bytes, not {old} nor {bytes}, after {e}"));
            }
            _ => {}
        }
        self.followed(
            file,
            bytes.min(now).min(old),
            done.map(|resized| Some(resized.tail_hidden)),
            before,
        )
    }

    pub(super) fn resized(&mut self, file: usize, before: &Before) -> Checked {
        let done = self.engine.resized(&self.files[file].space);
        let now = self.files[file].bytes();
        self.followed(file, now, done.map(|resized| Some(resized.tail_hidden)), before)
    }

    /// Updates the model after the window has followed a change of the file's length, or has failed
    /// to. In both cases the window shows at least the first `least` bytes.
    fn followed(
        &mut self,
        file: usize,
        least: u64,
        done: Result<Option<bool>, GrantError>,
        before: &Before,
    ) -> Checked {
        let (now, known) = (self.files[file].bytes(), self.files[file].known);
        lock(&self.guest).files[file].dirty.remove(now.div_ceil(PAGE_BYTES), u64::MAX);
        let tail = (!now.is_multiple_of(PAGE_BYTES)).then_some(now / PAGE_BYTES);
        let mut covered = false;
        for (cell, loose) in lock(&self.guest).cells.iter().zip(&mut self.loose) {
            let Some(cell) = cell.filter(|cell| cell.file == file) else { continue };
            *loose &= done.is_err();
            covered |= tail == Some(cell.page);
        }
        match done {
            Ok(hidden) => {
                self.files[file].known = now / PAGE_BYTES;
                if hidden.is_some_and(|hidden| hidden != covered) {
                    return fail(format!(
                        "tail_hidden is {hidden:?}, but a grant covers the tail: {covered}"
                    ));
                }
            }
            Err(e) => {
                self.excuse(&e, file, before)?;
                let file = &mut self.files[file];
                file.known = known.min(least / PAGE_BYTES);
                // The refusal by the front-end is the error returned; the file system may have
                // failed after it.
                let refused_too = file.may_err() && file.space.has_failed();
                file.may_fail |= matches!(e, GrantError::Source(_)) || refused_too;
            }
        }
        Ok(())
    }

    pub(super) fn punch(&mut self, file: usize, from: u64, bytes: u64, before: &Before) -> Checked {
        let range = FileRange::new(FileOffset(from), bytes);
        let done = self.engine.punch(&self.files[file].space, range);
        let end = from.checked_add(bytes).filter(|end| *end <= i64::MAX as u64 && bytes > 0);
        let end = match (end, &done) {
            (None, Err(GrantError::Invalid(_))) => return Ok(()),
            (Some(end), Ok(())) => end.min(self.files[file].bytes()),
            (Some(_), Err(e)) => {
                self.excuse(e, file, before)?;
                self.files[file].may_fail = true;
                return self.as_before(&done, before);
            }
            (None, other) => return fail(format!("punch is {other:?}")),
        };
        let whole = from.div_ceil(PAGE_BYTES)..(end / PAGE_BYTES).max(from.div_ceil(PAGE_BYTES));
        let mut guest = lock(&self.guest);
        guest.files[file].dirty.remove(whole.start, whole.end);
        let wanted = &guest.files[file].wanted;
        match self.files[file].source.allocated().range(whole).find(|page| !wanted.has(**page)) {
            Some(page) => fail(format!("page {page:#x} has a block after a punch")),
            None => Ok(()),
        }
    }

    pub(super) fn write(&mut self, file: usize, from: u64, bytes: u64, before: &Before) -> Checked {
        let model = &self.files[file];
        let old = model.bytes();
        let seen = |disk: &Disk| {
            [&disk.flushes, &disk.flushed_bytes].map(|count| count.load(Ordering::Relaxed))
        };
        let counted = || {
            let counters = self.engine.counters().snapshot();
            [counters.flushes, counters.bytes_written_back]
        };
        let (seen_before, counted_before) = (seen(&model.disk), counted());
        let behind = from.saturating_add(bytes).div_ceil(PAGE_BYTES);
        lock(&self.guest).trying = Some((file, from / PAGE_BYTES, behind));
        let data = vec![0xab; bytes as usize];
        let done = self.engine.write(&model.space, FileOffset(from), &data);
        // A flush of the bytes written is counted for no entry.
        let (seen, counted) = (seen(&model.disk), counted());
        for n in 0..2 {
            self.own_flushes[n] += (seen[n] - seen_before[n]) - (counted[n] - counted_before[n]);
        }
        let now = self.files[file].bytes();
        match done {
            Err(GrantError::Invalid(_)) if from.saturating_add(bytes) > i64::MAX as u64 => Ok(()),
            Ok(n) if n as u64 == bytes && (bytes == 0 || now == old.max(from + bytes)) => {
                if now > old { self.followed(file, now, Ok(None), before) } else { Ok(()) }
            }
            Err(e) if from > 1 << 43 && matches!(e, GrantError::Source(_)) => Ok(()),
            Err(e) if now > old => self.followed(file, old, Err(e), before),
            Err(e) => self.excuse(&e, file, before),
            other => fail(format!("write of {bytes} at {from:#x}, {old} bytes, is {other:?}")),
        }
    }

    pub(super) fn writeback(&mut self, file: usize, first: u64, last: u64) -> Checked {
        let model = &self.files[file];
        let dirty = lock(&self.guest).files[file].dirty.clone();
        let (failed, syncs) =
            (model.disk.failed.load(Ordering::Relaxed), model.disk.syncs.load(Ordering::Relaxed));
        let done = self.engine.writeback(&model.space, PageIndex(first), PageIndex(last));
        match done {
            Ok(()) if failed => return fail("a writeback succeeded after a failed one"),
            Err(_) if model.disk.failed.load(Ordering::Relaxed) || model.may_fail => return Ok(()),
            Err(e) => return fail(format!("writeback: {e}")),
            Ok(()) => {}
        }
        if model.disk.kernel {
            let now = model.disk.syncs.load(Ordering::Relaxed);
            return if now == syncs + 1 { Ok(()) } else { fail("not exactly one sync") };
        }
        let guest = lock(&self.guest);
        let flushed = &guest.files[file].flushed;
        match dirty.first_missing(flushed, first, last.saturating_add(1)) {
            Some(page) => fail(format!("LOST: page {page:#x} was stored to, but not flushed")),
            None => Ok(()),
        }
    }

    /// Fails unless the model expects this error.
    fn excuse(&mut self, e: &GrantError, file: usize, before: &Before) -> Checked {
        let refused = self.front.refused.load(Ordering::Relaxed) > 0;
        let fine = match e {
            GrantError::Window(ShowError::Refused(_)) => refused,
            GrantError::Window(ShowError::Torn(_)) => {
                let cells = lock(&self.guest).cells.clone();
                self.loose.iter_mut().zip(cells).for_each(|(loose, cell)| *loose |= cell.is_some());
                refused
            }
            GrantError::Window(ShowError::TooMany(_)) => {
                before.maps.len() + before.grants.max(2) > MOST_MAPS
            }
            GrantError::Source(_) => self.files.get(file).is_some_and(ModelFile::may_err),
            _ => false,
        };
        if fine { Ok(()) } else { fail(format!("unexpected error: {e:?}")) }
    }

    /// Checks that after an error the front-end's maps and the number of grants are as before.
    fn as_before(&self, done: &Result<(), GrantError>, before: &Before) -> Checked {
        if self.engine.sizes().0 != before.grants {
            return fail(format!(
                "{} grants after an error, not {}",
                self.engine.sizes().0,
                before.grants
            ));
        }
        let torn = matches!(done, Err(GrantError::Window(ShowError::Torn(_))));
        let maps = self.strict.maps();
        if !torn && maps != before.maps {
            return fail(format!("after {done:?} the maps are {maps:x?}, not {:x?}", before.maps));
        }
        Ok(())
    }
}
