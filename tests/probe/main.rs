// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tries every row of docs/front-ends.md on a QEMU, and says which still hold. `ci/probe-frontend`
//! runs it; so does `ci/test`.
//!
//! Arguments, if `VUD_PROBE` is set: `[--json] [--row NAME] [QEMU]`; the QEMU is that of
//! `images/build` unless one is named.
//! Exit codes: 0 all rows hold, 3 some changed, 1 the probe failed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod backend;
mod harness;
#[allow(dead_code)] // The guest tests need more of it.
#[path = "../guest/output.rs"]
mod output;
mod pci;
mod qemu;
mod rows;
mod table;
mod wire;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};
use serde_json::json;

use harness::Harness;
use qemu::ProbeError;
use table::{Outcome, Row, Verdict};

/// Only tells a hang from a slow machine: no QEMU lives longer.
pub const HANG: Duration = Duration::from_secs(180);

const USAGE: &str = "usage: ci/probe-frontend [--json] [--row NAME] [QEMU]";

const EXIT_CHANGED: u8 = 3;

struct Settings {
    json: bool,
    /// Only the row of this name.
    row: Option<OsString>,
    program: PathBuf,
}

fn settings() -> Result<Settings, String> {
    let mut settings = Settings { json: false, row: None, program: PathBuf::new() };
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/qemu-system-x86_64");
    let mut program: Option<OsString> = None;
    // What `cargo test` passes is meant for its own harness.
    let is_ours = std::env::var_os("VUD_PROBE").is_some();
    let mut arguments = std::env::args_os().skip(1).filter(|_| is_ours);
    while let Some(argument) = arguments.next() {
        if argument == "--json" {
            settings.json = true;
        } else if argument == "--row" {
            settings.row = Some(arguments.next().ok_or(USAGE)?);
        } else if argument.to_string_lossy().starts_with('-') || program.is_some() {
            return Err(USAGE.into());
        } else {
            program = Some(argument);
        }
    }
    settings.program = program.map_or(default, PathBuf::from);
    Ok(settings)
}

/// `QEMU emulator version ...`, if it has the device at all.
fn version(program: &Path) -> Result<String, String> {
    let run = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map_err(|e| format!("can't run {}: {e}", program.display()))
    };
    let said = run(&["--version"])?.stdout;
    let said = String::from_utf8_lossy(&said);
    let first = said.lines().next().unwrap_or_default().to_owned();
    if !run(&["-device", "vhost-user-test-device-pci,help"])?.status.success() {
        return Err(format!("{first}: no vhost-user-test-device-pci (QEMU 11.1 has it)"));
    }
    Ok(first)
}

/// What every row stands on: QEMU comes up, the device starts, a map is done and can be read.
fn control(program: &Path) -> Result<(), String> {
    let mut harness = Harness::new(program).map_err(|e| format!("{e:?}"))?;
    let tried = rows::control(&mut harness);
    tried.map_err(|e| match (e, harness.death()) {
        (ProbeError::Io(_), Some(death)) => death.to_string(),
        (ProbeError::Io(e), None) => e.to_string(),
        (ProbeError::Other(why), _) => why,
    })
}

fn try_row<'a>(row: &'a Row, program: &Path) -> Outcome<'a> {
    let began = Instant::now();
    let mut harness = match Harness::new(program) {
        Ok(harness) => harness,
        Err(e) => return Outcome::not_tried(row, format!("{e:?}"), began.elapsed()),
    };
    // Alive after all that was done, or it is none of "done" and "refused".
    let found = (row.probe)(&mut harness).and_then(|found| harness.ping().map(|()| found));
    match found {
        Ok(found) => Outcome::new(row, &found, began.elapsed()),
        Err(ProbeError::Io(error)) => match harness.death() {
            Some(death) => Outcome::new(row, &death, began.elapsed()),
            None => Outcome::not_tried(row, error.to_string(), began.elapsed()),
        },
        Err(ProbeError::Other(why)) => Outcome::not_tried(row, why, began.elapsed()),
    }
}

fn run(settings: &Settings) -> Result<ExitCode, String> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|e| format!("no limit on core dumps: {e}"))?;
    let began = Instant::now();
    let wanted = |row: &&Row| settings.row.as_ref().is_none_or(|name| *name == row.name);
    let rows: Vec<&Row> = rows::all().filter(wanted).collect();
    if rows.is_empty() {
        return Err("no such row: see docs/front-ends.md".into());
    }
    let version = version(&settings.program)?;
    control(&settings.program).map_err(|why| format!("{version}: no row can be tried: {why}"))?;
    if !settings.json {
        println!("{version}\n");
    }
    let mut outcomes = Vec::new();
    for row in rows {
        let outcome = try_row(row, &settings.program);
        if !settings.json {
            outcome.print();
        }
        outcomes.push(outcome);
    }
    let count = |wanted: fn(&Verdict) -> bool| {
        outcomes.iter().filter(|outcome| wanted(&outcome.verdict)).count()
    };
    let holds = count(|verdict| matches!(verdict, Verdict::Holds));
    let changed = count(|verdict| matches!(verdict, Verdict::Changed));
    let failed = count(|verdict| matches!(verdict, Verdict::NotTried));
    if settings.json {
        let rows: Vec<_> = outcomes.iter().map(Outcome::json).collect();
        println!("{:#}", json!({ "front-end": version, "rows": rows }));
    } else {
        println!("\n{holds} hold, {changed} changed, {failed} not tried");
        // As cargo says it, for ci/test.
        println!(
            "test result: {}. {holds} passed; {} failed; 0 ignored; 0 measured; 0 filtered out; \
             finished in {:.2}s",
            if holds == outcomes.len() { "ok" } else { "FAILED" },
            changed + failed,
            began.elapsed().as_secs_f64()
        );
    }
    Ok(match (changed, failed) {
        (_, 1..) => ExitCode::FAILURE,
        (1.., 0) => ExitCode::from(EXIT_CHANGED),
        (0, 0) => ExitCode::SUCCESS,
    })
}

fn main() -> ExitCode {
    let result = settings().and_then(|settings| {
        if std::env::var_os("VUD_GUEST").is_some_and(|value| value == "skip") {
            println!("SKIPPED front-end table: VUD_GUEST=skip");
            return Ok(ExitCode::SUCCESS);
        }
        run(&settings)
    });
    result.unwrap_or_else(|why| {
        eprintln!("probe-frontend: {why}");
        ExitCode::FAILURE
    })
}
