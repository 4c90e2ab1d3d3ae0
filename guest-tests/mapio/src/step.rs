// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Two processes in two guests access one file in turn, by stores and loads alone: without syncs,
//! writes or messages.
//!
//! A counter in page 0 says whose turn it is. In its turn a process checks the page that the other
//! one has stored in the previous turn, stores the next page, and advances the counter.

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::Ordering::{Acquire, Release};
use std::time::{Duration, Instant};

use crate::Result;
use crate::map::{Mapping, PAGE};

/// Number of pages that are used in turn; they span two ranges of 2 MiB.
const PAGES: u64 = 1000;
/// Time limit that tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(60);

fn page_of(round: u64) -> ([u8; PAGE], usize) {
    let mut page = [0; PAGE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(round * 512 + index as u64).to_le_bytes());
    }
    (page, PAGE * (1 + (round % PAGES) as usize))
}

pub fn play(path: &Path, player: u64, rounds: u64) -> Result<()> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|e| e.to_string())?;
    let mapping = Mapping::shared(&file, PAGE * (1 + PAGES as usize), true)?;
    let turn = mapping.counter(0);
    for round in (player..rounds).step_by(2) {
        let end = Instant::now() + HANG;
        while turn.load(Acquire) != round {
            if Instant::now() > end {
                return Err(format!("round {round}: the turn is still {}", turn.load(Acquire)));
            }
            std::thread::yield_now();
        }
        if round > 0 {
            let (expected, offset) = page_of(round - 1);
            let mut got = [0; PAGE];
            mapping.load(offset, &mut got);
            if got != expected {
                return Err(format!("round {round}: the other player's page differs"));
            }
        }
        let (page, offset) = page_of(round);
        mapping.store(offset, &page);
        turn.store(round + 1, Release);
    }
    println!("rounds={rounds}");
    Ok(())
}
