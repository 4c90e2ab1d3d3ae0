// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A file whose pages are the memory itself, mapped by this process as well: what the guest stored
//! is made durable by cache lines, and what is written by request goes past the cache (behaviours
//! 12 and 13).

#![allow(unsafe_code)] // Maps a file; what is done there is in bounds by its one function at().

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

/// The file, from its first byte on.
struct Mapping {
    /// Goes first: pages are guarded until they are unmapped.
    guarded: Guarded,
    pages: Pages,
}

/// Unmapped when dropped.
struct Pages {
    base: Base,
    bytes: usize,
}

#[derive(Clone, Copy)]
struct Base(NonNull<u8>);

// SAFETY: it is memory that others change at any time, wherever they run; nothing here makes a
// reference to it.
unsafe impl Send for Base {}
// SAFETY: the same.
unsafe impl Sync for Base {}

impl Mapping {
    /// # Errors
    /// The system's.
    fn new(file: &File, bytes: u64, flags: MapFlags) -> io::Result<Self> {
        let too_long = || io::Error::from(Errno::ENOMEM);
        let page = usize::try_from(page_bytes(file)?).map_err(|_| too_long())?;
        // Whole pages, or they can't be unmapped.
        let length =
            usize::try_from(bytes).ok().and_then(|bytes| bytes.checked_next_multiple_of(page));
        let length = length.and_then(NonZeroUsize::new).ok_or_else(too_long)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new place for the map, which nobody else knows of.
        let base = unsafe { mmap(None, length, protection, flags, file, 0)? }.cast::<u8>();
        let pages = Pages { base: Base(base), bytes: length.get() };
        let guarded = Guarded::new(base.as_ptr().addr(), pages.bytes, page)?;
        Ok(Self { guarded, pages })
    }

    /// Where `range` is, if all of it is mapped.
    fn start_of(&self, range: FileRange) -> Option<*mut u8> {
        let (start, bytes) = (usize::try_from(range.from.0).ok()?, length_of(range).ok()?);
        let last = self.pages.bytes.checked_sub(bytes)?;
        (start <= last).then(|| self.pages.base.0.as_ptr().wrapping_add(start))
    }

    /// Runs `work` with a pointer to `range`.
    ///
    /// # Errors
    /// EINVAL for what is not in it; EIO where the file lacked a page that was touched, now or
    /// before.
    fn work<T>(&self, range: FileRange, work: impl FnOnce(*mut u8) -> T) -> io::Result<T> {
        let at = self.start_of(range).ok_or(Errno::EINVAL)?;
        let done = work(at);
        if self.guarded.is_gone() { Err(Errno::EIO.into()) } else { Ok(done) }
    }
}

/// The length of a range that is to be mapped.
///
/// # Errors
/// EINVAL for one that no address space has.
fn length_of(range: FileRange) -> io::Result<usize> {
    usize::try_from(range.bytes).map_err(|_| Errno::EINVAL.into())
}

#[cfg(test)]
impl Pages {
    /// Reads what is there, whether it counts or not.
    fn read(&self, from: u64, to: &mut [u8]) {
        assert!(from as usize + to.len() <= self.bytes);
        let at = self.base.0.as_ptr().wrapping_add(from as usize);
        // SAFETY: so much is mapped.
        unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: it is ours, and nobody has a pointer into it any more.
        let _ = unsafe { munmap(self.base.0.cast(), self.bytes) };
    }
}

/// Whether a store to the file can be made durable by cache lines alone: whether it can be mapped
/// with MAP_SYNC.
pub(super) fn maps_sync(file: &File) -> bool {
    Mapping::new(file, PMD_BYTES, MapFlags::MAP_SHARED_VALIDATE | MapFlags::MAP_SYNC).is_ok()
}

/// How often a file may double in length: from 2 MiB to the most that a file can have.
const DOUBLINGS: usize = 43;

/// One file, mapped.
pub struct Direct {
    file: Arc<File>,
    flags: MapFlags,
    instruction: Instruction,
    /// As long as the file was at first.
    first: Mapping,
    /// Twice as long, four times as long ..., made when the file has grown so far. No lock is taken
    /// to find one: a contended lock takes longer than the flush of a page.
    grown: [OnceLock<Mapping>; DOUBLINGS],
    making: Mutex<()>,
}

impl Direct {
    /// Maps the first `bytes` of `file`, and more as it grows.
    ///
    /// # Errors
    /// The system's. Where [`Backing::DaxFile`] was said and the file is none, EOPNOTSUPP.
    pub fn new(
        file: Arc<File>,
        bytes: u64,
        backing: Backing,
        instruction: Instruction,
    ) -> io::Result<Arc<Self>> {
        let flags = match backing {
            // With MAP_SYNC a first store to a page returns when its block is durably the file's.
            Backing::DaxFile => MapFlags::MAP_SHARED_VALIDATE | MapFlags::MAP_SYNC,
            _ => MapFlags::MAP_SHARED,
        };
        let first = Mapping::new(&file, bytes.max(1).next_multiple_of(PMD_BYTES), flags)?;
        let grown = [const { OnceLock::new() }; DOUBLINGS];
        Ok(Arc::new(Self { file, flags, instruction, first, grown, making: Mutex::default() }))
    }

    /// Gives each page of `range`, which begins with a page, a block that is durably the file's, so
    /// that cache lines are all that a later store needs. Nothing that the file holds changes.
    ///
    /// # Errors
    /// The system's; EFAULT where the file system finds no space.
    pub fn populate_blocks(&self, range: FileRange) -> io::Result<()> {
        let start = self.covering(range)?.start_of(range).and_then(|at| NonNull::new(at.cast()));
        let (start, bytes) = (start.ok_or(Errno::EINVAL)?, length_of(range)?);
        // SAFETY: of the range that is mapped; it is as if each page had been stored to.
        Ok(unsafe { madvise(start, bytes, MmapAdvise::MADV_POPULATE_WRITE) }?)
    }

    /// Copies `bytes` to byte `from` on, past the cache. They are durable after the next
    /// [`fence`](Self::fence) of this thread.
    ///
    /// # Errors
    /// EIO where the file has no page for them.
    pub fn store(&self, from: FileOffset, bytes: &[u8]) -> io::Result<()> {
        // SAFETY: `bytes` are ours, and `bytes.len()` bytes are mapped from `to` on.
        self.work(FileRange::new(from, bytes.len() as u64), |to| unsafe {
            self.instruction.copy(to, bytes.as_ptr(), bytes.len());
        })
    }

    /// The same, out of the guest's memory.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn store_from(&self, from: FileOffset, slice: &VolatileSlice<'_>) -> io::Result<()> {
        let guard = slice.ptr_guard();
        // SAFETY: the slice is as long as it says, and so much is mapped from `to` on.
        self.work(FileRange::new(from, slice.len() as u64), |to| unsafe {
            self.instruction.copy(to, guard.as_ptr(), slice.len());
        })
    }

    /// Copies out of the file from byte `from` on.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn load(&self, from: FileOffset, to: &mut [u8]) -> io::Result<()> {
        self.work(FileRange::new(from, to.len() as u64), |at| {
            // SAFETY: `to` is ours alone, and what is mapped is as long. Others may store
            // meanwhile: any mixture of bytes is a good copy.
            unsafe { std::ptr::copy_nonoverlapping(at, to.as_mut_ptr(), to.len()) };
        })
    }

    /// Clears `range`, as [`store`](Self::store) does.
    ///
    /// # Errors
    /// See [`store`](Self::store).
    pub fn zero(&self, range: FileRange) -> io::Result<()> {
        let bytes = length_of(range)?;
        // SAFETY: mapped, as long as that.
        self.work(range, |to| unsafe { self.instruction.zero(to, bytes) })
    }

    /// Returns once what this thread has stored is durable.
    pub fn fence(&self) {
        fence();
    }

    /// Runs `work` where `range` is mapped.
    fn work<T>(&self, range: FileRange, work: impl FnOnce(*mut u8) -> T) -> io::Result<T> {
        self.covering(range)?.work(range, work)
    }

    /// A mapping that holds all of `range`.
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
            let _ = place.set(new); // It is empty: we are alone.
        }
        place.get().ok_or_else(|| Errno::ENOMEM.into())
    }
}

/// Makes what was stored to a file durable by its cache lines.
pub(super) struct Lines(pub(super) Arc<Direct>);

impl LineFlush for Lines {
    /// # Errors
    /// EIO where the file has no page there, or has had none before.
    fn flush(&self, range: FileRange) -> io::Result<()> {
        let (bytes, instruction) = (length_of(range)?, self.0.instruction);
        // SAFETY: the instruction was chosen because it is here, and the range is mapped.
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

    /// Shows: a file that somebody else cuts off is an error of that file, in each kind of access
    /// and ever after, and no SIGBUS; another file is not concerned.
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
            assert!(work(&direct).is_err(), "{name}: what it did before was lost");
            other.store(FileOffset(0), b"kept").unwrap();
        }
    }

    /// Shows: the same of huge pages, of which the kernel takes no piece of 4 KiB away: the process
    /// lives, and the pages that are left hold what they held.
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

    /// A file of huge pages, if the machine has as many; else says so.
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
            // Not eprintln!: the test runner would swallow it, and ci/test counts these lines.
            let why = format!("no 4 huge pages ({e}): sysctl vm.nr_hugepages=8");
            let _ = writeln!(io::stderr(), "SKIPPED a_huge_page_that_is_gone_is_an_error: {why}");
        }
        made.ok()
    }

    /// Shows: a file that grows is mapped as far as it goes, and what is not in it is refused.
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
