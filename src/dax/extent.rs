// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: the extent source: what `iomap_begin` is in the kernel. Knows no entries.

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

/// What a grant is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Loads only. A guest's private mapping is one, too (behaviour 7).
    Read,
    /// Loads and stores.
    Write,
}

/// What backs a run of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backed {
    /// By nothing: reads as zeros.
    Hole,
    /// By blocks that read as zeros until they are written.
    Unwritten,
    /// By blocks; this is the first page's.
    Mapped(Block),
}

/// A run of pages that are backed alike, and by consecutive blocks if by any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The first page.
    pub start: PageIndex,
    /// How many pages.
    pub pages: u64,
    /// By what.
    pub backed: Backed,
}

impl Extent {
    /// Whether `pages` pages from `page` on are all in it.
    pub fn holds(&self, page: PageIndex, pages: u64) -> bool {
        page >= self.start && page - self.start + pages <= self.pages
    }

    /// The block of `page`, if the extent has blocks and `page` is in it.
    pub fn block(&self, page: PageIndex) -> Option<Block> {
        match self.backed {
            Backed::Mapped(first) if self.holds(page, 1) => {
                Block::new(first.number() + (page - self.start))
            }
            _ => None,
        }
    }
}

/// A file's extents, its length, and the means to change them.
pub trait ExtentSource: Send + Sync {
    /// The file that the window shows.
    fn file(&self) -> &Arc<File>;

    /// The file's length in bytes (`i_size`).
    ///
    /// # Errors
    /// The system's.
    fn file_bytes(&self) -> io::Result<u64>;

    /// Bytes from the start of a file of `file_bytes` that a front-end agrees to map. QEMU refuses
    /// a map that ends past the end of the file (row Q6), so by default this is the length in whole
    /// pages.
    fn mappable_bytes(&self, file_bytes: u64) -> u64 {
        file_bytes / PAGE_BYTES * PAGE_BYTES
    }

    /// Whether the backing can be mapped by 2 MiB.
    fn maps_pmd(&self) -> bool;

    /// Behaviour 16: gives every page of `first..=last` a block of its own.
    ///
    /// # Errors
    /// ENOSPC before anything is promised to the guest.
    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()>;

    /// The extent that holds `page`. It need not tell of more than `pages` pages.
    /// With [`Access::Write`] the page has been allocated, and comes back as [`Backed::Mapped`].
    ///
    /// # Errors
    /// The system's.
    fn extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent>;

    /// Makes the file longer or shorter.
    ///
    /// # Errors
    /// The system's.
    fn set_bytes(&self, bytes: u64) -> io::Result<()>;

    /// Makes a range of bytes read as zeros. With `keep` it keeps its blocks, else whole blocks of
    /// it become holes (behaviour 12).
    ///
    /// # Errors
    /// The system's.
    fn zero(&self, range: FileRange, keep: bool) -> io::Result<()>;

    /// Reads, holes as zeros. May read less than asked, and 0 bytes only at the end of the file.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&self, from: FileOffset, to: &mut [u8]) -> io::Result<usize> {
        self.file().read_at(to, from.0)
    }

    /// Writes, and gives blocks to what has none. May write less than asked, but not nothing.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&self, from: FileOffset, bytes: &[u8]) -> io::Result<usize> {
        self.file().write_at(bytes, from.0)
    }
}

/// A regular file. Mapped through the page cache its blocks are numbered by their place in the
/// file: what a page-cache page belongs to never moves. On a DAX file system they are those of the
/// device.
pub struct FileExtents {
    file: Arc<File>,
    /// What the front-end gets, if that is not the file itself.
    map_file: Option<Arc<File>>,
    /// All of it is one extent, of this many bytes.
    preallocated: Option<u64>,
    on_device: bool,
    /// What is no hole has blocks, and shares them with no other file. Asked for with the first
    /// write grant.
    holes_tell_all: OnceLock<bool>,
}

impl FileExtents {
    /// Asks the file system for holes, and allocates for write grants.
    pub fn new(file: Arc<File>) -> Self {
        let holes_tell_all = OnceLock::new();
        Self { file, map_file: None, preallocated: None, on_device: false, holes_tell_all }
    }

    /// The same, and the front-end maps `map_file`: the same page cache, as long as one may wish.
    /// The chunk with the file's last byte is then mapped whole, so that a growth needs no message.
    pub fn with_map_file(file: Arc<File>, map_file: Arc<File>) -> Self {
        Self { map_file: Some(map_file), ..Self::new(file) }
    }

    /// Takes the whole file as one extent of `bytes`: virtio-pmem's file was allocated when it was
    /// made, or its user said `--sparse` and lives with the holes; and a device-DAX node has no
    /// holes.
    pub fn preallocated(file: Arc<File>, bytes: u64) -> Self {
        Self { preallocated: Some(bytes), ..Self::new(file) }
    }

    /// The same file on a DAX file system, if `dax`: where its blocks lie on the device counts
    /// (behaviour 15).
    #[must_use]
    pub fn on_device(self, dax: bool) -> Self {
        Self { on_device: dax, ..self }
    }

    /// The extent as the file system tells it. What can't be told is no candidate for 2 MiB.
    fn device_extent(&self, page: PageIndex, pages: u64, access: Access) -> io::Result<Extent> {
        let run = |pages, backed| Extent { start: page, pages, backed };
        // No multiple of 2 MiB: not the start of a chunk's blocks.
        let odd = Block::new(page.0 | 1).map(Backed::Mapped).ok_or(Errno::EFBIG)?;
        let wanted = FileRange::new(page.byte(), pages * PAGE_BYTES);
        let piece = first_piece(&self.file, wanted)?;
        let hole = piece.map_or(pages, |piece| pages_to(page, piece.logical.from).min(pages));
        let Some(piece) = piece.filter(|_| hole == 0) else {
            // A device that was not allocated beforehand gets its blocks by the guest's stores.
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

    /// The first byte from `from` on that is data or a hole; the end of the file counts as a hole.
    fn seek(&self, from: FileOffset, whence: Whence) -> io::Result<Option<FileOffset>> {
        match lseek(&*self.file, from.0.cast_signed(), whence) {
            Ok(at) => Ok(Some(FileOffset(at.cast_unsigned()))),
            Err(Errno::ENXIO) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether the whole range, as far as it lies in the file, has blocks already. To ask costs a
    /// tenth of an fallocate, which changes the inode even where it allocates nothing.
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

    /// Blocks of its own also for what is shared by reflink (behaviour 16), where the file system
    /// knows reflinks in place (xfs). The others say EOPNOTSUPP and have nothing to unshare, or
    /// write elsewhere at each store and can promise nothing (see `persist::Backing`).
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

    /// The page cache can be mapped by 2 MiB where it has huge pages; whether it does is the
    /// kernel's choice, page by page, and needs nothing from us but the alignment.
    fn maps_pmd(&self) -> bool {
        true
    }

    fn allocate(&self, first: PageIndex, last: PageIndex) -> io::Result<()> {
        let range = FileRange::of_pages(first, last);
        if self.preallocated.is_some() || self.has_blocks(range)? {
            return Ok(());
        }
        // Never past the end of the file: KEEP_SIZE would leave blocks there that nobody sees.
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
            // tmpfs can't: then the zeros are stored. The range has its blocks, or gets them.
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

/// The number of whole pages from `page` to `byte`: 0 if it comes before.
fn pages_to(page: PageIndex, byte: FileOffset) -> u64 {
    FileRange::between(page.byte(), byte).bytes / PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// Shows: by the device's blocks: what is written, has blocks, or is a hole; and a write
    /// grant's pages have the blocks that they had. (Skipped, and said so, where the file system
    /// can't say.)
    #[test]
    fn a_real_file_tells_its_blocks() {
        let file = Arc::new(tempfile::tempfile_in(".").unwrap());
        file.set_len(64 * PAGE_BYTES).unwrap();
        file.write_all_at(&[1; 8 * PAGE_BYTES as usize], 16 * PAGE_BYTES).unwrap();
        file.sync_all().unwrap();
        if let Err(e) = first_piece(&file, FileRange::new(FileOffset(0), PAGE_BYTES)) {
            let text = format!("SKIPPED a_real_file_tells_its_blocks: no FIEMAP here: {e}");
            // Not println!: the test runner would swallow it.
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

    /// Shows: a sparse file's data and holes are told apart, and a write grant's pages get blocks.
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
            "allocating makes nothing longer"
        );
        assert_eq!(
            file.metadata().unwrap().blocks() - before,
            32 * 8,
            "32 pages, and none behind the end"
        );
    }
}
