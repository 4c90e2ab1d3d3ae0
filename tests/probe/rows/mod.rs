// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rows of docs/front-ends.md, in the order of that file.

mod devices;
mod life;
mod limits;
mod maps;

use crate::backend::Answer;
use crate::harness::Harness;
use crate::qemu::{ProbeError, Res};
use crate::table::Row;
use crate::wire::Range;

/// All rows, in the order of their numbers.
pub fn all() -> impl Iterator<Item = &'static Row> {
    let tables = [limits::ROWS, maps::ROWS, life::ROWS, devices::ROWS];
    let mut rows: Vec<&Row> = tables.into_iter().flatten().collect();
    rows.sort_by_key(|row| row.name[1..].parse().unwrap_or(u32::MAX));
    rows.into_iter()
}

/// The size of the maps that Linux guests ask for, in bytes.
const RANGE: u64 = 2 << 20;
/// The size of the smallest map, in bytes.
const PAGE: u64 = 4096;

/// Checks what every row needs: the device starts, and a load through a map reads the file.
pub fn control(harness: &mut Harness) -> Res<()> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    if answer == Answer::Done && harness.load(0, 0)? == b'p' {
        return Ok(());
    }
    Err(ProbeError::Other(format!("a plain map: {answer:?}, or it shows something else")))
}
