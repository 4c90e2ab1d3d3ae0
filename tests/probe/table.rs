// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows: the step to measure, the expected result, the result found, and the verdict, as text and
//! as JSON.

use std::fmt;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::harness::Harness;
use crate::qemu::{End, Res};

/// One row of docs/front-ends.md, or a part of one.
pub struct Row {
    /// The row's name in docs/front-ends.md.
    pub name: &'static str,
    /// The step to measure.
    pub done: &'static str,
    /// The front-end's reaction, as docs/front-ends.md has it.
    pub expected: Expected,
    /// The advantage for a user if the front-end's reaction has changed.
    pub gain: &'static str,
    pub probe: fn(&mut Harness) -> Res<Found>,
}

/// The reaction that docs/front-ends.md has.
pub enum Expected {
    /// QEMU is killed by this signal, and its last line contains this text.
    Dies(Signal, &'static str),
    /// QEMU exits with a code other than 0, and its last line contains this text.
    Ends(&'static str),
    /// The request is answered with a failure, and QEMU's last line contains this text.
    Refused(&'static str),
    Accepted,
    /// Another result, which begins with these words; numbers may follow.
    Seen(&'static str),
}

pub enum Found {
    Died { end: End, doing: String, text: String },
    Refused(String),
    Accepted,
    Seen(String),
}

impl Expected {
    fn is(&self, found: &Found) -> bool {
        match (self, found) {
            (Self::Dies(signal, text), Found::Died { end: End::Signal(by), text: said, .. }) => {
                signal == by && said.contains(text)
            }
            (Self::Ends(text), Found::Died { end: End::Code(code), text: said, .. }) => {
                *code != 0 && said.contains(text)
            }
            (Self::Refused(text), Found::Refused(said)) => said.contains(text),
            (Self::Accepted, Found::Accepted) => true,
            (Self::Seen(words), Found::Seen(seen)) => seen.starts_with(words),
            _ => false,
        }
    }
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dies(signal, "") => write!(f, "QEMU dies ({signal})"),
            Self::Dies(signal, text) => write!(f, "QEMU dies ({signal}): {text}"),
            Self::Ends(text) => write!(f, "QEMU ends: {text}"),
            Self::Refused(text) => write!(f, "refused: {text}"),
            Self::Accepted => f.write_str("done"),
            Self::Seen(words) => f.write_str(words),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Died { end, doing, text } => {
                match end {
                    End::Signal(signal) => write!(f, "QEMU dies {doing} ({signal})")?,
                    End::Code(code) => write!(f, "QEMU ends {doing} (exit code {code})")?,
                    End::Hung => write!(f, "QEMU hangs {doing}, and was killed")?,
                }
                if text.is_empty() { Ok(()) } else { write!(f, ": {text}") }
            }
            Self::Refused(text) => write!(f, "refused: {text}"),
            Self::Accepted => f.write_str("done"),
            Self::Seen(words) => f.write_str(words),
        }
    }
}

pub enum Verdict {
    Holds,
    Changed,
    NotTried,
}

pub struct Outcome<'a> {
    row: &'a Row,
    found: String,
    pub verdict: Verdict,
    took: Duration,
}

impl<'a> Outcome<'a> {
    pub fn new(row: &'a Row, found: &Found, took: Duration) -> Self {
        let verdict = if row.expected.is(found) { Verdict::Holds } else { Verdict::Changed };
        Self { row, found: found.to_string(), verdict, took }
    }

    pub fn not_tried(row: &'a Row, why: String, took: Duration) -> Self {
        Self { row, found: why, verdict: Verdict::NotTried, took }
    }

    fn verdict(&self) -> &'static str {
        match self.verdict {
            Verdict::Holds => "holds",
            Verdict::Changed => "CHANGED",
            Verdict::NotTried => "not tried",
        }
    }

    /// Prints the row as text; the verdict comes first.
    pub fn print(&self) {
        let Row { name, done, expected, gain, .. } = self.row;
        let seconds = self.took.as_secs_f64();
        println!("{name:<4} {:<9} {seconds:>4.1} s  {done}", self.verdict());
        let line = |what: &str, text: &str| println!("{:<22}{what:<10}{text}", "");
        match self.verdict {
            Verdict::Holds => line("found", &self.found),
            Verdict::Changed => {
                line("expected", &expected.to_string());
                line("found", &self.found);
                line("gain", gain);
            }
            Verdict::NotTried => line("why", &self.found),
        }
    }

    pub fn json(&self) -> Value {
        json!({
            "row": self.row.name,
            "done": self.row.done,
            "expected": self.row.expected.to_string(),
            "found": self.found,
            "verdict": self.verdict(),
            "gain": if matches!(self.verdict, Verdict::Changed) { self.row.gain } else { "" },
            "seconds": self.took.as_secs_f64(),
        })
    }
}
