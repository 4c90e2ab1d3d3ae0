// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compares, operation by operation, the kernel's decision with the engine's; and the differences
//! that are allowed.

use std::collections::{BTreeMap, BTreeSet};

use vhost_user_dax::dax::entry::{Entry, Order};

use super::kernel::{Fault, Kernel, fault, written_back};
use super::ops::Op;
use super::replay::Ours;

/// The allowed differences. docs/kernel-oracle.md explains each under the same name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// The engine writes back again what it has written back before: it can't write-protect the
    /// guest's mapping.
    StaysDirty,
    /// The process has a page table of 4 KiB pages there already, and Linux's memory management
    /// then does not ask for 2 MiB (there is no `dax_pmd_fault` event).
    NotAsked,
    /// ext4 reports a partly punched hole in several extents, and the kernel takes the first one.
    /// FIEMAP reports the whole hole.
    HoleInPieces,
    /// When a hole is made or filled in a chunk, the kernel drops its entry and maps anew at the
    /// next fault. A guest does not fault again on what it has mapped, so the engine makes new
    /// entries at once: 4 KiB ones for a chunk of holes and blocks. They remain when the chunk is
    /// uniform again.
    RefaultedByPage,
}

/// Number of comparisons, by kind.
#[derive(Default)]
pub struct Judged {
    pub faults: u64,
    pub pmd: u64,
    pub holes: u64,
    pub writebacks: u64,
    pub entries: u64,
}

/// Runs a pattern on both sides.
///
/// # Errors
/// The first difference that is not allowed.
pub fn judge(
    pattern: &[Op],
    judged: &mut Judged,
    kinds: &mut BTreeMap<Difference, u64>,
) -> Result<(), String> {
    let kernel = Kernel::new();
    let ours = Ours::new(kernel.file.clone());
    let mut cut = BTreeSet::new();
    for (number, op) in pattern.iter().enumerate() {
        let events = kernel.act(*op);
        let difference = step(*op, &events, &ours, &mut cut, judged);
        let difference =
            difference.map_err(|why| format!("step {number}, {op:?}: {why}\n{events:#?}"))?;
        if let Some(difference) = difference {
            *kinds.entry(difference).or_default() += 1;
        }
    }
    Ok(())
}

fn step(
    op: Op,
    events: &[String],
    ours: &Ours,
    cut: &mut BTreeSet<u64>,
    judged: &mut Judged,
) -> Result<Option<Difference>, String> {
    match op {
        Op::Read(page) => match fault(events) {
            Fault::None => Ok(None),
            theirs => same(theirs, ours.read(page)?, &seen(events, cut, page), judged),
        },
        Op::Store(page) => {
            let theirs = fault(events);
            let whole = matches!(theirs, Fault::Pmd { .. });
            if theirs == Fault::None {
                return Ok(None);
            }
            // The engine is asked for 2 MiB even if the kernel took 4 KiB: it must not take 2 MiB
            // there.
            let chunk = ours.read(page)?;
            let seen = seen(events, cut, page);
            if !whole && seen.asked && chunk.order() == Order::Pmd && chunk.is_real() {
                return Err(format!("the kernel took 4 KiB, the engine {chunk:?}"));
            }
            same(theirs, ours.store(page, whole)?, &seen, judged)
        }
        Op::Fsync => {
            let (theirs, own) = (written_back(events), ours.fsync()?);
            judged.writebacks += 1;
            judged.entries += theirs.len() as u64;
            let ours = |page| {
                let entry = own.range(..=(page, u64::MAX)).next_back();
                entry.is_some_and(|(start, pages)| page < start + pages)
            };
            let mut pages = theirs.iter().flat_map(|(start, pages)| *start..start + pages);
            if let Some(page) = pages.find(|page| !ours(*page)) {
                return Err(format!(
                    "page {page} was written back by the kernel, not by us: {own:?}"
                ));
            }
            Ok((!own.is_subset(&theirs)).then_some(Difference::StaysDirty))
        }
        Op::Write(page, pages) => {
            cut.extend(page / 512..=(page + pages - 1) / 512);
            ours.written(page, pages).map(|()| None)
        }
        Op::Fallocate(page, pages) => {
            cut.extend(page / 512..=(page + pages - 1) / 512);
            Ok(None)
        }
        Op::Punch(page, pages) => {
            cut.extend(page / 512..=(page + pages - 1) / 512);
            ours.punched(page, pages).map(|()| None)
        }
        Op::Truncate(pages) => {
            cut.insert(pages / 512);
            ours.truncated(pages).map(|()| None)
        }
    }
}

/// Conditions under which a difference is allowed.
struct Seen {
    /// The kernel's memory management asked for 2 MiB.
    asked: bool,
    /// A hole was made or filled in the chunk earlier in the pattern.
    cut: bool,
}

fn seen(events: &[String], cut: &BTreeSet<u64>, page: u64) -> Seen {
    let asked = events.iter().any(|line| line.starts_with("dax_pmd_fault:"));
    Seen { asked, cut: cut.contains(&(page / 512)) }
}

fn same(
    theirs: Fault,
    ours: Entry,
    seen: &Seen,
    judged: &mut Judged,
) -> Result<Option<Difference>, String> {
    let own = match ours.order() {
        Order::Pmd => Fault::Pmd { hole: ours.is_zero() },
        Order::Pte => Fault::Pte { hole: ours.is_zero() },
    };
    judged.faults += 1;
    judged.pmd += u64::from(matches!(theirs, Fault::Pmd { .. }));
    judged.holes +=
        u64::from(matches!(theirs, Fault::Pmd { hole: true } | Fault::Pte { hole: true }));
    if theirs == own {
        return Ok(None);
    }
    match (theirs, own) {
        (Fault::Pmd { hole: a }, Fault::Pte { hole: b }) if a == b && seen.cut => {
            Ok(Some(Difference::RefaultedByPage))
        }
        (Fault::Pte { hole: true }, Fault::Pmd { hole: true }) if seen.cut && seen.asked => {
            Ok(Some(Difference::HoleInPieces))
        }
        (Fault::Pte { hole: a }, Fault::Pmd { hole: b }) if a == b && !seen.asked => {
            Ok(Some(Difference::NotAsked))
        }
        _ => Err(format!("the kernel: {theirs:?}, the engine: {own:?}")),
    }
}
