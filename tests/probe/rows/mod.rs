// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rows of docs/front-ends.md, in its order.

mod devices;
mod life;
mod limits;
mod maps;

use crate::backend::Answer;
use crate::harness::Harness;
use crate::qemu::{ProbeError, Res};
use crate::table::Row;
use crate::wire::Range;

/// All rows.
pub fn all() -> impl Iterator<Item = &'static Row> {
    let tables = [limits::ROWS, maps::ROWS, life::ROWS, devices::ROWS];
    let mut rows: Vec<&Row> = tables.into_iter().flatten().collect();
    rows.sort_by_key(|row| row.name[1..].parse().unwrap_or(u32::MAX));
    rows.into_iter()
}

/// What Linux guests ask for at a time.
const RANGE: u64 = 2 << 20;
/// The smallest map.
const PAGE: u64 = 4096;

/// What every row stands on.
pub fn control(harness: &mut Harness) -> Res<()> {
    let backend = harness.started(false)?;
    let file = harness.file("file", RANGE)?;
    let answer = backend.map(Range::new(0, RANGE), &file)?;
    if answer == Answer::Done && harness.load(0, 0)? == b'p' {
        return Ok(());
    }
    Err(ProbeError::Other(format!("a plain map: {answer:?}, or it shows something else")))
}
