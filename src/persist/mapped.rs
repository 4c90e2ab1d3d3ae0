// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file on persistent memory (or in memory, as tmpfs), mapped by this process. The guest's stores
//! become durable by writing back their cache lines. FUSE writes are copied past the cache
//! (behaviours 12 and 13 of src/dax/mod.rs).

#![allow(unsafe_code)] // mmap(2), and accesses to the map: Mapping::work() checks their bounds.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap};
use vm_memory::VolatileSlice;

use super::cacheline::{Instruction, fence};
use super::device_dax::page_bytes;
use super::sigbus::Guarded;
use super::{Backing, LineFlush};
use crate::support::lock::{Mutex, lock};
use crate::support::units::{FileOffset, FileRange, PMD_BYTES};

/// A map of a file from its first byte on.
struct Mapping {
    /// Declared before `pages`, so dropped first: the guard ends before the pages are unmapped, as
    /// [`Guarded`] demands.
    guarded: Guarded,
    pages: Pages,
}

/// The mapped pages, unmapped on drop.
struct Pages {
    /// The address of the first byte.
    base: Base,
    /// The length of the map in bytes.
    bytes: usize,
}

#[derive(Clone, Copy)]
struct Base(NonNull<u8>);

// SAFETY: the guest and other processes may change the mapped memory at any time. This file makes
// no reference to it, and accesses it by raw pointers from any thread.
unsafe impl Send for Base {}
// SAFETY: as for Send.
unsafe impl Sync for Base {}

impl Mapping {
    /// Maps the first `bytes` bytes of `file`, rounded up to whole pages.
    ///
    /// # Errors
    /// ENOMEM if `bytes` is 0 or larger than the address space; the errors of mmap(2),
    /// [`page_bytes`] and [`Guarded::new`].
    fn new(file: &File, bytes: u64, flags: MapFlags) -> io::Result<Self> {
        let too_long = || io::Error::from(Errno::ENOMEM);
        let page = usize::try_from(page_bytes(file)?).map_err(|_| too_long())?;
        // munmap(2) of huge pages takes whole pages only.
        let length =
            usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_next_multiple_of(page));
        let length = length.and_then(NonZeroUsize::new).ok_or_else(too_long)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses an unused address.
        let base = unsafe { mmap(None, length, protection, flags, file, 0)? }.cast::<u8>();
        let pages = Pages { base: Base(base), bytes: length.get() };
        let guarded = Guarded::new(base.as_ptr().addr(), pages.bytes, page)?;
        Ok(Self { guarded, pages })
    }

    /// The address of `range`. None if a byte of it is not mapped.
    fn start_of(&self, range: FileRange) -> Option<*mut u8> {
        let (start, bytes) = (usize::try_from(range.from.0).ok()?, length_of(range).ok()?);
        let last = self.pages.bytes.checked_sub(bytes)?;
        (start <= last).then(|| self.pages.base.0.as_ptr().wrapping_add(start))
    }

    /// Calls `work` with the address of `range`.
    ///
    /// # Errors
    /// EINVAL if a byte of `range` is not mapped; EIO if an access to the map, in this call or
    /// before, has met a page that the file lacks.
    fn work<T>(&self, range: FileRange, work: impl FnOnce(*mut u8) -> T) -> io::Result<T> {
        let at = self.start_of(range).ok_or(Errno::EINVAL)?;
        let done = work(at);
        if self.guarded.is_gone() { Err(Errno::EIO.into()) } else { Ok(done) }
    }
}

/// The length of a range in bytes, as a usize.
///
/// # Errors
/// EINVAL if it is larger than the address space.
fn length_of(range: FileRange) -> io::Result<usize> {
    usize::try_from(range.bytes).map_err(|_| Errno::EINVAL.into())
}

#[cfg(test)]
impl Pages {
    /// Copies bytes of the map, also if the map has met a missing page.
    fn read(&self, from: u64, to: &mut [u8]) {
        assert!(from as usize + to.len() <= self.bytes);
        let at = self.base.0.as_ptr().wrapping_add(from as usize);
        // SAFETY: the assertion checked that the bytes are mapped.
        unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: `self` made the map, and each use of its address borrows `self`.
        let _ = unsafe { munmap(self.base.0.cast(), self.bytes) };
    }
}

/// Whether the file can be mapped with MAP_SYNC, so that a store to it becomes durable by writing
/// back its cache lines alone.
pub(super) fn maps_sync(file: &File) -> bool {
    Mapping::new(file, PMD_BYTES, MapFlags::MAP_SHARED_VALIDATE | MapFlags::MAP_SYNC).is_ok()
}

/// Number of times that a file's length can double, from 2 MiB (2^21) to more than the largest file
/// (2^63 - 1 bytes).
const DOUBLINGS: usize = 43;

/// One file on persistent memory or in memory, mapped by this process.
pub struct Direct {
    file: Arc<File>,
    /// The flags of each map.
    flags: MapFlags,
    instruction: Instruction,
    /// The map of the file's first length.
    first: Mapping,
    /// Maps of 2, 4, 8 ... times the first length, each made when a range behind the shorter maps
    /// is used first. A look-up takes no lock: a contended lock takes longer than the flush of a
    /// page.
    grown: [OnceLock<Mapping>; DOUBLINGS],
    /// Held by the thread that makes a map of `grown`.
    making: Mutex<()>,
}

impl Direct {
    /// Maps the first `bytes` bytes of `file`, rounded up to 2 MiB. Ranges behind are mapped when
    /// they are used. `instruction` writes back the cache lines.
    ///
    /// # Errors
    /// The error of mmap(2): EOPNOTSUPP if `backing` is [`Backing::DaxFile`] and the file is not on
    /// a DAX file system. ENOMEM if the process has too many guarded ranges.
    pub fn new(
        file: Arc<File>,
        bytes: u64,
        backing: Backing,
        instruction: Instruction,
    ) -> io::Result<Arc<Self>> {
        let flags = match backing {
            // With MAP_SYNC the fault of a first store to a page returns only when the metadata of
            // its block is durable.
            Backing::DaxFile => MapFlags::MAP_SHARED_VALIDATE | MapFlags::MAP_SYNC,
            _ => MapFlags::MAP_SHARED,
        };
        let first = Mapping::new(&file, bytes.max(1).next_multiple_of(PMD_BYTES), flags)?;
        let grown = [const { OnceLock::new() }; DOUBLINGS];
        Ok(Arc::new(Self { file, flags, instruction, first, grown, making: Mutex::default() }))
    }

    /// Allocates a block for each page of `range`, and makes the metadata of these blocks durable,
    /// so that a later store needs only the write-back of its cache lines. `range` must begin at a
    /// page. The file's content stays the same.
    ///
    /// # Errors
    /// The error of madvise(2): EFAULT if the file system has no free space. EINVAL if `range`
    /// can't be mapped.
    pub fn populate_blocks(&self, range: FileRange) -> io::Result<()> {
        let start = self.covering(range)?.start_of(range).and_then(|at| NonNull::new(at.cast()));
        let (start, bytes) = (start.ok_or(Errno::EINVAL)?, length_of(range)?);
        // SAFETY: the range is mapped. MADV_POPULATE_WRITE faults its pages in for writing, and
        // changes no byte.
        Ok(unsafe { madvise(start, bytes, MmapAdvise::MADV_POPULATE_WRITE) }?)
    }

    /// Copies `bytes` into the file from byte `from` on, past the cache. The copy is durable after
    /// the next [`fence`](Self::fence) of this thread.
    ///
    /// # Errors
    /// EIO if the file lacks a page of the range, or has lacked a page of the same map before;
    /// EINVAL, EFBIG or the error of mmap(2) if the range can't be mapped.
    pub fn store(&self, from: FileOffset, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: `bytes` is readable, and `bytes.len()` bytes are mapped from `to` on.
        self.work(FileRange::new(from, bytes.len() as u64), |to| unsafe {
            self.instruction.copy(to, bytes.as_ptr(), bytes.len());
        })
    }

    /// Like [`store`](Self::store), with the bytes of the guest's memory `slice`.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn store_from(&self, from: FileOffset, slice: &VolatileSlice<'_>) -> io::Result<()> {
        let guard = slice.ptr_guard();
        // SAFETY: `guard` points to `slice.len()` bytes, and as many are mapped from `to` on.
        self.work(FileRange::new(from, slice.len() as u64), |to| unsafe {
            self.instruction.copy(to, guard.as_ptr(), slice.len());
        })
    }

    /// Copies the file's bytes from byte `from` on into `to`.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn load(&self, from: FileOffset, to: &mut [u8]) -> io::Result<()> {
        self.work(FileRange::new(from, to.len() as u64), |at| {
            // SAFETY: `to` is borrowed mutably, and as many bytes are mapped from `at` on. The
            // guest may store meanwhile: any mixture of old and new bytes is a valid copy.
            unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
        })
    }

    /// Zeroes `range`. The zeros are durable after the next [`fence`](Self::fence) of this thread.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn zero(&self, range: FileRange) -> io::Result<()> {
        let bytes = length_of(range)?;
        // SAFETY: `bytes` bytes are mapped from `to` on.
        self.work(range, |to| unsafe { self.instruction.zero(to, bytes) })
    }

    /// Returns once the stores and zeros of this thread are durable.
    pub fn fence(&self) {
        fence();
    }

    /// See [`Mapping::work`], in a map that covers `range`.
    fn work<T>(&self, range: FileRange, work: impl FnOnce(*mut u8) -> T) -> io::Result<T> {
        self.covering(range)?.work(range, work)
    }

    /// A map that covers all of `range`.
    ///
    /// # Errors
    /// EINVAL or EFBIG if the range ends behind the largest file offset; see [`Mapping::new`].
    fn covering(&self, range: FileRange) -> io::Result<&Mapping> {
        let end = range.checked_end().ok_or(Errno::EINVAL)?.0;
        let first = self.first.pages.bytes as u64;
        if end <= first {
            return Ok(&self.first);
        }
        let doublings = end.div_ceil(first).next_power_of_two().trailing_zeros();
        let place = self.grown.get(doublings as usize - 1).ok_or(Errno::EFBIG)?;
        if let Some(map) = place.get() {
            return Ok(map);
        }
        let _alone = lock(&self.making);
        if place.get().is_none() {
            let new = Mapping::new(&self.file, first << doublings, self.flags)?;
            let _ = place.set(new); // It can't fail: only the holder of `making` sets a map.
        }
        place.get().ok_or_else(|| Errno::ENOMEM.into())
    }
}

/// Makes the guest's stores to a file durable by writing back its cache lines.
pub(super) struct Lines(pub(super) Arc<Direct>);

impl LineFlush for Lines {
    /// Writes back the cache lines of `range`.
    ///
    /// # Errors
    /// As [`Direct::store`].
    fn flush(&self, range: FileRange) -> io::Result<()> {
        let (bytes, instruction) = (length_of(range)?, self.0.instruction);
        // SAFETY: Instruction::best() chose an instruction that the processor has, and the range is
        // mapped.
        self.0.work(range, |at| unsafe { instruction.write_back(at, bytes) })
    }

    fn fence(&self) {
        fence();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;
    use crate::persist::{Durability, PersistMode};

    fn direct(bytes: u64) -> (Arc<File>, Arc<Direct>) {
        let file = Arc::new(tempfile::tempfile_in("/dev/shm").unwrap());
        file.set_len(bytes).unwrap();
        let chosen = Durability::choose(Backing::Memory, PersistMode::Cacheline).unwrap();
        let direct = chosen.persist(&file, bytes).unwrap().direct.unwrap();
        (file, direct)
    }

    fn range(from: u64, bytes: u64) -> FileRange {
        FileRange::new(FileOffset(from), bytes)
    }

    fn flush(direct: &Arc<Direct>, from: u64, bytes: u64) -> io::Result<()> {
        Lines(direct.clone()).flush(range(from, bytes))
    }

    /// Shows: each kind of access to a truncated file returns an error, then and later, and raises
    /// no SIGBUS. Another file works on.
    #[test]
    fn a_file_that_is_cut_off_is_an_error() {
        type Work = fn(&Arc<Direct>) -> io::Result<()>;
        let works: [(&str, Work); 4] = [
            ("write back", |direct| flush(direct, 0, 4 * PMD_BYTES)),
            ("store", |direct| direct.store(FileOffset(3 * PMD_BYTES), b"lost")),
            ("zero", |direct| direct.zero(range(3 * PMD_BYTES, 100))),
            ("load", |direct| direct.load(FileOffset(3 * PMD_BYTES), &mut [0; 100])),
        ];
        let (_, other) = direct(PMD_BYTES);
        for (name, work) in works {
            let (file, direct) = direct(4 * PMD_BYTES);
            work(&direct).unwrap();
            file.set_len(PMD_BYTES).unwrap();
            assert_eq!(work(&direct).unwrap_err().raw_os_error(), Some(libc::EIO), "{name}");
            file.set_len(4 * PMD_BYTES).unwrap();
            assert!(work(&direct).is_err(), "{name}: earlier stores were lost");
            other.store(FileOffset(0), b"kept").unwrap();
        }
    }

    /// Shows: accesses to a missing huge page (hugetlbfs), of which the kernel replaces no part of
    /// 4 KiB, return an error. The remaining pages keep their content.
    #[test]
    fn a_huge_page_that_is_gone_is_an_error() {
        type Work = fn(&Arc<Direct>) -> io::Result<()>;
        let works: [(&str, Work); 3] = [
            ("store", |direct| direct.store(FileOffset(3 * PMD_BYTES + 5000), b"lost")),
            ("zero", |direct| direct.zero(range(3 * PMD_BYTES + 5000, 100))),
            ("load", |direct| direct.load(FileOffset(3 * PMD_BYTES + 5000), &mut [0; 100])),
        ];
        for (name, work) in works {
            let Some((file, direct)) = huge(4 * PMD_BYTES) else { return };
            direct.store(FileOffset(PMD_BYTES - 4), b"kept").unwrap();
            work(&direct).unwrap();
            file.set_len(PMD_BYTES).unwrap();
            assert_eq!(work(&direct).unwrap_err().raw_os_error(), Some(libc::EIO), "{name}");
            let mut left = [0; 4];
            direct.first.pages.read(PMD_BYTES - 4, &mut left);
            assert_eq!(&left, b"kept", "{name}");
        }
    }

    /// A file of huge pages. None, with a line on stderr, if the machine has too few.
    fn huge(bytes: u64) -> Option<(Arc<File>, Arc<Direct>)> {
        let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB;
        let made = memfd_create(c"huge", flags).map(File::from).map_err(io::Error::from);
        let made = made.and_then(|file| {
            file.set_len(bytes)?;
            let file = Arc::new(file);
            let chosen = Durability::choose(Backing::of(&file), PersistMode::Cacheline).unwrap();
            Ok((file.clone(), chosen.persist(&file, bytes)?.direct.unwrap()))
        });
        if let Err(e) = &made {
            use std::io::Write;
            // Not eprintln!: the test runner captures its output, and ci/test counts these lines.
            let why = format!("no 4 huge pages ({e}): sysctl vm.nr_hugepages=8");
            let _ = writeln!(io::stderr(), "SKIPPED a_huge_page_that_is_gone_is_an_error: {why}");
        }
        made.ok()
    }

    /// Shows: ranges by which a file has grown can be stored to and flushed, and ranges behind the
    /// largest file offset are refused.
    #[test]
    fn growth_is_followed() {
        let (file, direct) = direct(PMD_BYTES);
        for pages in [2, 3, 9, 64] {
            let bytes = pages * PMD_BYTES;
            file.set_len(bytes).unwrap();
            direct.store(FileOffset(bytes - 5), b"last.").unwrap();
            let mut found = [0; 5];
            file.read_exact_at(&mut found, bytes - 5).unwrap();
            assert_eq!(&found, b"last.");
            flush(&direct, 0, bytes).unwrap();
        }
        assert!(direct.store(FileOffset(u64::MAX - 2), b"wraps").is_err());
        assert!(flush(&direct, 1 << 62, 1).is_err());
    }
}
