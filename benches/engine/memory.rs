// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Point 4: bytes of memory per entry, as reported by the index and as counted by the allocator.

use vhost_user_dax::dax::entry::{Block, Entry, Order, PageIndex};
use vhost_user_dax::dax::extent::Access;
use vhost_user_dax::dax::index::{Index, Mark};

use super::doubles::Loaded;
use super::measure::Effort;
use super::memory_count::live_bytes;
use super::ordered_map::OrderedMap;
use super::report::{Table, Verdicts, chart, headline, short};

struct Shape {
    name: &'static str,
    order: Order,
    /// Distance between the starts of two entries, in pages.
    every_pages: u64,
    aim_bytes: Option<f64>,
}

const SHAPES: [Shape; 4] = [
    Shape { name: "PMD, side by side", order: Order::Pmd, every_pages: 512, aim_bytes: Some(16.0) },
    Shape { name: "PTE, side by side", order: Order::Pte, every_pages: 1, aim_bytes: Some(12.0) },
    Shape { name: "PTE, one in 64 pages", order: Order::Pte, every_pages: 64, aim_bytes: None },
    Shape { name: "PTE, one in a chunk", order: Order::Pte, every_pages: 512, aim_bytes: None },
];

pub fn bench(effort: Effort, verdicts: &mut Verdicts) {
    let entries: u64 = effort.pick(1_000_000, 100_000);
    headline(4, &format!("Bytes of memory per entry, {entries} dirty entries"));
    let mut table = Table::new(&["entries", "Index::bytes()", "allocated", "engine", "BTreeMap"]);
    let mut bars = Vec::new();
    for shape in SHAPES {
        let per_entry = |bytes: usize| bytes as f64 / entries as f64;
        let before = live_bytes();
        let index = index_of(&shape, entries);
        let allocated = per_entry(live_bytes() - before);
        let own = per_entry(index.bytes());
        drop(index);
        let before = live_bytes();
        let map = map_of(&shape, entries);
        let of_map = per_entry(live_bytes() - before);
        drop(map);
        // The growth of the engine's memory by a grant.
        let engine = (shape.every_pages == shape.order.pages()).then(|| {
            let loaded = Loaded::empty(entries, shape.order);
            let before = live_bytes();
            loaded.grant(PageIndex(0), loaded.last.0 + 1, Access::Write);
            per_entry(live_bytes() - before)
        });
        table.row(&[
            &shape.name,
            &short(own),
            &short(allocated),
            &short(engine.unwrap_or(f64::NAN)),
            &short(of_map),
        ]);
        bars.push((shape.name.to_owned(), allocated));
        bars.push((format!("{}, BTreeMap", shape.name), of_map));
        if let Some(aim) = shape.aim_bytes {
            let most = engine.map_or(allocated, |engine| engine.max(allocated));
            verdicts.aim(
                most <= aim,
                format!("4. bytes per {}: {} (aim {aim})", shape.name, short(most)),
            );
        }
    }
    table.print();
    chart("bytes allocated per entry", &bars);
}

fn entries_of(shape: &Shape, entries: u64) -> impl Iterator<Item = (PageIndex, Entry)> {
    let (order, every) = (shape.order, shape.every_pages);
    (0..entries)
        .map(move |n| (PageIndex(n * every), Entry::real(order, Block::new(n * every).unwrap())))
}

fn index_of(shape: &Shape, entries: u64) -> Index {
    let mut index = Index::default();
    for (page, entry) in entries_of(shape, entries) {
        index.insert(page, entry).unwrap();
        index.set_mark(page, Mark::Dirty, true);
    }
    index
}

fn map_of(shape: &Shape, entries: u64) -> OrderedMap {
    let mut map = OrderedMap::default();
    for (page, entry) in entries_of(shape, entries) {
        assert!(map.insert_dirty(page, entry));
    }
    map
}
