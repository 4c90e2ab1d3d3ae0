// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Draws programs, runs them, and shortens a failing one.

use std::cell::Cell;
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

use testkit::model::World;
use testkit::model::op::{Choose, Step};

/// Number of steps of a program, and number of programs of a run: 104,000 steps in all.
const STEPS: u64 = 400;
const PROGRAMS: u64 = 260;
/// Largest number of runs to shorten a failing program.
const SHORTENINGS: u32 = 2000;

thread_local! {
    /// Whether the panic hook is silent: panics are caught, and reported once at the end.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// A SplitMix64 generator; every seed gives a good sequence.
pub struct Random(pub u64);

impl Choose for Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % n
    }
}

fn program(seed: u64, steps: u64) -> Vec<Step> {
    let mut random = Random(seed);
    (0..steps).map(|_| Step::draw(&mut random)).collect()
}

/// The error of a program and the number of steps before it; `None` if the program succeeds.
fn failure(program: &[Step]) -> Option<(usize, String)> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = take_hook();
        set_hook(Box::new(move |panic| {
            if !QUIET.get() {
                usual(panic);
            }
        }));
    });
    let done = Cell::new(0);
    QUIET.set(true);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new();
        for step in program {
            world.step(step)?;
            done.set(done.get() + 1);
        }
        world.check_end()
    }));
    QUIET.set(false);
    let why = match ended {
        Ok(Ok(())) => return None,
        Ok(Err(why)) => why,
        Err(panic) => match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => format!("panic: {text}"),
            (_, Some(text)) => format!("panic: {text}"),
            _ => "panic".into(),
        },
    };
    Some((done.get(), why))
}

/// Leaves out steps, larger pieces first, as long as the program fails with any error.
fn shorten(mut program: Vec<Step>) -> Vec<Step> {
    let mut tries = 0;
    let mut piece = program.len().div_ceil(2);
    loop {
        let mut at = 0;
        let before = program.len();
        while at < program.len() && tries < SHORTENINGS {
            let mut shorter = program.clone();
            shorter.drain(at..(at + piece).min(program.len()));
            tries += 1;
            match failure(&shorter) {
                Some((done, _)) => {
                    shorter.truncate(done + 1);
                    program = shorter;
                }
                None => at += piece,
            }
        }
        if tries >= SHORTENINGS || piece == 1 && program.len() == before {
            return program;
        }
        piece = (piece / 2).max(1);
    }
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().map(|text| text.parse().unwrap())
}

fn run(seed: u64, steps: u64) {
    let mut program = program(seed, steps);
    let Some((step, why)) = failure(&program) else { return };
    let last = program[step.saturating_sub(29).min(steps as usize)..].iter().take(30);
    let last: Vec<_> = last.map(|step| format!("  {step:x?}")).collect();
    program.truncate(step + 1);
    let short = shorten(program);
    let short_why = failure(&short).map(|(_, why)| why);
    let short: Vec<_> = short.iter().map(|step| format!("  {step:x?}")).collect();
    panic!(
        "VUD_SEED={seed} VUD_STEPS={steps} fails at step {step}: {why}\nthe last steps:\n{}\n\
         shortened:\n{}\n{short_why:?}",
        last.join("\n"),
        short.join("\n")
    );
}

/// Shows: after random programs of grants, removals, changes of length, punches, writebacks,
/// refusals and failures the window shows what was granted, and no store of the guest is lost.
#[test]
fn random_programs_do_what_the_model_does() {
    let steps = number("VUD_STEPS").unwrap_or(STEPS);
    if let Some(seed) = number("VUD_SEED") {
        return run(seed, steps);
    }
    let first = RandomState::new().hash_one(0u64) >> 16;
    println!("programs VUD_SEED={first} and the {} seeds after it", PROGRAMS - 1);
    for seed in first..first + PROGRAMS {
        run(seed, steps);
    }
}
