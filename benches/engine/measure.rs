// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Time measurement: the sides of a comparison alternate, and medians are compared. On a shared
//! machine only ratios within one run are meaningful.

use std::time::Instant;

/// How much to measure.
#[derive(Clone, Copy)]
pub struct Effort {
    /// The short run of CI: it checks the verdicts that must hold, in less than a minute.
    pub quick: bool,
}

impl Effort {
    /// From the environment variable VUD_BENCH_QUICK.
    pub fn from_env() -> Self {
        Self { quick: std::env::var_os("VUD_BENCH_QUICK").is_some_and(|value| value == "1") }
    }

    /// `full`, or `quick` in quick mode.
    pub fn pick<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}

/// The duration of `work` in nanoseconds.
pub fn nanos(work: impl FnOnce()) -> f64 {
    let began = Instant::now();
    work();
    began.elapsed().as_nanos() as f64
}

/// The median; NaN if there are no samples.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The samples of each side of a comparison; the samples of one round were measured one right after
/// another.
pub struct Samples(Vec<Vec<f64>>);

impl Samples {
    /// Runs every side once per round; `sample(side)` returns the measured value.
    pub fn interleaved(rounds: usize, sides: usize, mut sample: impl FnMut(usize) -> f64) -> Self {
        let mut samples = vec![Vec::with_capacity(rounds); sides];
        for _ in 0..rounds {
            for (side, of_side) in samples.iter_mut().enumerate() {
                of_side.push(sample(side));
            }
        }
        Self(samples)
    }

    /// Samples of two sides that the caller has measured, round by round.
    pub fn of(rounds: impl Iterator<Item = [f64; 2]>) -> Self {
        let (first, second) = rounds.map(|[first, second]| (first, second)).unzip();
        Self(vec![first, second])
    }

    /// The median of one side's samples.
    pub fn median(&self, side: usize) -> f64 {
        self.0.get(side).map_or(f64::NAN, |samples| median(samples))
    }

    /// The median of the ratios `over` / `under` of all rounds.
    pub fn ratio(&self, over: usize, under: usize) -> f64 {
        match (self.0.get(over), self.0.get(under)) {
            (Some(over), Some(under)) => {
                median(&over.iter().zip(under).map(|(a, b)| a / b).collect::<Vec<_>>())
            }
            _ => f64::NAN,
        }
    }
}
