// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Measures every row of docs/front-ends.md on a QEMU, and prints which rows still hold.
//! `ci/probe-frontend` and `ci/test` run this program.
//!
//! Arguments, read only if `VUD_PROBE` is set: `[--json] [--row NAME] [QEMU]`. The default for QEMU
//! is the one of `images/build`. Exit codes: 0 all rows hold, 3 some rows have changed, 1 the probe
//! failed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod backend;
mod harness;
#[allow(dead_code)] // The guest tests use the rest.
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

/// Time limit that tells a hang from a slow machine: a QEMU that runs longer is killed.
pub const HANG: Duration = Duration::from_secs(180);

const USAGE: &str = "usage: ci/probe-frontend [--json] [--row NAME] [QEMU]";

const EXIT_CHANGED: u8 = 3;

struct Settings {
    json: bool,
    /// The name of the only row to measure; `None`: all rows.
    row: Option<OsString>,
    program: PathBuf,
}

fn settings() -> Result<Settings, String> {
    let mut settings = Settings { json: false, row: None, program: PathBuf::new() };
    let default = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/guest/qemu-system-x86_64");
    let mut program: Option<OsString> = None;
    // Without `VUD_PROBE` the arguments come from `cargo test` and are for the standard test
    // harness.
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

/// The first line of `QEMU --version`; an error if QEMU lacks vhost-user-test-device-pci.
fn version(program: &Path) -> Result<String, String> {
    let run = |arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output();
        output.map_err(|e| format!("can't run {}: {e}", program.display()))
    };
    let output = run(&["--version"])?.stdout;
    let output = String::from_utf8_lossy(&output);
    let first = output.lines().next().unwrap_or_default().to_owned();
    if !run(&["-device", "vhost-user-test-device-pci,help"])?.status.success() {
        return Err(format!("{first}: no vhost-user-test-device-pci (QEMU 11.1 has it)"));
    }
    Ok(first)
}

/// Checks what every row needs: QEMU comes up, the device starts, a map succeeds, and a load reads
/// it.
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
    // QEMU must answer a last command: a row whose QEMU crashed or hangs is neither "done" nor
    // "refused".
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
    control(&settings.program)
        .map_err(|why| format!("{version}: no row can be measured: {why}"))?;
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
        // The same format as `cargo test`: ci/test counts these lines.
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
