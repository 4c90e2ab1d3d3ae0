// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that after any sequence of grants, removals, stores, READs, WRITEs, truncations and writes
//! of the host, the window, FUSE and the host agree with a model. The operations are random and can
//! be repeated by their seed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};

const BOTH: u64 = MAP_READ | MAP_WRITE;
const FILES: usize = 3;
const SLOTS: u64 = 10;
const MOST_BYTES: u64 = 3 * RANGE;
const STEPS: usize = 1000;

/// A splitmix64 generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit.max(1)
    }

    /// A random length, often near an edge of a page or a range.
    fn awkward(&mut self, limit: u64) -> u64 {
        let edges = [1, 4096, RANGE, 2 * RANGE];
        let near = edges[self.below(4) as usize] + self.below(5);
        let any = self.below(limit);
        [any, near.saturating_sub(2).min(limit)][self.below(2) as usize]
    }
}

/// The grant of one slot of the window.
#[derive(Debug, Clone, Copy)]
struct Grant {
    file: usize,
    range: u64,
    flags: u64,
}

struct Model {
    guest: FsGuest,
    random: Random,
    nodes: Vec<(u64, u64)>,
    files: Vec<Vec<u8>>,
    real: Vec<File>,
    slots: Vec<Option<Grant>>,
    steps: Vec<String>,
    host: FsHost,
}

impl Model {
    fn new(seed: u64, mem_slots: bool) -> Self {
        let host = FsHost::with(FsOptions { mem_slots, ..FsOptions::default() });
        let files: Vec<Vec<u8>> =
            (0..FILES).map(|i| vec![i as u8 + 1; i * (RANGE as usize + 777)]).collect();
        let mut nodes = Vec::new();
        let mut real = Vec::new();
        for (i, bytes) in files.iter().enumerate() {
            host.put(&format!("file{i}"), bytes);
            let path = host.path(&format!("file{i}"));
            real.push(OpenOptions::new().read(true).write(true).open(path).unwrap());
        }
        let mut guest = host.boot();
        (0..FILES).for_each(|i| nodes.push(guest.opened(&format!("file{i}"))));
        let slots = vec![None; SLOTS as usize];
        let random = Random(seed);
        Self { guest, random, nodes, files, real, slots, steps: Vec::new(), host }
    }

    fn len(&self, file: usize) -> u64 {
        self.files[file].len() as u64
    }

    /// Number of bytes of a grant that lie in the file: the guest's kernel accesses no more.
    fn shown(&self, grant: Grant) -> u64 {
        self.len(grant.file).saturating_sub(grant.range * RANGE).min(RANGE)
    }

    fn step(&mut self) {
        let file = self.random.below(FILES as u64) as usize;
        let slot = self.random.below(SLOTS) as usize;
        match self.random.below(16) {
            0..4 => self.setup(file, slot),
            4 => self.remove(slot),
            5..9 => self.store(slot),
            9..11 => self.write(file),
            11 => self.host_writes(file),
            12 => self.truncate(file),
            13 => self.read(file),
            14 => self.upgrade(slot),
            _ => {
                let (node, fh) = self.nodes[file];
                self.guest.fsync(node, fh).unwrap();
            }
        }
        let slot = self.random.below(SLOTS) as usize;
        self.look(slot);
    }

    fn setup(&mut self, file: usize, slot: usize) {
        let ranges = self.len(file).div_ceil(RANGE);
        if ranges == 0 {
            return;
        }
        let range = self.random.below(ranges);
        let flags = [MAP_READ, BOTH][self.random.below(2) as usize];
        let node = self.nodes[file].0;
        self.steps.push(format!("setup file{file} range {range} flags {flags} at {slot}"));
        // Linux removes a grant before it reuses the slot, unless the removal failed.
        if self.random.below(4) != 0 {
            self.remove(slot);
        }
        self.guest.setup(node, range * RANGE, RANGE, flags, slot as u64 * RANGE).unwrap();
        self.slots[slot] = Some(Grant { file, range, flags });
    }

    fn upgrade(&mut self, slot: usize) {
        let Some(grant) = self.slots[slot] else { return };
        if self.shown(grant) > 0 {
            self.steps.push(format!("upgrade {slot}"));
            let node = self.nodes[grant.file].0;
            self.guest.setup(node, grant.range * RANGE, RANGE, BOTH, slot as u64 * RANGE).unwrap();
            self.slots[slot] = Some(Grant { flags: BOTH, ..grant });
        }
    }

    fn remove(&mut self, slot: usize) {
        if self.slots[slot].take().is_some() {
            self.steps.push(format!("remove {slot}"));
            self.guest.remove(&[(slot as u64 * RANGE, RANGE)]).unwrap();
            assert!(!self.guest.vmm.is_mapped(slot as u64 * RANGE), "still there");
        }
    }

    fn store(&mut self, slot: usize) {
        let Some(grant) = self.slots[slot] else { return };
        let shown = self.shown(grant);
        if grant.flags & MAP_WRITE == 0 || shown == 0 {
            return;
        }
        let at = self.random.below(shown);
        let bytes = (1 + self.random.awkward(20_000)).min(shown - at);
        let data = vec![self.random.below(256) as u8; bytes as usize];
        self.steps.push(format!("store {bytes} at {at} of {slot}"));
        assert!(self.guest.vmm.store(slot as u64 * RANGE + at, &data), "a grant was removed");
        let from = (grant.range * RANGE + at) as usize;
        self.files[grant.file][from..from + data.len()].copy_from_slice(&data);
    }

    fn put(&mut self, file: usize, at: u64, data: &[u8]) {
        let end = at as usize + data.len();
        let bytes = &mut self.files[file];
        bytes.resize(bytes.len().max(end), 0);
        bytes[at as usize..end].copy_from_slice(data);
    }

    fn write(&mut self, file: usize) {
        let at = self.random.awkward(MOST_BYTES - 40_000);
        let data = vec![self.random.below(256) as u8; 1 + self.random.awkward(30_000) as usize];
        self.steps.push(format!("WRITE {} at {at} of file{file}", data.len()));
        let (node, fh) = self.nodes[file];
        assert_eq!(self.guest.write(node, fh, at, &data), Ok(data.len() as u32));
        self.put(file, at, &data);
    }

    /// A write of the host, which does not change the file's length.
    fn host_writes(&mut self, file: usize) {
        let len = self.len(file);
        let at = self.random.below(len);
        let bytes = (1 + self.random.below(30_000)).min(len - at);
        let data = vec![self.random.below(256) as u8; bytes as usize];
        self.steps.push(format!("host writes {bytes} at {at} of file{file}"));
        self.real[file].write_all_at(&data, at).unwrap();
        self.put(file, at, &data);
    }

    fn truncate(&mut self, file: usize) {
        let size = self.random.awkward(MOST_BYTES);
        self.steps.push(format!("truncate file{file} to {size}"));
        let node = self.nodes[file].0;
        assert_eq!(self.guest.set_size(node, size).unwrap().size, size);
        self.files[file].resize(size as usize, 0);
    }

    fn read(&mut self, file: usize) {
        let (node, fh) = self.nodes[file];
        let at = self.random.awkward(MOST_BYTES);
        let size = 1 + self.random.below(60_000);
        let seen = self.guest.read(node, fh, at, size as u32).unwrap();
        let bytes = &self.files[file];
        let at = bytes.len().min(at as usize);
        let end = bytes.len().min(at + size as usize);
        assert!(seen == bytes[at..end], "READ {size} at {at} of file{file}");
    }

    /// Compares one slot with the model.
    fn look(&mut self, slot: usize) {
        let Some(grant) = self.slots[slot] else {
            return assert!(!self.guest.vmm.is_mapped(slot as u64 * RANGE));
        };
        let shown = self.shown(grant) as usize;
        let seen = self.guest.vmm.fetch(slot as u64 * RANGE, shown).expect("a grant was removed");
        let from = ((grant.range * RANGE) as usize).min(self.files[grant.file].len());
        assert!(seen == self.files[grant.file][from..from + shown], "slot {slot}: {grant:?}");
    }

    fn end(mut self) {
        for file in 0..FILES {
            assert!(self.host.get(&format!("file{file}")) == self.files[file], "file{file}");
        }
        (0..SLOTS as usize).for_each(|slot| self.look(slot));
        assert_eq!(self.guest.vmm.refused(), [""; 0]);
        self.guest.destroy();
        assert_eq!(self.guest.vmm.mapped_bytes(), 0);
        self.guest.power_off();
        assert!(self.host.ended().success());
    }
}

struct Trace<'a>(&'a mut Model, u64);

impl Drop for Trace<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = &self.0.steps[self.0.steps.len().saturating_sub(25)..];
            eprintln!("seed {}, the last steps:\n{}", self.1, last.join("\n"));
        }
    }
}

fn run(seed: u64, mem_slots: bool) {
    let mut model = Model::new(seed, mem_slots);
    {
        let trace = Trace(&mut model, seed);
        (0..STEPS).for_each(|_| trace.0.step());
    }
    model.end();
}

/// Shows it for some seeds, with memory slots.
#[test]
fn random_operations() {
    (1..4).for_each(|seed| run(seed, true));
}

/// Shows it without memory slots.
#[test]
fn random_operations_without_memory_slots() {
    (4..6).for_each(|seed| run(seed, false));
}
