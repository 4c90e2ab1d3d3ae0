// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 5: the engine's part of a pmem flush. The whole file is granted, the kernel tracks dirty
//! pages, and a sync takes no time.

use std::hint::black_box;
use std::sync::Arc;

use vhost_user_dax::dax::engine::Engine;
use vhost_user_dax::dax::entry::PageIndex;
use vhost_user_dax::dax::extent::{Access, FileExtents};
use vhost_user_dax::persist::Persist;
use vhost_user_dax::window::{FileOffset, WindowBytes};

use super::doubles::{AnyMapper, InstantDisk, Loaded, MOST_MAPS};
use super::measure::{Effort, Samples, nanos};
use super::report::{Table, Verdicts, chart, headline, short};

const MOST_RATIO: f64 = 1.2;
/// Number of flushes in one sample.
const FLUSHES: u32 = 20_000;

const SIZES: [(&str, u64); 2] = [("1 GiB", 1 << 30), ("1 TiB", 1 << 40)];

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    headline(5, "pmem flush: the engine's own share, a sync that costs nothing");
    let mut loaded: [Option<Loaded>; SIZES.len()] = Default::default();
    let grants = Samples::interleaved(effort.pick(5, 1), SIZES.len(), |side| {
        loaded[side] = None;
        let fresh = pmem(SIZES[side].1);
        let time = nanos(|| fresh.grant(PageIndex(0), fresh.last.0 + 1, Access::Write));
        loaded[side] = Some(fresh);
        time
    });
    let [Some(small), Some(large)] = &loaded else { return };
    let flushes = Samples::interleaved(effort.pick(101, 31), SIZES.len(), |side| {
        let loaded = [small, large][side];
        let all = nanos(|| (0..FLUSHES).for_each(|_| black_box(loaded).writeback()));
        all / f64::from(FLUSHES)
    });
    let mut table = Table::new(&["file", "grant ms", "entries", "flush ns", "steps per flush"]);
    let mut bars = Vec::new();
    for (side, (name, _)) in SIZES.iter().enumerate() {
        let of_side = [small, large][side];
        let counters = of_side.engine.counters().snapshot();
        let before = of_side.steps();
        of_side.writeback();
        table.row(&[
            name,
            &short(grants.median(side) / 1e6),
            &(counters.pmd + counters.pte),
            &short(flushes.median(side)),
            &(of_side.steps() - before),
        ]);
        bars.push(((*name).to_owned(), flushes.median(side)));
    }
    table.print();
    chart("ns of the engine per flush", &bars);
    let ratio = flushes.ratio(1, 0);
    verdicts.must(
        ratio.max(1.0 / ratio) <= MOST_RATIO,
        format!("5. flush of 1 TiB over 1 GiB: {} (within {MOST_RATIO})", short(ratio)),
    );
}

/// An engine with a sparse file, set up as virtio-pmem does.
fn pmem(bytes: u64) -> Loaded {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    let engine = Engine::new(WindowBytes(bytes), Arc::new(AnyMapper), MOST_MAPS);
    let source = Box::new(FileExtents::preallocated(Arc::new(file), bytes));
    let space = engine.space(source, Persist::kernel(InstantDisk));
    let last = PageIndex::of(FileOffset(bytes - 1));
    Loaded { engine, space, last }
}
