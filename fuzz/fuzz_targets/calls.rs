// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Decodes the fuzzer's bytes as a sequence of calls of the engine with arbitrary numbers. The
//! engine must not panic, and must behave like the model of `testkit/src/model`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::model::World;
use testkit::model::op::{Choose, Step};

/// Largest number of steps of one input. The bytes behind are ignored.
const MOST_STEPS: usize = 100;

/// The fuzzer's bytes as choices. After the last byte each choice is 0, the first.
struct Bytes<'a>(&'a [u8]);

impl Choose for Bytes<'_> {
    fn below(&mut self, n: u64) -> u64 {
        let wanted = match n {
            0..=0x100 => 1,
            0x101..=0x1_0000 => 2,
            _ => 8,
        };
        let (taken, rest) = self.0.split_at(self.0.len().min(wanted));
        self.0 = rest;
        taken.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)) % n
    }
}

fuzz_target!(|data: &[u8]| {
    let mut bytes = Bytes(data);
    let mut world = World::new();
    for _ in 0..MOST_STEPS {
        if bytes.0.is_empty() {
            break;
        }
        let step = Step::draw(&mut bytes);
        if let Err(why) = world.step(&step) {
            panic!("{step:x?}: {why}");
        }
    }
    if let Err(why) = world.check_end() {
        panic!("at the end: {why}");
    }
});
