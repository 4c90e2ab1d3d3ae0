// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rows 6, 12, 13 and 16 on real file systems, with an mmap(2) instead of the guest's window.

#![allow(unsafe_code)] // mmap, and unshare(2).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nix::errno::Errno;
use vhost_user_dax::dax::engine::{Engine, Space};
use vhost_user_dax::dax::entry::{Order, PAGE_BYTES, PMD_BYTES, PMD_PAGES, PageIndex};
use vhost_user_dax::dax::extent::{Access, FileExtents};
use vhost_user_dax::persist::{Fdatasync, Persist};
use vhost_user_dax::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use super::{ALL, MOST_MAPS};
use testkit::fakes::{Log, StrictMapper};

/// A shared mapping of a file, as the guest has it.
struct Mapping {
    at: *mut u8,
    bytes: usize,
}

impl Mapping {
    fn new(file: &File) -> Self {
        let bytes = file.metadata().unwrap().len() as usize;
        let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, flags, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED);
        // SAFETY: the mapping just made. MADV_RANDOM turns read-ahead off: a test reads single
        // pages.
        unsafe { libc::madvise(at, bytes, libc::MADV_RANDOM) };
        Self { at: at.cast(), bytes }
    }

    fn load(&self, from: u64, bytes: usize) -> Vec<u8> {
        assert!(from as usize + bytes <= self.bytes);
        // SAFETY: inside the mapping, as just checked; volatile, since others store to it.
        (0..bytes).map(|n| unsafe { self.at.add(from as usize + n).read_volatile() }).collect()
    }

    fn store(&self, from: u64, data: &[u8]) {
        assert!(from as usize + data.len() <= self.bytes);
        for (n, byte) in data.iter().enumerate() {
            // SAFETY: as in `load`.
            unsafe { self.at.add(from as usize + n).write_volatile(*byte) };
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and no reference points into it.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// An engine with a real file.
struct Real {
    file: Arc<File>,
    engine: Engine,
    space: Arc<Space>,
}

impl Real {
    fn new(file: File, bytes: u64) -> Self {
        let file = Arc::new(file);
        file.set_len(bytes).unwrap();
        let window = bytes.next_multiple_of(PMD_BYTES);
        let mapper = StrictMapper::new(window, Log::default());
        let engine = Engine::new(WindowBytes(window), mapper, MOST_MAPS);
        let source = FileExtents::new(file.clone());
        let persist = Persist::kernel(Fdatasync(file.clone()));
        let space = engine.space(Box::new(source), persist);
        Self { file, engine, space }
    }

    fn grant(&self, from: u64, bytes: u64, access: Access) -> Result<(), Errno> {
        let span = self.engine.span(WindowOffset(from), WindowBytes(bytes)).unwrap();
        self.engine
            .grant(&self.space, FileOffset(from), span, access, || true)
            .map_err(|e| e.errno())
    }

    fn read(&self, from: u64, bytes: usize) -> Vec<u8> {
        let mut to = vec![0xee; bytes];
        let n = self.engine.read(&self.space, FileOffset(from), &mut to).unwrap();
        to.truncate(n);
        to
    }

    fn write(&self, from: u64, data: &[u8]) {
        let n = self.engine.write(&self.space, FileOffset(from), data).unwrap();
        assert_eq!(n, data.len());
    }

    fn blocks(&self) -> u64 {
        self.file.metadata().unwrap().blocks()
    }
}

/// A file in the folder of the sources, which is on a disk.
fn on_disk() -> File {
    tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap()
}

fn skipped(name: &str, why: &str) {
    // Not `eprintln!`: the test harness would capture it.
    #[allow(clippy::explicit_write)]
    writeln!(std::io::stderr(), "SKIPPED {name}: {why}").unwrap();
}

/// Row 6: a guest that reads a sparse file of 1 GiB makes the host allocate no block.
#[test]
fn row_06_a_sparse_gibibyte_stays_sparse() {
    let real = Real::new(on_disk(), 1 << 30);
    real.file.write_all_at(&[1; 4096], 5 * PAGE_BYTES).unwrap();
    real.file.sync_all().unwrap();
    let before = real.blocks();
    real.grant(0, 1 << 30, Access::Read).unwrap();
    let window = Mapping::new(&real.file);
    for chunk in 0..PMD_PAGES {
        assert_eq!(window.load(chunk * PMD_BYTES, 1), [0]);
    }
    real.engine.writeback(&real.space, ALL.0, ALL.1).unwrap();
    real.file.sync_all().unwrap();
    assert_eq!(real.blocks(), before);
    assert_eq!(
        real.space.entries().len(),
        511 + PMD_PAGES,
        "the number of entries is not 511 PMD entries and 512 PTE entries"
    );
    let last = real.space.entries().next(PageIndex(1 << 17), ALL.1, None).unwrap().1;
    assert!(last.is_zero() && last.order() == Order::Pmd);
}

/// Row 12: zeroing at unaligned offsets zeroes exactly those bytes. It frees whole blocks without a
/// write grant and keeps them under one; on a disk and on tmpfs (which has no ZERO_RANGE).
#[test]
fn row_12_zeroing_a_real_file_at_odd_offsets() {
    for file in [on_disk(), tempfile::tempfile_in("/dev/shm").unwrap()] {
        for access in [Access::Read, Access::Write] {
            let real = Real::new(file.try_clone().unwrap(), 4 * PMD_BYTES);
            real.write(0, &vec![9; 4 * PMD_BYTES as usize]);
            real.file.sync_all().unwrap();
            real.grant(0, 4 * PMD_BYTES, access).unwrap();
            let (before, window) = (real.blocks(), Mapping::new(&real.file));
            let (from, end) = (PAGE_BYTES + 123, 3 * PMD_BYTES + 77);
            let range = FileRange::new(FileOffset(from), end - from);
            real.engine.punch(&real.space, range).unwrap();
            real.file.sync_all().unwrap();
            let gone = before.saturating_sub(real.blocks());
            let holes =
                if access == Access::Read { (3 * PMD_BYTES - 2 * PAGE_BYTES) / 512 } else { 0 };
            assert_eq!(gone, holes, "{access:?}");
            // The loads come last: on tmpfs a load allocates a page for a hole.
            let there = window.load(0, 4 * PMD_BYTES as usize);
            for (at, byte) in there.into_iter().enumerate() {
                let expected = if (from..end).contains(&(at as u64)) { 0 } else { 9 };
                assert_eq!(byte, expected, "byte {at:#x}, {access:?}");
            }
        }
    }
}

/// Row 13: read and write see the bytes of an mmap of the same file, and the other way round, in
/// both orders.
#[test]
fn row_13_read_and_write_against_mmap() {
    for bytes in [3 * PMD_BYTES, 3 * PMD_BYTES + 2 * PAGE_BYTES] {
        let real = Real::new(on_disk(), bytes);
        real.grant(0, PMD_BYTES, Access::Write).unwrap();
        real.grant(PMD_BYTES, 2 * PMD_BYTES, Access::Read).unwrap();
        let window = Mapping::new(&real.file);
        for at in [1, PAGE_BYTES - 2, PMD_BYTES - 3, 2 * PMD_BYTES + 5] {
            // A write, then a load; also into holes that the window has shown before.
            assert_eq!(window.load(at, 7), [0; 7]);
            real.write(at, b"written");
            assert_eq!(window.load(at, 7), b"written");
            // A store, then a read.
            window.store(at + 1, b"STORE");
            assert_eq!(real.read(at, 7), b"wSTOREn");
            // A read, a store, a read: the second read returns the new bytes.
            window.store(at, b"again");
            assert_eq!(real.read(at, 5), b"again");
        }
        assert_eq!(
            real.read(bytes - 3, 100),
            [0; 3],
            "the read did not stop at the end of the file"
        );
        let entry = |page| real.space.entries().next(PageIndex(page), PageIndex(page), None);
        assert!(entry(2 * PMD_PAGES).unwrap().1.is_real(), "the write left the hole's entry");
        assert!(entry(2 * PMD_PAGES + 9).unwrap().1.is_zero());
    }
}

/// Runs `job` in a small ext4 of its own, in a mount namespace that only this thread sees.
fn on_small_ext4(name: &str, mebibytes: u64, job: fn(&Path)) {
    // SAFETY: unshare(2) accesses no memory.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return skipped(name, "no mount namespace (not root?)");
    }
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
    File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
    std::fs::create_dir(&disk).unwrap();
    let run = |program: &str, args: &[&str], paths: &[&Path]| {
        let done = Command::new(program).args(args).args(paths).output();
        done.is_ok_and(|out| out.status.success())
    };
    if !run("mount", &["--make-rprivate", "/"], &[])
        || !run("mkfs.ext4", &["-q", "-F"], &[&image])
        || !run("mount", &["-o", "loop"], &[&image, &disk])
    {
        return skipped(name, "no ext4 on a loop device");
    }
    job(&disk);
    assert!(run("umount", &[], &[&disk]), "a process still uses the disk");
}

/// Row 16: on a real disk that fills up, write grants fail with ENOSPC, and every store under a
/// granted range succeeds without a SIGBUS.
#[test]
fn row_16_a_real_full_disk() {
    // A thread of its own, because unshare(2) gives the calling thread a new mount namespace.
    let test = || {
        on_small_ext4("row_16_a_real_full_disk", 16, |disk| {
            let open =
                OpenOptions::new().read(true).write(true).create_new(true).open(disk.join("f"));
            let real = Real::new(open.unwrap(), 32 * PMD_BYTES);
            let window = Mapping::new(&real.file);
            let chunks = 0..32;
            let granted: Vec<_> = chunks
                .filter(|chunk| match real.grant(chunk * PMD_BYTES, PMD_BYTES, Access::Write) {
                    Ok(()) => true,
                    Err(e) => {
                        assert_eq!(e, Errno::ENOSPC);
                        false
                    }
                })
                .collect();
            assert!((2..8).contains(&granted.len()), "{granted:?} on 16 MiB");
            assert_eq!(real.engine.sizes().0, granted.len());
            // Another file takes the last free block first.
            let mut hog = File::create(disk.join("hog")).unwrap();
            while hog.write_all(&[1; 4096]).is_ok() {}
            for chunk in granted {
                for page in 0..PMD_PAGES {
                    window.store(chunk * PMD_BYTES + page * PAGE_BYTES, b"store");
                }
            }
            real.engine.writeback(&real.space, ALL.0, ALL.1).unwrap();
        });
    };
    std::thread::spawn(test).join().unwrap();
}
