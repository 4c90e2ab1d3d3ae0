// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures measured in rounds. A round measures every peer once, one right after another; a ratio
//! compares figures of the same round. They are printed as a table and written as a chart (SVG) and
//! as JSON.

#![allow(dead_code)] // Each bench uses its own part.

mod chart;
mod text;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use text::{Table, short};

/// How the figures were measured: command, number of rounds, machine.
pub struct How(Value);

impl How {
    /// For `command`, on this machine.
    pub fn new(command: &str, rounds: usize) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let cpu = read("/proc/cpuinfo");
        let cpu = cpu.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self(json!({"command": command, "rounds": rounds, "cores": cores,
            "cpu": cpu.trim_start_matches([' ', '\t', ':']),
            "kernel": read("/proc/sys/kernel/osrelease").trim()}))
    }
}

/// Whether a larger or a smaller figure is better.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    More,
    Less,
}

/// Minimum, median, maximum.
#[derive(Clone, Copy)]
pub struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
}

impl Spread {
    /// The spread of some samples; NaN if there are none.
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
        Self { min: at(0), median: at(sorted.len() / 2), max: at(sorted.len().wrapping_sub(1)) }
    }

    fn json(self) -> Value {
        json!({"min": self.min, "median": self.median, "max": self.max})
    }
}

/// One measured quantity, for all peers.
struct Row {
    what: String,
    unit: &'static str,
    better: Better,
    /// By peer, then by round; empty for a peer without this figure.
    samples: Vec<Vec<f64>>,
}

/// A table of figures: one column per peer, one row per quantity.
pub struct Figures {
    name: &'static str,
    title: &'static str,
    peers: Vec<String>,
    rows: Vec<Row>,
}

impl Figures {
    /// A table without rows; `name` is the name of its files.
    pub fn new(name: &'static str, title: &'static str, peers: Vec<String>) -> Self {
        Self { name, title, peers, rows: Vec::new() }
    }

    /// Adds one round's figure of a peer.
    pub fn add(&mut self, what: &str, unit: &'static str, better: Better, peer: usize, value: f64) {
        let row = match self.rows.iter().position(|row| row.what == what) {
            Some(row) => row,
            None => {
                let samples = vec![Vec::new(); self.peers.len()];
                self.rows.push(Row { what: what.into(), unit, better, samples });
                self.rows.len() - 1
            }
        };
        self.rows[row].samples[peer].push(value);
    }

    fn row(&self, what: &str) -> &Row {
        self.rows.iter().find(|row| row.what == what).unwrap_or_else(|| panic!("no row {what}"))
    }

    /// The spread of a peer's figures.
    pub fn value(&self, what: &str, peer: usize) -> Spread {
        Spread::of(&self.row(what).samples[peer])
    }

    /// The ratio of `peer` to the best of `others` in each round; above 1 means that `peer` is
    /// better.
    pub fn ratio(&self, what: &str, peer: usize, others: &[usize]) -> Spread {
        self.row(what).ratio(peer, others)
    }

    /// Prints the medians, and the ratios of `peer` to the best of `others`; writes all files.
    pub fn show(&self, peer: usize, others: &[usize], how: &How) {
        println!("\n{}\n", self.title);
        Table(self.cells(peer, others)).print();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench");
        fs::create_dir_all(&folder).unwrap();
        let file = |end: &str| -> PathBuf { folder.join(format!("{}.{end}", self.name)) };
        let text = serde_json::to_string_pretty(&self.json(peer, others, how)).unwrap();
        fs::write(file("json"), text + "\n").unwrap();
        fs::write(file("md"), self.markdown(peer, others)).unwrap();
        if others.is_empty() {
            return println!("  in target/bench: {0}.json, {0}.md", self.name);
        }
        let bars: Vec<_> =
            self.rows.iter().map(|row| (row.what.clone(), row.ratio(peer, others))).collect();
        let title = format!("{} over {}", self.peers[peer], self.names(others));
        chart::draw(&file("svg"), &title, &bars);
        println!("  in target/bench: {0}.json, {0}.svg, {0}.md", self.name);
    }

    fn names(&self, others: &[usize]) -> String {
        let names: Vec<_> = others.iter().map(|&other| self.peers[other].as_str()).collect();
        if names.len() == 1 { names[0].into() } else { format!("the best of {}", names.join(", ")) }
    }

    fn cells(&self, peer: usize, others: &[usize]) -> Vec<Vec<String>> {
        let mut head = vec![String::new(), "unit".into()];
        head.extend(self.peers.iter().cloned());
        let with_ratio = !others.is_empty();
        head.extend(with_ratio.then(|| "ratio (min to max)".into()));
        let mut cells = vec![head];
        for row in &self.rows {
            let mut line = vec![row.what.clone(), row.unit.into()];
            line.extend(row.samples.iter().map(|samples| short(Spread::of(samples).median)));
            let Spread { min, median, max } = row.ratio(peer, others);
            let ratio = format!("{} ({} to {})", short(median), short(min), short(max));
            line.extend(with_ratio.then(|| if median.is_nan() { "".into() } else { ratio }));
            cells.push(line);
        }
        cells
    }

    fn markdown(&self, peer: usize, others: &[usize]) -> String {
        let cells = self.cells(peer, others);
        let mut lines: Vec<_> =
            cells.iter().map(|line| format!("| {} |", line.join(" | "))).collect();
        lines.insert(1, format!("|---|---{}|", "|---:".repeat(cells[0].len() - 2)));
        lines.join("\n") + "\n"
    }

    fn json(&self, peer: usize, others: &[usize], how: &How) -> Value {
        let rows = self.rows.iter().map(|row| {
            let peers = self.peers.iter().zip(&row.samples).filter(|(_, s)| !s.is_empty());
            let figures: Vec<_> = peers
                .map(|(name, s)| json!({"peer": name, "figure": Spread::of(s).json(), "rounds": s}))
                .collect();
            json!({"what": row.what, "unit": row.unit, "figures": figures,
                "more_is_better": row.better == Better::More,
                "ratio": row.ratio(peer, others).json()})
        });
        json!({"title": self.title, "how": how.0, "ratio_of": self.peers[peer],
            "ratio_to": self.names(others), "rows": rows.collect::<Vec<_>>()})
    }
}

impl Row {
    fn ratio(&self, peer: usize, others: &[usize]) -> Spread {
        let ours = &self.samples[peer];
        let ratios: Vec<f64> = (0..ours.len())
            .filter_map(|round| {
                let others = others.iter().filter_map(|&other| self.samples[other].get(round));
                let best = match self.better {
                    Better::More => others.copied().reduce(f64::max)?,
                    Better::Less => others.copied().reduce(f64::min)?,
                };
                Some(match self.better {
                    Better::More => ours[round] / best,
                    Better::Less => best / ours[round],
                })
            })
            .collect();
        Spread::of(&ratios)
    }
}

/// Whether the run is a quick trial, without verdicts: `ci/bench --quick`.
pub fn is_quick() -> bool {
    std::env::var_os("VUD_BENCH_QUICK").is_some_and(|value| value == "1")
}

/// Prints whether a figure reaches its target; nothing in a quick trial or without a figure.
pub fn verdict(text: &str, is: f64, at_least: f64) {
    say(text, is, is >= at_least, format!("at least {at_least}"));
}

/// As `verdict`, for a figure where less is better.
pub fn verdict_most(text: &str, is: f64, at_most: f64) {
    say(text, is, is <= at_most, format!("at most {at_most}"));
}

fn say(text: &str, is: f64, held: bool, asked: String) {
    if !is_quick() && !is.is_nan() {
        println!("  {} {text}: {} ({asked})", if held { "held  " } else { "MISSED" }, short(is));
    }
}

/// Whether to run a part of a benchmark: the command line names it, or names no part.
pub fn is_wanted(part: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|name| !name.starts_with('-')).peekable();
    names.peek().is_none() || names.any(|name| name == part)
}

/// The indices of the peers, rotated by the round, so that no peer is always measured first.
pub fn in_turn(peers: usize, round: usize) -> impl Iterator<Item = usize> {
    (0..peers).map(move |i| (i + round) % peers)
}
