// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! mapio COMMAND ARGS - accesses files by mmap and O_DIRECT for the guest's cases, which a shell
//! can't do. Prints data as `key=value`. The exit code is 0, or 1 after a line with the reason.
//!
//! | command | does |
//! |---|---|
//! | `sums FILE...` | each file's XXH3-128, by read and by mmap |
//! | `append BYTES SEED FILE...` | appends the pattern, by O_APPEND |
//! | `resize DELTA FILE...` | changes the length by DELTA bytes, never below 0 |
//! | `store OFFSET BYTES SEED msync\|none FILE...` | stores the pattern in a shared mapping, up to the file's end |
//! | `private FILE` | stores in a private mapping; checks that the file does not change |
//! | `direct-in SOURCE FILE BYTES` | read(2) of SOURCE, O_DIRECT, into a mapping of FILE |
//! | `direct-out FILE TARGET BYTES` | write(2) to TARGET, O_DIRECT, from a mapping of FILE; TARGET is created if it does not exist |
//! | `step FILE PLAYER ROUNDS` | players 0 and 1, in two guests, store and check pages in turn |
//! | `fill FILE BYTES` | makes a sparse file and stores to each page, until its end or a SIGBUS |
//! | `write-out FILE BYTES` | writes BYTES bytes, or until the disk is full |
//! | `touch BYTES ROUNDS read\|write FILE` | accesses a word in each 2 MiB, ROUNDS times |
//! | `crash PLACE [STREAM]` | runs and syncs the steps of a plan in a directory or on a bare device, until the machine is killed |
//! | `zeros FILE` | loads a word of each page of a sparse file |

mod commands;
mod crash;
mod map;
mod plan;
mod step;

use std::path::Path;
use std::process::ExitCode;

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            println!("FAIL: mapio {}: {why}", args.join(" "));
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["sums", files @ ..] => each(files, commands::sums),
        ["append", bytes, seed, files @ ..] => {
            let bytes = number(bytes)?;
            each(files, |file| commands::append(file, bytes, seed))
        }
        ["resize", delta, files @ ..] => {
            let delta = delta.parse().map_err(|error| format!("{delta}: {error}"))?;
            each(files, |file| commands::resize(file, delta))
        }
        ["store", offset, bytes, seed, sync, files @ ..] => {
            let (offset, bytes) = (number(offset)?, number(bytes)?);
            each(files, |file| commands::store(file, offset, bytes, seed, *sync == "msync"))
        }
        ["private", file] => commands::private(Path::new(file)),
        ["direct-in", source, file, bytes] => {
            commands::direct_in(Path::new(source), Path::new(file), number(bytes)?)
        }
        ["direct-out", file, target, bytes] => {
            commands::direct_out(Path::new(file), Path::new(target), number(bytes)?)
        }
        ["step", file, player, rounds] => {
            step::play(Path::new(file), number(player)? as u64, number(rounds)? as u64)
        }
        ["fill", file, bytes] => commands::fill(Path::new(file), number(bytes)?),
        ["write-out", file, bytes] => commands::write_out(Path::new(file), number(bytes)?),
        ["touch", bytes, rounds, how, file] => {
            commands::touch(Path::new(file), number(bytes)?, number(rounds)?, *how == "write")
        }
        ["crash", place] => crash::run(Path::new(place), None),
        ["crash", place, stream] => crash::run(Path::new(place), Some(number(stream)? as u64)),
        ["zeros", file] => commands::zeros(Path::new(file)),
        _ => Err("no such command".into()),
    }
}

fn each(files: &[&str], work: impl Fn(&Path) -> Result<()>) -> Result<()> {
    files.iter().try_for_each(|file| work(Path::new(file)).map_err(|why| format!("{file}: {why}")))
}

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|error| format!("'{text}': {error}"))
}
