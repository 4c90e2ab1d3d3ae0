// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Op by op, what the kernel decided beside what the engine did; and the differences that are
//! allowed.

use std::collections::{BTreeMap, BTreeSet};

use vhost_user_dax::dax::entry::{Entry, Order};

use super::kernel::{Fault, Kernel, fault, written_back};
use super::ops::Op;
use super::replay::Ours;

/// The differences that docs/kernel-oracle.md explains, each under this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Difference {
    /// What has been written back is written back again: we can't write-protect the guest's view.
    StaysDirty,
    /// The process has a page table for 4 KiB there from before, and Linux's memory management does
    /// not even ask for 2 MiB then (no `dax_pmd_fault`).
    NotAsked,
    /// ext4 tells a hole in pieces where a part of it was punched, and its kernel takes the first
    /// one; FIEMAP tells the whole.
    HoleInPieces,
    /// When a hole is made or filled in a chunk, the kernel forgets its entry. What a guest has
    /// mapped it does not ask for again, so we make entries anew, of 4 KiB for a chunk of two
    /// kinds, and those stay when it is of one kind again.
    RefaultedByPage,
}

/// What was compared.
#[derive(Default)]
pub struct Judged {
    pub faults: u64,
    pub pmd: u64,
    pub holes: u64,
    pub writebacks: u64,
    pub entries: u64,
}

/// Does a pattern on both sides.
///
/// # Errors
/// The first difference that is not listed.
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
            // Also where the kernel could not: we must not, either.
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

/// What a difference may be due to.
struct Seen {
    /// 2 MiB were asked for.
    asked: bool,
    /// A hole was made or filled in the chunk before.
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
