// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! File descriptors: how many the daemon reserves for itself, so that a guest can't use the last
//! one, and a count of the guest's descriptors, so that no operation begins that would fail halfway
//! without a descriptor.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

use log::warn;
use nix::errno::Errno;
use virtiofsd::oslib::{CFileHandle, name_to_handle_at, open_by_handle_at};
use virtiofsd::passthrough::InodeFileHandlesMode;

use crate::support::fd_table;
use crate::support::lock::{Mutex, Rank, lock};
use crate::support::units::PMD_BYTES;

use super::config::FsConfig;
use super::dax::Dax;

/// Number of descriptors of the daemon itself: standard streams, the listening socket, the
/// connection and the back-end channel with their copies, signals, the private mount (5), inotify,
/// the passthrough file system (5), reads of /proc, and room for file systems mounted in the share,
/// each of which holds a descriptor if inodes are held by handles.
const OWN: u64 = 96;
/// Largest number of descriptors in one vhost-user message: vhost's MAX_ATTACHED_FD_ENTRIES. They
/// come in addition to the descriptors that they replace, which are still open.
const MESSAGE: u64 = 32;
/// Largest number of memory regions with memory slots: vhost-user-backend's MAX_MEM_SLOTS. Each
/// region holds a descriptor, also one that shows a map of the window.
const SLOT_REGIONS: u64 = 509;
/// Number of descriptors of one ring: kick, call, error, epoll, two ends of the exit event, and a
/// new kick while the old one is open.
const RING: u64 = 7;
/// Number of descriptors of a mapped file: the file, and its passthrough file.
const MAPPED_FILE: u64 = 2;
/// Number of descriptors that a running request holds and that the guest's limit does not count:
/// directories (2), a file that is looked up, a file that is created.
const REQUEST: u64 = 4;
/// Smallest useful number of descriptors for the guest's files.
const LEAST_FOR_GUEST: u64 = 64;
/// Number of the guest's descriptors that are reserved for requests that lead to free descriptors,
/// such as OPENDIR of a directory that the guest will empty.
const KEPT: u64 = 32;
/// Divisor: the guest's descriptors are counted again after this part of them was given out.
const PART: u64 = 16;

/// Number of descriptors that the daemon may need at once, without the guest's files and inodes.
///
/// | for | number |
/// |---|---|
/// | the daemon itself | 96 |
/// | a vhost-user message | 32 |
/// | memory regions, including all maps of the VM | 509, or two tables of 32 without memory slots |
/// | each ring | 7 |
/// | each slot of the window, if each maps another file | 2 |
/// | each thread that serves requests: of the pool and the rings, the watchdog | 4, and 2 for a mapped file |
pub fn reserved(config: &FsConfig) -> u64 {
    let regions = if config.mem_slots { SLOT_REGIONS } else { 2 * MESSAGE };
    let rings = 1 + u64::from(config.request_queues);
    let slots = config.window.bytes().0 / PMD_BYTES;
    // A request may map a file in place of another one, whose descriptors are still open.
    let requests = config.threads as u64 + rings + 1;
    own(config) + MESSAGE + regions + MAPPED_FILE * slots + (REQUEST + MAPPED_FILE) * requests
}

/// How many files may be mapped, or be about to be, at once.
pub fn mapped_files(config: &FsConfig) -> u64 {
    let requests = config.threads as u64 + u64::from(config.request_queues) + 2;
    config.window.bytes().0 / PMD_BYTES + requests
}

fn own(config: &FsConfig) -> u64 {
    OWN + RING * (1 + u64::from(config.request_queues))
}

/// Number of descriptors left for the guest, of a limit of `files`.
///
/// # Errors
/// A text for the user, with a limit that is enough.
pub fn left_for_guest(files: u64, config: &FsConfig) -> Result<u64, String> {
    let reserved = reserved(config);
    let left = files.checked_sub(reserved).filter(|left| *left >= LEAST_FOR_GUEST);
    left.ok_or_else(|| {
        format!(
            "--rlimit-nofile: {files} descriptors are too few: the daemon may need {reserved} \
             beside the guest's files; use more than {}, or a smaller --window-size, \
             --thread-pool-size or --num-request-queues",
            reserved + LEAST_FOR_GUEST - 1
        )
    })
}

/// For what a request needs descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// One for a looked-up inode; without it the request fails and leaves nothing behind.
    Inode,
    /// This number of descriptors, until the guest releases them.
    Keep(u64),
    /// One during the request, or one that the guest needs to free others.
    Moment,
}

/// Counts the guest's descriptors.
pub(crate) struct Descriptors {
    /// Largest number of descriptors of the guest.
    most: i64,
    /// Number of them that only [`Want::Moment`] may use.
    kept: i64,
    /// Inodes of the share's file system are held by file handles.
    by_handle: bool,
    /// File handles were configured, whether or not they can be used.
    asked_for_handles: bool,
    /// The directory `/proc/self/fd`. Since Linux 6.2 its length is the number of descriptors.
    table: Option<File>,
    /// Number of the daemon's own descriptors, as counted when the guest held none.
    own: AtomicU64,
    /// Upper bound of `own`.
    most_own: u64,
    /// Number of the VM's memory regions.
    regions: Arc<AtomicUsize>,
    dax: Option<Arc<Dax>>,
    /// Number of descriptors that may be given out before they are counted again.
    left: AtomicI64,
    /// Number of descriptors that running requests may open.
    promised: AtomicI64,
    /// Held while descriptors are counted. Whether the log has the warning of few descriptors left.
    counting: Mutex<bool>,
}

/// Permission to open descriptors. Its drop, at the end of the request, returns them to the count,
/// whether they were opened or not: open ones are counted in the table.
#[must_use]
pub(crate) struct Permit<'a> {
    descriptors: &'a Descriptors,
    count: i64,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.descriptors.promised.fetch_sub(self.count, Ordering::SeqCst);
    }
}

impl Descriptors {
    /// Creates the count of a device. `regions`: number of the VM's memory regions.
    pub(crate) fn new(config: &FsConfig, dax: Option<Arc<Dax>>, regions: Arc<AtomicUsize>) -> Self {
        let most = i64::try_from(config.guest_fds).unwrap_or(i64::MAX);
        let asked_for_handles = config.inode_file_handles != InodeFileHandlesMode::Never;
        // Without a limit nothing is counted.
        let table = fd_table::open().ok().filter(|_| most < i64::MAX);
        Self {
            most,
            kept: (config.guest_fds / 8).min(KEPT) as i64,
            by_handle: asked_for_handles && handles_work(&config.shared_dir).is_ok(),
            asked_for_handles,
            table,
            own: AtomicU64::new(0),
            most_own: own(config),
            regions,
            dax,
            left: AtomicI64::new(0),
            promised: AtomicI64::new(0),
            counting: Mutex::ranked(Rank::Counting, false),
        }
    }

    /// The guest holds no descriptor after an INIT or DESTROY: all open descriptors are the
    /// daemon's.
    pub(crate) fn guest_has_none(&self) {
        if let Some(table) = &self.table {
            let own = count(table).saturating_sub(self.not_the_guests());
            self.own.store(own.min(self.most_own), Ordering::Relaxed);
            self.left.store(0, Ordering::SeqCst);
        }
    }

    /// Number of descriptors of memory regions and mapped files.
    fn not_the_guests(&self) -> u64 {
        let files = self.dax.as_ref().map_or(0, |dax| dax.files()) as u64;
        self.regions.load(Ordering::Relaxed) as u64 + MAPPED_FILE * files
    }

    /// Permission to open descriptors, before any part of the operation is done.
    ///
    /// # Errors
    /// ENFILE if none is left.
    pub(crate) fn ask(&self, want: Want) -> io::Result<Permit<'_>> {
        let (count, kept) = match want {
            Want::Keep(count) => (count as i64, self.kept),
            Want::Inode => (1, self.kept),
            Want::Moment => (1, 0),
        };
        // First added to `promised`, then subtracted from `left`: a thread that counts in between
        // sees at least one of the two.
        self.promised.fetch_add(count, Ordering::SeqCst);
        let permit = Permit { descriptors: self, count };
        let Some(table) = &self.table else { return Ok(permit) };
        let left = self.left.fetch_sub(count, Ordering::SeqCst) - count;
        let given = left >= kept || self.recount(table) >= kept;
        // The result is not used for inodes held by handles. It is still counted: another file
        // system in the share may have no handles, and hold descriptors.
        let given = given || (self.by_handle && want == Want::Inode);
        if given { Ok(permit) } else { Err(Errno::ENFILE.into()) }
    }

    /// Counts again. Returns the number of descriptors left, without the promised ones.
    fn recount(&self, table: &File) -> i64 {
        let mut warned = lock(&self.counting);
        let before = self.left.load(Ordering::SeqCst);
        // `promised` is read before the table: a descriptor opened in between counts twice. In the
        // opposite order it would not count at all.
        let promised = self.promised.load(Ordering::SeqCst);
        let own = self.own.load(Ordering::Relaxed) + self.not_the_guests();
        let used = count(table).saturating_sub(own) as i64;
        let left = self.most - used - promised;
        if used >= self.most / 5 * 4 && !std::mem::replace(&mut *warned, true) {
            self.warn(used);
        }
        // Bounded, so that the next count is not late for the warning.
        let now = left.min((self.most / PART as i64).max(KEPT as i64));
        // Added, not stored: another thread in ask() may have subtracted since `before` was read.
        self.left.fetch_add(now - before, Ordering::SeqCst);
        left
    }

    fn warn(&self, used: i64) {
        let most = self.most;
        let instead = match (self.by_handle, self.asked_for_handles) {
            (true, _) => "",
            (false, false) => {
                ", or use --inode-file-handles=prefer, which holds a descriptor for open files only"
            }
            (false, true) => {
                ", or let inodes be held by file handles: that needs CAP_DAC_READ_SEARCH, and a \
                 file system with file handles"
            }
        };
        warn!(
            "the guest has {used} of the {most} descriptors that it may have; at the limit it can \
             open and create no files (ENFILE): raise --rlimit-nofile{instead}"
        );
    }
}

/// Whether the file system of `dir` has file handles and the daemon may open them, tested as
/// virtiofsd does.
///
/// # Errors
/// Those of name_to_handle_at(2) and open_by_handle_at(2).
pub(crate) fn handles_work(dir: &Path) -> io::Result<()> {
    let (dir, mut handle, mut mount) = (File::open(dir)?, CFileHandle::default(), 0);
    name_to_handle_at(&dir, c"", &mut handle, &mut mount, libc::AT_EMPTY_PATH)?;
    open_by_handle_at(&dir, &handle, libc::O_PATH).map(drop)
}

/// Number of open descriptors of the process.
fn count(table: &File) -> u64 {
    let length = table.metadata().map_or(0, |table| table.len());
    if length > 0 { length } else { fd_table::numbers().map_or(0, |all| all.len() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::config::WindowSize;

    fn config(window: &str, threads: usize) -> FsConfig {
        let window: WindowSize = window.parse().unwrap();
        FsConfig { threads, ..FsConfig::new("/".into(), "t".parse().unwrap(), window) }
    }

    /// Shows: a larger window, more threads and more rings need more descriptors; the error for a
    /// limit that is too low names one that is enough.
    #[test]
    fn what_is_reserved() {
        let small = config("64M", 4);
        let by = |config: &FsConfig| reserved(config) - reserved(&small);
        assert_eq!(by(&config("66M", 4)), 2);
        assert_eq!(by(&config("64M", 5)), 6);
        assert_eq!(by(&FsConfig { request_queues: 2, ..small.clone() }), 7 + 6);
        let line = left_for_guest(500, &small).unwrap_err();
        let enough: u64 =
            line.split_whitespace().find_map(|w| w.strip_suffix(',')?.parse().ok()).unwrap();
        assert!(left_for_guest(enough, &small).is_err());
        assert_eq!(left_for_guest(enough + 1, &small), Ok(LEAST_FOR_GUEST));
    }

    fn limited(most: u64) -> Descriptors {
        let config = FsConfig { guest_fds: most, ..config("0", 4) };
        let descriptors = Descriptors::new(&config, None, Arc::default());
        // Other tests of this process open files, too.
        descriptors.own.store(0, Ordering::Relaxed);
        descriptors
    }

    /// Shows: permissions are given while a descriptor is left beside the promised ones; the last
    /// ones are given only for a moment; a permission counts no more when its request ends.
    #[test]
    fn permits_are_given_while_descriptors_are_left() {
        let descriptors = limited(1000);
        let mut given = Vec::new();
        while let Ok(permit) = descriptors.ask(Want::Keep(2)) {
            given.push(permit);
        }
        let used = count(descriptors.table.as_ref().unwrap());
        assert!(given.len() as u64 * 2 + used <= 1000 + 64, "{} given, {used} used", given.len());
        assert!(given.len() > 200, "{} given", given.len());
        drop(descriptors.ask(Want::Moment).unwrap());
        given.truncate(10);
        drop(descriptors.ask(Want::Keep(2)).unwrap());
        let none = limited(1);
        assert!(none.ask(Want::Keep(1)).is_err() && none.ask(Want::Moment).is_err());
        let without = limited(u64::MAX);
        assert!(without.ask(Want::Keep(1 << 40)).is_ok());
    }
}
