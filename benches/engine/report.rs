// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tables, charts and verdicts. A verdict that must hold decides how the process ends.

use std::fmt::Display;

/// Characters of the longest bar.
const BAR: f64 = 48.0;

/// Prints a headline.
pub fn headline(number: u32, text: &str) {
    println!("\n{number}. {text}\n");
}

/// Rows of text under a head, printed with aligned columns.
pub struct Table(Vec<Vec<String>>);

impl Table {
    /// A table with these columns.
    pub fn new(head: &[&str]) -> Self {
        Self(vec![head.iter().map(|cell| (*cell).to_owned()).collect()])
    }

    /// Adds a row.
    pub fn row(&mut self, cells: &[&dyn Display]) {
        self.0.push(cells.iter().map(ToString::to_string).collect());
    }

    /// Prints it: the first column to the left, numbers to the right.
    pub fn print(&self) {
        let columns = self.0.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.0.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        for row in &self.0 {
            let mut line = String::from("  ");
            for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
                line += &if column == 0 {
                    format!("{cell:<width$}")
                } else {
                    format!("  {cell:>width$}")
                };
            }
            println!("{}", line.trim_end());
        }
        println!();
    }
}

/// Prints one bar per value, the largest at full length.
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

/// Three digits that count.
pub fn short(value: f64) -> String {
    match value.abs() {
        v if v.is_nan() => "-".into(),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// What was asked for, and what came of it.
#[derive(Default)]
pub struct Verdicts {
    lines: Vec<String>,
    missed: u32,
}

impl Verdicts {
    /// Something that must hold.
    pub fn must(&mut self, holds: bool, what: String) {
        self.missed += u32::from(!holds);
        self.lines.push(format!("{} {what}", if holds { "MUST  held  " } else { "MUST  MISSED" }));
    }

    /// Something that is aimed at: it is told, and nothing more.
    pub fn aim(&mut self, reached: bool, what: String) {
        self.lines
            .push(format!("{} {what}", if reached { "aim   held  " } else { "aim   missed" }));
    }

    /// Prints them. Returns how many that must hold did not.
    pub fn print(&self) -> u32 {
        println!("\nVerdicts\n");
        self.lines.iter().for_each(|line| println!("  {line}"));
        println!();
        self.missed
    }
}
