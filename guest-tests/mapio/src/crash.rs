// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the plan until the machine is killed. Prints `acked=STREAM,STEP` when a step is durable.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;

use crate::Result;
use crate::map::Mapping;
use crate::plan::{MAPPED_BYTES, RAW_BYTES, STREAMS, Step, WRITES, byte, step};

/// `place` is a directory or a bare device; `only` is the stream to run, or `None` for all.
pub fn run(place: &Path, only: Option<u64>) -> Result<()> {
    let raw = !place.is_dir();
    thread::scope(|scope| {
        let wanted = (0..STREAMS).filter(|stream| only.is_none_or(|only| only == *stream));
        let streams: Vec<_> =
            wanted.map(|stream| scope.spawn(move || run_stream(place, stream, raw))).collect();
        streams.into_iter().try_for_each(|stream| stream.join().map_err(|_| "a panic")?)
    })
}

fn run_stream(place: &Path, stream: u64, raw: bool) -> Result<()> {
    let mut mapped = HashMap::new();
    for n in 0.. {
        let step = step(stream, n, raw);
        let bytes: Vec<u8> =
            (step.at..step.at + step.bytes).map(|at| byte(stream, n, at)).collect();
        let done = if stream == WRITES {
            write(place, &step, &bytes, raw)
        } else {
            store(place, &step, &bytes, raw, &mut mapped)
        };
        done.map_err(|why| format!("step {n} of stream {stream}, {step:?}: {why}"))?;
        println!("acked={stream},{n}");
    }
    Ok(())
}

fn text(error: std::io::Error) -> String {
    error.to_string()
}

fn write(place: &Path, step: &Step, bytes: &[u8], raw: bool) -> Result<()> {
    let path = if raw { place.to_owned() } else { place.join(&step.file) };
    let new = !path.exists();
    let file = OpenOptions::new().write(true).create(!raw).truncate(false).open(path);
    let file = file.map_err(text)?;
    file.write_all_at(bytes, step.at as u64).map_err(text)?;
    file.sync_all().map_err(text)?;
    // A name is durable once its directory is.
    if new { File::open(place).and_then(|dir| dir.sync_all()).map_err(text) } else { Ok(()) }
}

fn store(
    place: &Path,
    step: &Step,
    bytes: &[u8],
    raw: bool,
    mapped: &mut HashMap<String, Mapping>,
) -> Result<()> {
    if !mapped.contains_key(&step.file) {
        let map = if raw { map_device(place)? } else { map_file(place, &step.file)? };
        mapped.insert(step.file.clone(), map);
    }
    let map = &mapped[&step.file];
    map.store(step.at, bytes);
    map.msync_range(step.at, step.bytes)
}

fn map_device(place: &Path) -> Result<Mapping> {
    let device = OpenOptions::new().read(true).write(true).open(place).map_err(text)?;
    Mapping::shared(&device, STREAMS as usize * RAW_BYTES, true)
}

/// Makes a file of zeros and makes its name and length durable; returns a mapping of it.
fn map_file(place: &Path, name: &str) -> Result<Mapping> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(place.join(name));
    let file = file.map_err(text)?;
    file.write_all_at(&vec![0; MAPPED_BYTES], 0).map_err(text)?;
    file.sync_all().map_err(text)?;
    File::open(place).and_then(|dir| dir.sync_all()).map_err(text)?;
    Mapping::shared(&file, MAPPED_BYTES, true)
}
