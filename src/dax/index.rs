// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the index of one space: its entries by page, with marks. Knows no locks and no
//! waiters.
//!
//! It is a radix tree over page numbers. A node has 64 slots, so one word holds a mark of all its
//! slots. A slot of level 0 holds a PTE entry. A level-1 node has the 8 leaves of a chunk as
//! children. A slot of level 2 holds either a PMD entry or the level-1 node of the chunk. A mark on
//! a slot with a child node means that the child has that mark on a slot: a search for marked
//! entries never enters a node without marks (behaviour 11).

#![allow(clippy::indexing_slicing)] // Slots are masked to 6 bits; node ids come from the tree.

use std::cell::Cell;

use super::entry::{Entry, Order, PMD_ORDER, PageIndex};

/// Number of slots of a node: the number of bits of a word.
const SLOTS: usize = 64;
/// log2 of [`SLOTS`].
const SLOT_BITS: u32 = 6;
/// The level whose slots cover one chunk each.
const CHUNK_LEVEL: u32 = 2;
/// The highest level. A root of this level covers 2^51 pages: the largest possible file (2^63
/// bytes).
const TOP_LEVEL: u32 = 8;

/// A mark of an entry, which a search can look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// The entry was or may have been stored to since it was last made durable.
    Dirty,
    /// A writeback has tagged the entry and not yet flushed it.
    ToWrite,
    /// A writeback flushes the entry, and holds its lock until the flush is fenced.
    Writeback,
}

/// Number of marks.
const MARKS: usize = 3;

/// The range of the new entry has an entry already (EEXIST in the kernel).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Occupied;

/// A node's number in `Index::nodes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct NodeId(u32);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    Vacant,
    Entry(Entry),
    Node(NodeId),
}

impl Slot {
    fn from_word(word: u64) -> Self {
        match Entry::from_word(word) {
            Some(entry) => Self::Entry(entry),
            None if word == 0 => Self::Vacant,
            None => Self::Node(NodeId((word >> 1) as u32)),
        }
    }

    fn word(self) -> u64 {
        match self {
            Self::Vacant => 0,
            Self::Entry(entry) => entry.word(),
            Self::Node(id) => u64::from(id.0) << 1 | 1,
        }
    }
}

struct Node {
    slots: [u64; SLOTS],
    used: u64,
    marks: [u64; MARKS],
    /// None at the root.
    parent: Option<NodeId>,
}

impl Node {
    fn new(parent: Option<NodeId>) -> Box<Self> {
        Box::new(Self { slots: [0; SLOTS], used: 0, marks: [0; MARKS], parent })
    }

    fn get(&self, slot: usize) -> Slot {
        Slot::from_word(self.slots[slot])
    }

    fn set(&mut self, slot: usize, value: Slot) {
        self.slots[slot] = value.word();
        let bit = 1 << slot;
        if value == Slot::Vacant {
            self.used &= !bit;
            self.marks.iter_mut().for_each(|marks| *marks &= !bit);
        } else {
            self.used |= bit;
        }
    }

    fn bits(&self, which: Option<Mark>) -> u64 {
        which.map_or(self.used, |mark| self.marks[mark as usize])
    }
}

/// log2 of the number of pages that one slot of `level` covers.
const fn shift(level: u32) -> u32 {
    match level {
        0 => 0,
        1 => SLOT_BITS,
        _ => PMD_ORDER + SLOT_BITS * (level - CHUNK_LEVEL),
    }
}

fn slot_of(page: PageIndex, level: u32) -> usize {
    let mask = if level == 1 { (1 << (PMD_ORDER - SLOT_BITS)) - 1 } else { SLOTS as u64 - 1 };
    (page.0 >> shift(level) & mask) as usize
}

/// Entries by page, with marks.
pub struct Index {
    nodes: Vec<Option<Box<Node>>>,
    free: Vec<NodeId>,
    root: Option<NodeId>,
    root_level: u32,
    entries: u64,
    /// The node of the entry that was found last. A walk over a range looks up the neighbour next,
    /// and finds it in this node without a descent from the root.
    finger: Cell<Option<Finger>>,
    /// Number of nodes visited: see [`Index::steps`].
    steps: Cell<u64>,
}

/// A live node, its level, and the first page that it covers.
#[derive(Clone, Copy)]
struct Finger {
    node: NodeId,
    level: u32,
    base: PageIndex,
}

impl Finger {
    /// The finger at `node`, which has `level` and covers `page`.
    fn at(node: NodeId, level: u32, page: PageIndex) -> Self {
        Self { node, level, base: PageIndex(page.0 >> shift(level + 1) << shift(level + 1)) }
    }

    fn end(self) -> PageIndex {
        self.base + (1 << shift(self.level + 1))
    }

    fn covers(self, page: PageIndex) -> bool {
        self.base <= page && page < self.end()
    }
}

impl Default for Index {
    fn default() -> Self {
        Self {
            nodes: Vec::new(),
            free: Vec::new(),
            root: None,
            root_level: CHUNK_LEVEL,
            entries: 0,
            finger: Cell::new(None),
            steps: Cell::new(0),
        }
    }
}

/// The node, slot and level of an entry.
#[derive(Clone, Copy)]
struct Place {
    node: NodeId,
    slot: usize,
    level: u32,
}

impl Index {
    /// The number of entries.
    pub fn len(&self) -> u64 {
        self.entries
    }

    /// Whether the index has no entry.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Number of nodes that all operations have visited so far. Tests measure cost by it.
    pub fn steps(&self) -> u64 {
        self.steps.get()
    }

    /// Memory of the tree, in bytes.
    pub fn bytes(&self) -> usize {
        let live = self.nodes.len() - self.free.len();
        live * size_of::<Node>()
            + self.nodes.capacity() * size_of::<Option<Box<Node>>>()
            + self.free.capacity() * size_of::<NodeId>()
    }

    fn node(&self, id: NodeId) -> &Node {
        self.steps.set(self.steps.get() + 1);
        match &self.nodes[id.0 as usize] {
            Some(node) => node,
            None => unreachable!("a live slot names a freed node"),
        }
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        self.steps.set(self.steps.get() + 1);
        match &mut self.nodes[id.0 as usize] {
            Some(node) => node,
            None => unreachable!("a live slot names a freed node"),
        }
    }

    fn allocate(&mut self, parent: Option<NodeId>) -> NodeId {
        if let Some(id) = self.free.pop() {
            self.nodes[id.0 as usize] = Some(Node::new(parent));
            return id;
        }
        // The cast loses nothing: 2^32 nodes would take over 2 TiB of memory.
        let id = NodeId(self.nodes.len() as u32);
        self.nodes.push(Some(Node::new(parent)));
        id
    }

    fn covers(&self, page: PageIndex) -> bool {
        page.0 >> shift(self.root_level) < SLOTS as u64
    }

    /// The finger's node if it covers `page`, else the root if it covers `page`: node and level.
    fn nearest(&self, page: PageIndex) -> Option<(NodeId, u32)> {
        match self.finger.get() {
            Some(finger) if finger.covers(page) => Some((finger.node, finger.level)),
            _ => self.root.filter(|_| self.covers(page)).map(|root| (root, self.root_level)),
        }
    }

    fn locate(&self, page: PageIndex) -> Option<(Place, Entry)> {
        let (mut node, mut level) = self.nearest(page)?;
        loop {
            let slot = slot_of(page, level);
            match self.node(node).get(slot) {
                Slot::Vacant => return None,
                Slot::Entry(entry) => {
                    self.finger.set(Some(Finger::at(node, level, page)));
                    return Some((Place { node, slot, level }, entry));
                }
                Slot::Node(child) => node = child,
            }
            level -= 1;
        }
    }

    /// The entry that covers `page`, with its first page.
    pub fn get(&self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        self.locate(page).map(|(_, entry)| (entry.order().start(page), entry))
    }

    /// Adds an entry without marks.
    ///
    /// # Errors
    /// [`Occupied`] if an entry covers `page`, or if `entry` is a PMD and the chunk has PTE
    /// entries.
    pub fn insert(&mut self, page: PageIndex, entry: Entry) -> Result<(), Occupied> {
        debug_assert!(page <= PageIndex::LAST);
        let goal = match entry.order() {
            Order::Pte => 0,
            Order::Pmd => CHUNK_LEVEL,
        };
        let (mut node, mut level) = match self.nearest(page) {
            Some((node, level)) if level >= goal => (node, level),
            _ => (self.root_for(page), self.root_level),
        };
        while level > goal {
            let slot = slot_of(page, level);
            node = match self.node(node).get(slot) {
                Slot::Node(child) => child,
                Slot::Entry(_) => return Err(Occupied),
                Slot::Vacant => {
                    let child = self.allocate(Some(node));
                    self.node_mut(node).set(slot, Slot::Node(child));
                    child
                }
            };
            level -= 1;
        }
        let slot = slot_of(page, level);
        // If the slot is occupied, all its parents existed, so the loop has allocated no node.
        if self.node(node).get(slot) != Slot::Vacant {
            return Err(Occupied);
        }
        self.node_mut(node).set(slot, Slot::Entry(entry));
        self.finger.set(Some(Finger::at(node, level, page)));
        self.entries += 1;
        Ok(())
    }

    /// The root, grown until it covers `page`.
    fn root_for(&mut self, page: PageIndex) -> NodeId {
        let Some(mut root) = self.root else {
            while !self.covers(page) && self.root_level < TOP_LEVEL {
                self.root_level += 1;
            }
            let root = self.allocate(None);
            self.root = Some(root);
            return root;
        };
        while !self.covers(page) && self.root_level < TOP_LEVEL {
            let marks = self.node(root).marks;
            let above = self.allocate(None);
            self.node_mut(root).parent = Some(above);
            let node = self.node_mut(above);
            node.set(0, Slot::Node(root));
            node.marks = marks.map(|marks| u64::from(marks != 0));
            root = above;
            self.root_level += 1;
        }
        self.root = Some(root);
        root
    }

    fn release(&mut self, id: NodeId) {
        self.nodes[id.0 as usize] = None;
        self.free.push(id);
        // The finger may point to this node, and its number is given to the next new node.
        self.finger.set(None);
    }

    /// Replaces the entry that covers `page` by `entry`, and keeps the marks. False if no entry of
    /// the same order covers `page`.
    pub fn replace(&mut self, page: PageIndex, entry: Entry) -> bool {
        match self.locate(page) {
            Some((place, old)) if old.order() == entry.order() => {
                self.node_mut(place.node).slots[place.slot] = entry.word();
                true
            }
            _ => false,
        }
    }

    /// Removes the entry that covers `page`, with its marks. Returns its first page and the entry.
    pub fn remove(&mut self, page: PageIndex) -> Option<(PageIndex, Entry)> {
        let (_, entry) = self.locate(page)?;
        let root = self.root?;
        if self.remove_below(root, self.root_level, page) {
            // The last entry was removed: the reset frees all memory of the tree.
            *self = Self { steps: self.steps.clone(), ..Self::default() };
        } else {
            self.entries -= 1;
        }
        Some((entry.order().start(page), entry))
    }

    /// Removes the entry below `node` that covers `page`. Returns whether `node` has become empty.
    fn remove_below(&mut self, node: NodeId, level: u32, page: PageIndex) -> bool {
        let slot = slot_of(page, level);
        if let Slot::Node(child) = self.node(node).get(slot) {
            if self.remove_below(child, level - 1, page) {
                self.node_mut(node).set(slot, Slot::Vacant);
                self.release(child);
            } else {
                self.sum_up(node, slot, child);
            }
        } else {
            self.node_mut(node).set(slot, Slot::Vacant);
        }
        self.node(node).used == 0
    }

    /// Sets the marks of `slot`, whose child node is `child`, to the marks that `child` contains.
    fn sum_up(&mut self, node: NodeId, slot: usize, child: NodeId) {
        let below = self.node(child).marks;
        for (marks, below) in self.node_mut(node).marks.iter_mut().zip(below) {
            *marks = *marks & !(1 << slot) | u64::from(below != 0) << slot;
        }
    }

    /// Whether the entry that covers `page` has `mark`.
    pub fn is_marked(&self, page: PageIndex, mark: Mark) -> bool {
        self.locate(page)
            .is_some_and(|(place, _)| self.node(place.node).bits(Some(mark)) & 1 << place.slot != 0)
    }

    /// Sets or clears `mark` on the entry that covers `page`. False if no entry covers it.
    pub fn set_mark(&mut self, page: PageIndex, mark: Mark, on: bool) -> bool {
        let Some((place, _)) = self.locate(page) else { return false };
        self.change_marks(place, page, mark, 1 << place.slot, on);
        true
    }

    /// Sets or clears `mark` on the slots `bits` of the node at `place`, which covers `page`, and
    /// then updates the mark on the slots of its ancestors.
    fn change_marks(&mut self, place: Place, page: PageIndex, mark: Mark, bits: u64, on: bool) {
        let Place { mut node, mut level, .. } = place;
        let mut bits = bits;
        loop {
            let at = self.node_mut(node);
            let marks = &mut at.marks[mark as usize];
            let was_clean = *marks == 0;
            *marks = if on { *marks | bits } else { *marks & !bits };
            let right_above = was_clean == (*marks == 0);
            let Some(parent) = at.parent.filter(|_| !right_above) else { break };
            (node, level) = (parent, level + 1);
            bits = 1 << slot_of(page, level);
        }
    }

    /// The first entry that covers a page of `from..=last` and, if `mark` is given, has that mark:
    /// its first page and the entry.
    pub fn next(
        &self,
        from: PageIndex,
        last: PageIndex,
        mark: Option<Mark>,
    ) -> Option<(PageIndex, Entry)> {
        if from > last || !self.covers(from) {
            return None;
        }
        let mut from = from;
        if let Some(finger) = self.finger.get().filter(|finger| finger.covers(from)) {
            let Finger { node, level, base } = finger;
            let found = self.next_below(node, level, base, from, last, mark);
            from = finger.end();
            if found.is_some() || from > last || !self.covers(from) {
                return found;
            }
        }
        self.next_below(self.root?, self.root_level, PageIndex(0), from, last, mark)
    }

    fn next_below(
        &self,
        id: NodeId,
        level: u32,
        base: PageIndex,
        from: PageIndex,
        last: PageIndex,
        mark: Option<Mark>,
    ) -> Option<(PageIndex, Entry)> {
        let node = self.node(id);
        let first = if from > base { slot_of(from, level) } else { 0 };
        let mut bits = node.bits(mark) & u64::MAX << first;
        while bits != 0 {
            let slot = bits.trailing_zeros() as usize;
            let start = base + ((slot as u64) << shift(level));
            if start > last {
                return None;
            }
            match node.get(slot) {
                Slot::Entry(entry) => {
                    self.finger.set(Some(Finger { node: id, level, base }));
                    return Some((start, entry));
                }
                Slot::Node(child) => {
                    let found = self.next_below(child, level - 1, start, from, last, mark);
                    if found.is_some() {
                        return found;
                    }
                }
                Slot::Vacant => {}
            }
            bits &= bits - 1;
        }
        None
    }

    /// Marks the dirty entries of `from..=last` ToWrite, at most `most` of them. Returns the number
    /// of entries that were marked, and the page of the next dirty entry if it was not reached.
    pub fn tag_for_writeback(
        &mut self,
        from: PageIndex,
        last: PageIndex,
        most: u64,
    ) -> (u64, Option<PageIndex>) {
        let mut tagged = 0;
        let mut at = from;
        while let Some((start, entry)) = self.next(at, last, Some(Mark::Dirty)) {
            let Some((place, _)) = self.locate(start).filter(|_| tagged < most) else {
                return (tagged, Some(start));
            };
            let mut bits = 1 << place.slot;
            at = start + entry.order().pages();
            if place.level == 0 {
                // A leaf has only entries in its slots: mark all of its dirty ones at once.
                let behind = (last.0 - start.0).min((SLOTS - 1 - place.slot) as u64);
                bits = self.node(place.node).bits(Some(Mark::Dirty))
                    & u64::MAX << place.slot
                    & u64::MAX >> (SLOTS as u64 - 1 - place.slot as u64 - behind);
                while u64::from(bits.count_ones()) > most - tagged {
                    bits &= !(1 << bits.ilog2());
                }
                at = PageIndex(start.0 - place.slot as u64 + u64::from(bits.ilog2()) + 1);
            }
            self.change_marks(place, start, Mark::ToWrite, bits, true);
            tagged += u64::from(bits.count_ones());
        }
        (tagged, None)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::dax::entry::{Block, PMD_PAGES};

    type Marks = (bool, bool);

    /// The model: an ordered map from first page to entry and marks (Dirty, ToWrite).
    #[derive(Default)]
    struct Model(BTreeMap<u64, (Entry, Marks)>);

    impl Model {
        fn get(&self, page: u64) -> Option<(u64, Entry, Marks)> {
            let (start, (entry, marks)) = self.0.range(..=page).next_back()?;
            (page < start + entry.order().pages()).then_some((*start, *entry, *marks))
        }

        fn next(&self, from: u64, last: u64, keep: impl Fn(Marks) -> bool) -> Option<(u64, Entry)> {
            self.0
                .iter()
                .map(|(start, (entry, marks))| (*start, *entry, *marks))
                .find(|(start, entry, marks)| {
                    start + entry.order().pages() > from && *start <= last && keep(*marks)
                })
                .map(|(start, entry, _)| (start, entry))
        }
    }

    /// xorshift64: the same sequence in each run.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % n
        }
    }

    fn start(found: Option<(PageIndex, Entry)>) -> Option<(u64, Entry)> {
        found.map(|(start, entry)| (start.0, entry))
    }

    fn step(index: &mut Index, model: &mut Model, random: &mut Random) {
        // Low, high and the highest page numbers, so that the tree has few, more and all levels.
        let far = [0, 1 << 20, PageIndex::LAST.0 - 4 * PMD_PAGES + 1][random.below(3) as usize];
        let at = far + random.below(4 * PMD_PAGES);
        let page = PageIndex(at);
        let mark = [Mark::Dirty, Mark::ToWrite][random.below(2) as usize];
        match random.below(6) {
            0 | 1 => {
                let order = if random.below(4) == 0 { Order::Pmd } else { Order::Pte };
                let entry = Entry::real(order, Block::new(at).unwrap());
                let first = order.start(page);
                let taken = model.next(first.0, first.0 + order.pages() - 1, |_| true).is_some();
                assert_eq!(
                    index.insert(page, entry).is_err(),
                    taken,
                    "insert {order:?} at {at:#x}"
                );
                if !taken {
                    model.0.insert(first.0, (entry, (false, false)));
                }
            }
            2 => {
                let gone = model.get(at);
                assert_eq!(start(index.remove(page)), gone.map(|(start, entry, _)| (start, entry)));
                if let Some((start, ..)) = gone {
                    model.0.remove(&start);
                }
            }
            3 => {
                let on = random.below(3) > 0;
                let found = model.get(at);
                assert_eq!(index.set_mark(page, mark, on), found.is_some());
                if let Some((start, ..)) = found {
                    let marks = &mut model.0.get_mut(&start).unwrap().1;
                    *(if mark == Mark::Dirty { &mut marks.0 } else { &mut marks.1 }) = on;
                }
            }
            4 => {
                let last = at + random.below(2 * PMD_PAGES);
                let most = 1 + random.below(20);
                let (tagged, more) = index.tag_for_writeback(page, PageIndex(last), most);
                let mut expected = 0;
                let mut rest = None;
                for (start, (entry, marks)) in &mut model.0 {
                    if start + entry.order().pages() > at && *start <= last && marks.0 {
                        if expected == most {
                            rest = Some(*start);
                            break;
                        }
                        marks.1 = true;
                        expected += 1;
                    }
                }
                assert_eq!((tagged, more.map(|p| p.0)), (expected, rest));
            }
            _ => {
                let last = at + random.below(3 * PMD_PAGES);
                let (from, to) = (page, PageIndex(last));
                assert_eq!(start(index.next(from, to, None)), model.next(at, last, |_| true));
                assert_eq!(
                    start(index.next(from, to, Some(Mark::Dirty))),
                    model.next(at, last, |m| m.0)
                );
                assert_eq!(
                    start(index.next(from, to, Some(Mark::ToWrite))),
                    model.next(at, last, |m| m.1)
                );
                let found = model.get(at);
                assert_eq!(start(index.get(page)), found.map(|(start, entry, _)| (start, entry)));
                assert_eq!(
                    index.is_marked(page, mark),
                    found.is_some_and(|(_, _, (dirty, towrite))| {
                        if mark == Mark::Dirty { dirty } else { towrite }
                    })
                );
            }
        }
        assert_eq!(index.len(), model.0.len() as u64);
    }

    /// Shows: the index behaves like an ordered map with two flags, at low and high page numbers
    /// and at the end of the largest file.
    #[test]
    fn it_agrees_with_an_ordered_map() {
        for seed in 1..20 {
            let (mut index, mut model, mut random) =
                (Index::default(), Model::default(), Random(seed));
            for _ in 0..5_000 {
                step(&mut index, &mut model, &mut random);
            }
            for page in model.0.keys() {
                assert!(index.remove(PageIndex(*page)).is_some());
            }
            assert_eq!((index.len(), index.bytes()), (0, 0), "an empty index holds no memory");
        }
    }

    /// Shows: the finger does not outlive its node, whose number is given to another node.
    #[test]
    fn a_freed_node_is_not_found_again() {
        let mut index = Index::default();
        let entry = Entry::zero(Order::Pte);
        index.insert(PageIndex(0), entry).unwrap();
        index.insert(PageIndex(64), entry).unwrap();
        assert!(index.get(PageIndex(64)).is_some());
        assert!(index.remove(PageIndex(64)).is_some());
        index.insert(PageIndex(128), entry).unwrap();
        assert_eq!(index.get(PageIndex(64)), None);
        assert_eq!(index.next(PageIndex(64), PageIndex::LAST, None), Some((PageIndex(128), entry)));
        assert_eq!(index.len(), 2);
    }

    /// Shows: the cost of a search for a mark depends on the number of marked entries, not on the
    /// number of entries.
    #[test]
    fn a_search_skips_what_is_clean() {
        let mut index = Index::default();
        for page in 0..100_000 {
            index.insert(PageIndex(page), Entry::zero(Order::Pte)).unwrap();
        }
        index.set_mark(PageIndex(99_999), Mark::Dirty, true);
        let before = index.steps();
        let found = index.next(PageIndex(0), PageIndex::LAST, Some(Mark::Dirty));
        assert_eq!(found.map(|(start, _)| start), Some(PageIndex(99_999)));
        assert!(index.steps() - before <= 6, "{} nodes for one entry", index.steps() - before);
    }
}
