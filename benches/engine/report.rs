// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables, charts and verdicts. A verdict that must hold determines the exit code.

#[path = "../figures/text.rs"]
mod text;

pub use text::{Table, short};

/// Length of the longest bar, in characters.
const BAR: f64 = 48.0;

/// Prints a headline.
pub fn headline(number: u32, text: &str) {
    println!("\n{number}. {text}\n");
}

/// Prints one bar per value; the largest value has the full length.
pub fn chart(title: &str, bars: &[(String, f64)]) {
    let most = bars.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
    let width = bars.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    println!("  {title}");
    for (label, value) in bars {
        let length = (value / most * BAR).round().max(1.0) as usize;
        println!("  {label:<width$} {} {}", "#".repeat(length), short(*value));
    }
    println!();
}

/// The verdicts, and the number of those that must hold and do not.
#[derive(Default)]
pub struct Verdicts {
    lines: Vec<String>,
    missed: u32,
}

impl Verdicts {
    /// Adds a verdict that must hold.
    pub fn must(&mut self, holds: bool, what: String) {
        self.missed += u32::from(!holds);
        self.lines.push(format!("{} {what}", if holds { "MUST  held  " } else { "MUST  MISSED" }));
    }

    /// Adds a verdict that is only printed.
    pub fn aim(&mut self, reached: bool, what: String) {
        self.lines
            .push(format!("{} {what}", if reached { "aim   held  " } else { "aim   missed" }));
    }

    /// Prints the verdicts. Returns the number of those that must hold and do not.
    pub fn print(&self) -> u32 {
        println!("\nVerdicts\n");
        self.lines.iter().for_each(|line| println!("  {line}"));
        println!();
        self.missed
    }
}
