// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kernel as the oracle: patterns of faults, stores, syncs, holes and truncations run on a file
//! of a DAX file system and on the engine. The kernel's `fs_dax` trace events show its decisions: 2
//! MiB or 4 KiB, hole or blocks, and the range of a writeback. The engine must have decided the
//! same, except for the differences in docs/kernel-oracle.md.
//!
//! `tests/guest` runs this program in a VM with an NVDIMM; `VUD_DAX_DIR` is a directory there.
//! `ORACLE_SEED` and `ORACLE_PATTERNS` select the random patterns.

mod compare;
mod kernel;
mod ops;
mod replay;

use std::collections::BTreeMap;

use compare::{Difference, Judged, judge};

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn print(kinds: &BTreeMap<Difference, u64>, judged: &Judged) {
    println!(
        "judged: {} faults ({} by 2 MiB, {} holes), {} writebacks of {} entries",
        judged.faults, judged.pmd, judged.holes, judged.writebacks, judged.entries
    );
    for (difference, times) in kinds {
        println!("  listed: {difference:?}: {times} times");
    }
}

fn all(patterns: impl Iterator<Item = (String, Vec<ops::Op>)>) {
    let (mut judged, mut kinds, mut count) = (Judged::default(), BTreeMap::new(), 0);
    for (name, pattern) in patterns {
        if let Err(why) = judge(&pattern, &mut judged, &mut kinds) {
            panic!("{name}: {why}\npattern: {pattern:?}");
        }
        count += 1;
        if count % 50 == 0 {
            println!("{count} patterns");
        }
    }
    println!("{count} patterns agree");
    print(&kinds, &judged);
    assert!(
        judged.faults > 0 && judged.pmd > 0 && judged.entries > 0,
        "no fault, no fault of 2 MiB, or no written-back entry was compared"
    );
}

/// Shows: the engine decides as the kernel does, for hand-written patterns.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn scripted_patterns() {
    all(ops::scripted().into_iter().map(|(name, ops)| (name.to_owned(), ops)));
}

/// Shows: the engine decides as the kernel does, for random patterns.
#[test]
#[ignore = "needs a DAX file system: run by tests/guest"]
fn random_patterns() {
    let (seed, patterns) = (number("ORACLE_SEED", 1), number("ORACLE_PATTERNS", 60));
    println!("ORACLE_SEED={seed} ORACLE_PATTERNS={patterns}");
    all((0..patterns).map(|n| (format!("pattern {n} of seed {seed}"), ops::random(seed << 32 | n))));
}
