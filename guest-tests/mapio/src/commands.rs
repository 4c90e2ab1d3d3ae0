// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Commands that one process runs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use twox_hash::XxHash3_128;

use crate::Result;
use crate::map::{Mapping, PAGE};

const CHUNK: usize = 1 << 20;
const RANGE: usize = 2 << 20;

fn open(path: &Path, write: bool) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(write).open(path);
    opened.map_err(|error| format!("open {}: {error}", path.display()))
}

fn io<T>(what: &str, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|error| format!("{what}: {error}"))
}

fn size(file: &File) -> Result<usize> {
    Ok(io("fstat", file.metadata())?.len() as usize)
}

/// The bytes that pattern() of tests/guest/disk.rs makes.
fn pattern(seed: &str, bytes: usize) -> Vec<u8> {
    format!("{seed}\n").into_bytes().into_iter().cycle().take(bytes).collect()
}

/// Prints `sum=NAME,BYTES,XXH3-128 by read,XXH3-128 by mmap`. Under TCG XXH3 takes a tenth of
/// SHA-256's time.
pub fn sums(path: &Path) -> Result<()> {
    let mut file = open(path, false)?;
    let bytes = size(&file)?;
    let mut buffer = vec![0; CHUNK];
    let mut by_read = XxHash3_128::new();
    loop {
        match io("read", file.read(&mut buffer))? {
            0 => break,
            count => by_read.write(&buffer[..count]),
        }
    }
    let mut by_map = XxHash3_128::new();
    if bytes > 0 {
        let mapping = Mapping::shared(&file, bytes, false)?;
        for offset in (0..bytes).step_by(CHUNK) {
            let part = &mut buffer[..CHUNK.min(bytes - offset)];
            mapping.load(offset, part);
            by_map.write(part);
        }
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    println!("sum={name},{bytes},{:032x},{:032x}", by_read.finish_128(), by_map.finish_128());
    Ok(())
}

pub fn append(path: &Path, bytes: usize, seed: &str) -> Result<()> {
    let mut file = io("open", OpenOptions::new().append(true).open(path))?;
    io("append", file.write_all(&pattern(seed, bytes)))
}

pub fn resize(path: &Path, delta: i64) -> Result<()> {
    let file = open(path, true)?;
    let bytes = (size(&file)? as i64 + delta).max(0);
    io("ftruncate", file.set_len(bytes as u64))
}

pub fn store(path: &Path, offset: usize, bytes: usize, seed: &str, msync: bool) -> Result<()> {
    let file = open(path, true)?;
    let end = (offset + bytes).min(size(&file)?);
    if offset >= end {
        return Ok(());
    }
    let mapping = Mapping::shared(&file, end, true)?;
    mapping.store(offset, &pattern(seed, end - offset));
    if msync { mapping.msync() } else { Ok(()) }
}

pub fn private(path: &Path) -> Result<()> {
    let file = open(path, false)?;
    let bytes = size(&file)?;
    let shared = Mapping::shared(&file, bytes, false)?;
    let mut before = vec![0; bytes];
    shared.load(0, &mut before);
    let private = Mapping::new(&file, bytes, true, libc::MAP_PRIVATE)?;
    let inverse: Vec<u8> = before.iter().map(|byte| !byte).collect();
    private.store(0, &inverse);
    let mut after = vec![0; bytes];
    private.load(0, &mut after);
    if after != inverse {
        return Err("the private mapping lost its stores".into());
    }
    shared.load(0, &mut after);
    if after != before {
        return Err("stores of a private mapping are in the file".into());
    }
    Ok(())
}

fn open_direct(path: &Path, write: bool) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(!write).write(write).create(write).custom_flags(libc::O_DIRECT);
    io("open O_DIRECT", options.open(path))
}

/// One system call per chunk; its buffer is the mapping itself.
fn transfer(file: &File, mapping: &Mapping, bytes: usize, write: bool) -> Result<()> {
    let mut done = 0;
    while done < bytes {
        let (buffer, count) = (mapping.pointer(done).cast(), CHUNK.min(bytes - done));
        // SAFETY: `count` bytes at `buffer` are inside the mapping.
        let moved = unsafe {
            if write {
                libc::write(file.as_raw_fd(), buffer, count)
            } else {
                libc::read(file.as_raw_fd(), buffer, count)
            }
        };
        match moved {
            1.. => done += moved as usize,
            0 => return Err(format!("short after {done} of {bytes}")),
            _ => return Err(format!("at {done}: {}", std::io::Error::last_os_error())),
        }
    }
    Ok(())
}

pub fn direct_in(source: &Path, path: &Path, bytes: usize) -> Result<()> {
    let file = open(path, true)?;
    let mapping = Mapping::shared(&file, bytes, true)?;
    transfer(&open_direct(source, false)?, &mapping, bytes, false)?;
    same(source, &mapping, bytes)
}

pub fn direct_out(path: &Path, target: &Path, bytes: usize) -> Result<()> {
    let file = open(path, false)?;
    let mapping = Mapping::shared(&file, bytes, false)?;
    transfer(&open_direct(target, true)?, &mapping, bytes, true)?;
    same(target, &mapping, bytes)
}

/// Checks that the other file, read through the page cache, has the mapping's bytes.
fn same(path: &Path, mapping: &Mapping, bytes: usize) -> Result<()> {
    let mut other = open(path, false)?;
    let (mut here, mut there) = (vec![0; PAGE], vec![0; PAGE]);
    for offset in (0..bytes).step_by(PAGE) {
        mapping.load(offset, &mut here);
        io("read", other.read_exact(&mut there))?;
        if let Some(at) = (0..PAGE).find(|&at| here[at] != there[at]) {
            return Err(format!("differs at {}", offset + at));
        }
    }
    println!("compared={bytes}");
    Ok(())
}

/// Prints `stored=BYTES` and `signal=NUMBER`; 0 if the child stored everything.
pub fn fill(path: &Path, bytes: usize) -> Result<()> {
    let file = io(
        "create",
        OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path),
    )?;
    io("ftruncate", file.set_len(bytes as u64))?;
    let mapping = Mapping::shared(&file, bytes, true)?;
    let progress = io("memfd", anonymous())?;
    io("ftruncate", progress.set_len(PAGE as u64))?;
    let progress = Mapping::shared(&progress, PAGE, true)?;
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(format!("fork: {}", std::io::Error::last_os_error())),
        0 => {
            for offset in (0..bytes).step_by(PAGE) {
                mapping.store(offset, &[b'f'; PAGE]);
                progress.counter(0).store((offset + PAGE) as u64, SeqCst);
            }
            std::process::exit(0)
        }
        child => {
            let mut status = 0;
            // SAFETY: a child of this process, and a valid pointer for its status.
            unsafe { libc::waitpid(child, &mut status, 0) };
            println!("stored={}", progress.counter(0).load(SeqCst));
            println!(
                "signal={}",
                if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
            );
            Ok(())
        }
    }
}

fn anonymous() -> std::io::Result<File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string; the descriptor is new, and no other code has its number.
    unsafe {
        match libc::memfd_create(c"progress".as_ptr(), 0) {
            -1 => Err(std::io::Error::last_os_error()),
            fd => Ok(File::from_raw_fd(fd)),
        }
    }
}

/// Prints `written=BYTES` and `error=NUMBER`; 0 if everything was written.
pub fn write_out(path: &Path, bytes: usize) -> Result<()> {
    let mut file = io("create", File::create(path))?;
    let chunk = pattern("write-out", 1 << 16);
    let (mut written, mut error) = (0, 0);
    while written < bytes && error == 0 {
        match file.write(&chunk) {
            Ok(count) => written += count,
            Err(failed) => error = failed.raw_os_error().unwrap_or(-1),
        }
    }
    println!("written={written}");
    println!("error={error}");
    Ok(())
}

pub fn touch(path: &Path, bytes: usize, rounds: usize, write: bool) -> Result<()> {
    let file = open(path, write)?;
    let mapping = Mapping::shared(&file, bytes, write)?;
    let mut touched = 0;
    for round in 0..rounds {
        for offset in (0..bytes).step_by(RANGE) {
            // Another page of the range in each round; the reader expects what the writer stores.
            let offset = offset + (round % (RANGE / PAGE)) * PAGE;
            if offset + 8 > bytes {
                continue;
            }
            let mut word = [0; 8];
            if write {
                mapping.store(offset, &(offset as u64).to_le_bytes());
            }
            mapping.load(offset, &mut word);
            if u64::from_le_bytes(word) != offset as u64 {
                return Err(format!("round {round}: {word:02x?} at {offset}"));
            }
            touched += 1;
        }
    }
    println!("touched={touched}");
    Ok(())
}

/// Loads one word of each page; all must be 0.
pub fn zeros(path: &Path) -> Result<()> {
    let file = open(path, false)?;
    let bytes = size(&file)?;
    let mapping = Mapping::shared(&file, bytes, false)?;
    for offset in (0..bytes).step_by(PAGE) {
        let mut word = [0; 8];
        mapping.load(offset, &mut word);
        if word != [0; 8] {
            return Err(format!("{word:02x?} at {offset}"));
        }
    }
    println!("pages={}", bytes / PAGE);
    Ok(())
}
