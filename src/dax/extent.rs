// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the extents of a file, as the kernel's `iomap_begin` returns them. Knows no
//! entries.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek};

use super::entry::{Block, PAGE_BYTES, PMD_BYTES, PageIndex};
use super::fiemap::first_piece;
use crate::window::{FileOffset, FileRange};

/// The accesses that a grant permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Loads only. A private mapping of the guest needs a read grant only (behaviour 7).
    Read,
    /// Loads and stores.
    Write,
}

/// What backs a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backed {
    /// No blocks: the pages read as zeros.
    Hole,
    /// Allocated blocks that read as zeros until they are written.
    Unwritten,
    /// Blocks; this is the block of the first page.
    Mapped(Block),
}

/// A run of pages with the same kind of backing, whose blocks, if any, are consecutive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub start: PageIndex,
    /// Number of pages.
    pub pages: u64,
    /// What backs the pages.
    pub backed: Backed,
}

impl Extent {
    /// Whether the extent holds all of `pages` pages from `page` on.
    pub fn holds(&self, page: PageIndex, pages: u64) -> bool {
        page >= self.start && page - self.start + pages <= self.pages
    }

    /// The block of `page`. None if the extent has no blocks or does not hold `page`.
    pub fn block(&self, page: PageIndex) -> Option<Block> {
        match self.backed {
            Backed::Mapped(first) if self.holds(page, 1) => {
                Block::new(first.number() + (page - self.start))
            }
            _ => None,
        }
    }
}

/// A file: its extents, its length, and the calls that change them.
pub trait ExtentSource: Send + Sync {
    /// The file that the window shows.
    fn file(&self) -> &Arc<File>;

    /// The file's length in bytes (`i_size`).
    ///
    /// # Errors
    /// The error of fstat(2).
    fn file_bytes(&self) -> io::Result<u64>;

    /// Number of bytes, from the start of a file of `file_bytes` bytes, that a front-end maps. QEMU
    /// refuses a map that ends past the end of the file (docs/front-ends.md Q6), so the default is
    /// the length rounded down to whole pages.
    fn mappable_bytes(&self, file_bytes: u64) -> u64 {
        file_bytes / PAGE_BYTES * PAGE_BYTES
    }

    /// Whether the backing can be mapped by 2 MiB.
    fn maps_pmd(&self) -> bool;

    /// Behaviour 16: gives each page of `first..=last` inside the file a block of its own.
    ///
    /// # Errors
    /// The error of fallocate(2) or lseek(2): ENOSPC on a full disk.
    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()>;

    /// The extent that holds `page`. It may be cut to `pages` pages. With [`Access::Write`] the
    /// caller has allocated the page, and the extent is [`Backed::Mapped`].
    ///
    /// # Errors
    /// The error of lseek(2) or FS_IOC_FIEMAP; EFBIG if the page number is no valid block number.
    fn extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent>;

    /// Sets the file's length in bytes.
    ///
    /// # Errors
    /// The error of ftruncate(2).
    fn set_bytes(&self, bytes: u64) -> io::Result<()>;

    /// Makes a range of bytes read as zeros (behaviour 12). With `keep` the range keeps its blocks;
    /// without `keep` its whole blocks become holes.
    ///
    /// # Errors
    /// The error of fallocate(2), or of pwrite(2) where zeros are written.
    fn zero(&self, range: FileRange, keep: bool) -> io::Result<()>;

    /// Reads from byte `from` on; holes read as zeros. Returns the number of bytes read, which may
    /// be less than `to` has, and is 0 only at the end of the file.
    ///
    /// # Errors
    /// The error of pread(2).
    fn read_at(&self, from: FileOffset, to: &mut [u8]) -> io::Result<usize> {
        self.file().read_at(to, from.0)
    }

    /// Writes from byte `from` on, and allocates blocks for holes. Returns the number of bytes
    /// written, which may be less than `bytes` has.
    ///
    /// # Errors
    /// The error of pwrite(2).
    fn write_at(&self, from: FileOffset, bytes: &[u8]) -> io::Result<usize> {
        self.file().write_at(bytes, from.0)
    }
}

/// A regular file. In the page cache, a page's block number is its page number in the file, since a
/// page of the page cache never moves in the file. On a DAX file system the block numbers are those
/// of the device.
pub struct FileExtents {
    file: Arc<File>,
    /// The file that the front-end maps, if it is not `file`.
    map_file: Option<Arc<File>>,
    /// The length in bytes, if the whole file counts as one extent.
    preallocated: Option<u64>,
    /// The file is on a DAX file system.
    on_device: bool,
    /// Whether each page that is no hole has a block which no other file shares. Determined at the
    /// first write grant.
    holes_tell_all: OnceLock<bool>,
}

impl FileExtents {
    /// A file whose holes are found by lseek(2), and which is allocated by write grants.
    pub fn new(file: Arc<File>) -> Self {
        let holes_tell_all = OnceLock::new();
        Self { file, map_file: None, preallocated: None, on_device: false, holes_tell_all }
    }

    /// Like [`new`](Self::new), but the front-end maps `map_file`, which shows the page cache of
    /// `file` and has a length above that of any map (a passthrough file). So the front-end maps
    /// the chunk with the file's last byte whole, and a growth inside that chunk needs no map.
    pub fn with_map_file(file: Arc<File>, map_file: Arc<File>) -> Self {
        Self { map_file: Some(map_file), ..Self::new(file) }
    }

    /// A file that counts as one extent of `bytes` bytes: the file of virtio-pmem, which was
    /// allocated when it was created, or has holes that the user accepts by `--sparse`; or a
    /// device-DAX node, which has no holes.
    pub fn preallocated(file: Arc<File>, bytes: u64) -> Self {
        Self { preallocated: Some(bytes), ..Self::new(file) }
    }

    /// The same file, on a DAX file system if `dax`: then the place of its blocks on the device
    /// decides about PMD entries (behaviour 15).
    #[must_use]
    pub fn on_device(self, dax: bool) -> Self {
        Self { on_device: dax, ..self }
    }

    /// The extent as FS_IOC_FIEMAP reports it. A page whose place on the device is not reported
    /// gets an odd block number, which no PMD entry can begin with.
    fn device_extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent> {
        let run = |pages, backed| Extent { start: page, pages, backed };
        // An odd block number is no multiple of 512 blocks, so no PMD entry begins with it.
        let odd = Block::new(page.0 | 1).map(Backed::Mapped).ok_or(Errno::EFBIG)?;
        let wanted = FileRange::new(page.byte(), pages * PAGE_BYTES);
        let piece = first_piece(&self.file, wanted)?;
        let hole = piece.map_or(pages, |piece| pages_to(page, piece.logical.from).min(pages));
        let Some(piece) = piece.filter(|_| hole == 0) else {
            // A sparse pmem file gets its blocks at the guest's stores.
            let by_store = self.preallocated.is_some() && access == Access::Write;
            return Ok(if by_store { run(1, odd) } else { run(hole, Backed::Hole) });
        };
        let within = pages_to(page, piece.logical.end()).clamp(1, pages);
        if piece.unwritten && access == Access::Read {
            return Ok(run(within, Backed::Unwritten));
        }
        let skipped = FileRange::between(piece.logical.from, page.byte()).bytes;
        let at = piece.physical.map(|at| at.saturating_add(skipped));
        match at
            .filter(|at| at.is_multiple_of(PAGE_BYTES))
            .and_then(|at| Block::new(at / PAGE_BYTES))
        {
            Some(block) => Ok(run(within, Backed::Mapped(block))),
            None => Ok(run(1, odd)),
        }
    }

    /// The first byte from `from` on that is data or a hole, as `whence` demands. The end of the
    /// file counts as a hole. None if `from` is at or behind the end, or no data follows.
    fn seek(&self, from: FileOffset, whence: Whence) -> io::Result<Option<FileOffset>> {
        match lseek(&*self.file, from.0.cast_signed(), whence) {
            Ok(at) => Ok(Some(FileOffset(at.cast_unsigned()))),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether all pages of the range inside the file are known to have blocks. This takes a tenth
    /// of the time of an fallocate, which changes the inode even if it allocates no block.
    fn has_blocks(&self, range: FileRange) -> io::Result<bool> {
        let tell_all = || {
            let found = fstatfs(&self.file).map(|found| found.filesystem_type());
            matches!(found, Ok(EXT4_SUPER_MAGIC | TMPFS_MAGIC))
        };
        if self.on_device || !self.holes_tell_all.get_or_init(tell_all) {
            return Ok(false);
        }
        match self.seek(range.from, Whence::SeekHole)? {
            Some(hole) => Ok(hole >= range.end() || hole.0 >= self.file_bytes()?),
            None => Ok(true),
        }
    }

    /// Allocates blocks for the range, and on xfs replaces blocks that are shared by reflink by
    /// blocks of the file's own (behaviour 16). Other file systems return EOPNOTSUPP for
    /// FALLOC_FL_UNSHARE_RANGE: they have no reflinks, or write each store to a new block and can't
    /// reserve space (see `persist::Backing`).
    fn fallocate_own(&self, range: FileRange) -> io::Result<()> {
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        match self.fallocate(keep | FallocateFlags::FALLOC_FL_UNSHARE_RANGE, range) {
            Err(e) if e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                self.fallocate(keep, range)
            }
            done => done,
        }
    }

    fn fallocate(&self, flags: FallocateFlags, range: FileRange) -> io::Result<()> {
        let (from, bytes) = (range.from.0.cast_signed(), range.bytes.cast_signed());
        fallocate(&*self.file, flags, from, bytes).map_err(Into::into)
    }
}

impl ExtentSource for FileExtents {
    fn file(&self) -> &Arc<File> {
        self.map_file.as_ref().unwrap_or(&self.file)
    }

    fn file_bytes(&self) -> io::Result<u64> {
        match self.preallocated {
            Some(bytes) => Ok(bytes),
            None => Ok(self.file.metadata()?.len()),
        }
    }

    fn mappable_bytes(&self, file_bytes: u64) -> u64 {
        match &self.map_file {
            Some(_) => file_bytes.next_multiple_of(PMD_BYTES),
            None => file_bytes / PAGE_BYTES * PAGE_BYTES,
        }
    }

    fn read_at(&self, from: FileOffset, to: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(to, from.0)
    }

    fn write_at(&self, from: FileOffset, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(bytes, from.0)
    }

    /// Always true: the kernel decides whether it maps 2 MiB by one entry of its page tables, and
    /// needs only the alignment from the engine.
    fn maps_pmd(&self) -> bool {
        true
    }

    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()> {
        let range = FileRange::of_pages(first, last);
        if self.preallocated.is_some() || self.has_blocks(range)? {
            return Ok(());
        }
        // Never past the end of the file: FALLOC_FL_KEEP_SIZE would allocate blocks there that no
        // read shows.
        let inside =
            FileRange::between(range.from, range.end().min(FileOffset(self.file_bytes()?)));
        if inside.is_empty() { Ok(()) } else { self.fallocate_own(inside) }
    }

    fn extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent> {
        if self.on_device {
            return self.device_extent(page, pages, access);
        }
        let run = |pages, backed| Extent { start: page, pages, backed };
        let by_place = Block::new(page.0)
            .map(Backed::Mapped)
            .ok_or_else(|| io::Error::from_raw_os_error(Errno::EFBIG as i32))?;
        if self.preallocated.is_some() || access == Access::Write {
            return Ok(run(pages, by_place));
        }
        let until = |byte: Option<FileOffset>| {
            byte.map_or(pages, |byte| pages_to(page, byte).clamp(1, pages))
        };
        match self.seek(page.byte(), Whence::SeekData)? {
            Some(data) if data < page.next().byte() => {
                let hole = self.seek(data, Whence::SeekHole)?;
                Ok(run(until(hole), by_place))
            }
            data => Ok(run(until(data), Backed::Hole)),
        }
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    fn zero(&self, range: FileRange, keep: bool) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let how = if keep {
            FallocateFlags::FALLOC_FL_ZERO_RANGE
        } else {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE
        };
        match self.fallocate(how | FallocateFlags::FALLOC_FL_KEEP_SIZE, range) {
            // tmpfs has no FALLOC_FL_ZERO_RANGE. Zeros are written, which keeps the blocks of the
            // range or allocates them.
            Err(e) if keep && e.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                let zeros = vec![0; range.bytes.min(PMD_BYTES) as usize];
                let mut at = range.from;
                while at < range.end() {
                    let n = (range.end() - at).min(PMD_BYTES);
                    self.file.write_all_at(zeros.get(..n as usize).unwrap_or(&zeros), at.0)?;
                    at = at + n;
                }
                Ok(())
            }
            done => done,
        }
    }
}

/// The number of whole pages from `page` to `byte`: 0 if `byte` is before `page`.
fn pages_to(page: PageIndex, byte: FileOffset) -> u64 {
    FileRange::between(page.byte(), byte).bytes / PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Shows: FIEMAP tells written pages, allocated pages and holes apart, and pages of a write
    /// grant keep their blocks when they are written. (Skipped, with a line on stderr, on a file
    /// system without FIEMAP.)
    #[test]
    fn a_real_file_tells_its_blocks() {
        let file = Arc::new(tempfile::tempfile_in(".").unwrap());
        file.set_len(64 * PAGE_BYTES).unwrap();
        file.write_all_at(&[1; 8 * PAGE_BYTES as usize], 16 * PAGE_BYTES).unwrap();
        file.sync_all().unwrap();
        if let Err(e) = first_piece(&file, FileRange::new(FileOffset(0), PAGE_BYTES)) {
            let text = format!(
                "SKIPPED a_real_file_tells_its_blocks: this file system has no FIEMAP: {e}"
            );
            // Not println!: the test runner captures its output.
            let _ = writeln!(io::stderr(), "{text}");
            return;
        }
        let source = FileExtents::new(file.clone()).on_device(true);
        let at = |page, access| source.extent(PageIndex(page), 64 - page, access).unwrap();
        assert_eq!((at(0, Access::Read).backed, at(0, Access::Read).pages), (Backed::Hole, 16));
        let written = at(16, Access::Read);
        let Backed::Mapped(block) = written.backed else { panic!("{written:?}") };
        let next = at(17, Access::Read);
        if written.pages > 1 {
            assert_eq!(next.backed, Backed::Mapped(Block::new(block.number() + 1).unwrap()));
        }
        source.allocate(PageIndex(32), PageIndex(39)).unwrap();
        assert_eq!(at(32, Access::Read).backed, Backed::Unwritten);
        let Backed::Mapped(promised) = at(32, Access::Write).backed else { panic!("no block") };
        file.write_all_at(&[2; PAGE_BYTES as usize], 32 * PAGE_BYTES).unwrap();
        file.sync_all().unwrap();
        assert_eq!(at(32, Access::Read).backed, Backed::Mapped(promised));
    }

    /// Shows: lseek tells data and holes of a sparse file apart, and allocated pages get blocks.
    #[test]
    fn a_real_file_tells_its_extents() {
        let file = Arc::new(tempfile::tempfile_in(".").unwrap());
        file.set_len(64 * PAGE_BYTES).unwrap();
        file.write_all_at(&[1; PAGE_BYTES as usize], 16 * PAGE_BYTES).unwrap();
        file.sync_all().unwrap();
        let source = FileExtents::new(file.clone());
        let at = |page| source.extent(PageIndex(page), 64, Access::Read).unwrap();
        assert_eq!((at(0).backed, at(0).pages), (Backed::Hole, 16));
        assert_eq!((at(16).backed, at(16).pages), (Backed::Mapped(Block::new(16).unwrap()), 1));
        assert_eq!(at(17).backed, Backed::Hole);
        let before = file.metadata().unwrap().blocks();
        source.allocate(PageIndex(16), PageIndex(19)).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() - before, 3 * 8, "the holes behind the data");
        let before = file.metadata().unwrap().blocks();
        source.allocate(PageIndex(32), PageIndex(1 << 20)).unwrap();
        assert_eq!(
            file.metadata().unwrap().len(),
            64 * PAGE_BYTES,
            "an allocation does not change the length"
        );
        assert_eq!(
            file.metadata().unwrap().blocks() - before,
            32 * 8,
            "32 pages, and none behind the end"
        );
    }
}
