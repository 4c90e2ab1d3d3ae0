// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors: how many the daemon keeps for itself, so that no guest can take the last one, and a
//! count of the guest's own, so that what can't be finished for want of one is not begun.

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

/// Standard streams, the listening socket, the connection and the back-end channel with their
/// copies, signals, the private mount (5), inotify, the file system's own (5), a look at /proc, and
/// room for mounts in the share, each of which holds one where inodes are held by handles.
const OWN: u64 = 96;
/// vhost's MAX_ATTACHED_FD_ENTRIES: what one message may bring, while what it replaces is still
/// held.
const MESSAGE: u64 = 32;
/// vhost-user-backend's MAX_MEM_SLOTS: each memory region holds one, maps that come back among
/// them.
const SLOT_REGIONS: u64 = 509;
/// Kick, call and error, the epoll instance, the two ends of the exit event, and a kick being
/// replaced.
const RING: u64 = 7;
/// A file that is mapped, and the one that claims to be longer.
const MAPPED_FILE: u64 = 2;
/// What one request holds while it runs, and no limit of the guest's counts: directories (2), a
/// file that is looked up, one that is made.
const REQUEST: u64 = 4;
/// Fewer than these for the guest's files are of no use.
const LEAST_FOR_GUEST: u64 = 64;
/// Number of the guest's descriptors that are kept for requests by which it frees descriptors, such
/// as OPENDIR of a directory that is to be emptied.
const KEPT: u64 = 32;
/// The guest's descriptors are counted anew when this part of them may have been taken.
const PART: u64 = 16;

/// How many descriptors may be needed at once for anything but the guest's files and inodes.
///
/// | for | how many |
/// |---|---|
/// | the daemon itself | 96 |
/// | a message in flight | 32 |
/// | memory regions, all maps of the VM among them | 509, or two tables of 32 without memory slots |
/// | each ring | 7 |
/// | each slot of the window, of another file each | 2 |
/// | each request that is served: by the pool, the rings' threads and the relief | 4 |
pub fn reserved(config: &FsConfig) -> u64 {
    let regions = if config.mem_slots { SLOT_REGIONS } else { 2 * MESSAGE };
    let rings = 1 + u64::from(config.request_queues);
    let slots = config.window.bytes().0 / PMD_BYTES;
    // One more of each for a file that takes another one's place.
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

/// How many of `files` descriptors are left for the guest.
///
/// # Errors
/// A line that says what would do.
pub fn left_for_guest(files: u64, config: &FsConfig) -> Result<u64, String> {
    let reserved = reserved(config);
    let left = files.checked_sub(reserved).filter(|left| *left >= LEAST_FOR_GUEST);
    left.ok_or_else(|| {
        format!(
            "--rlimit-nofile: {files} descriptors are too few: {reserved} may be needed beside the guest's \
             files; take more than {}, or a smaller --window-size, --thread-pool-size or \
             --num-request-queues",
            reserved + LEAST_FOR_GUEST - 1
        )
    })
}

/// What a request wants a descriptor for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// One for an inode, and nothing is begun that could stay half done.
    Inode,
    /// This number of descriptors, for as long as the guest likes.
    Keep(u64),
    /// One that is needed for a moment, or to get rid of others.
    Moment,
}

/// The guest's descriptors.
pub(crate) struct Descriptors {
    most: i64,
    kept: i64,
    /// Inodes of the share's file system are held by file handles.
    by_handle: bool,
    asked_for_handles: bool,
    /// Tells how many there are: its length is their number, since Linux 6.2.
    table: Option<File>,
    /// Those of the daemon itself.
    own: AtomicU64,
    most_own: u64,
    /// Memory regions.
    regions: Arc<AtomicUsize>,
    dax: Option<Arc<Dax>>,
    /// How many may be taken before they are counted anew.
    left: AtomicI64,
    /// What running requests were allowed to take.
    promised: AtomicI64,
    /// Held by who counts: whether it was said that there are few left.
    counting: Mutex<bool>,
}

/// Leave to take descriptors; given back, taken or not, when the request is done.
#[must_use]
pub(crate) struct Leave<'a> {
    descriptors: &'a Descriptors,
    count: i64,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.descriptors.promised.fetch_sub(self.count, Ordering::SeqCst);
    }
}

impl Descriptors {
    /// Of a device whose memory regions are counted in `regions`.
    pub(crate) fn new(config: &FsConfig, dax: Option<Arc<Dax>>, regions: Arc<AtomicUsize>) -> Self {
        let most = i64::try_from(config.guest_fds).unwrap_or(i64::MAX);
        let asked_for_handles = config.inode_file_handles != InodeFileHandlesMode::Never;
        // Without a limit there is nothing to count.
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

    /// The guest has begun anew and holds nothing: what is open now is the daemon's.
    pub(crate) fn guest_has_none(&self) {
        if let Some(table) = &self.table {
            let own = count(table).saturating_sub(self.not_the_guests());
            self.own.store(own.min(self.most_own), Ordering::Relaxed);
            self.left.store(0, Ordering::SeqCst);
        }
    }

    /// Regions and mapped files.
    fn not_the_guests(&self) -> u64 {
        let files = self.dax.as_ref().map_or(0, |dax| dax.files()) as u64;
        self.regions.load(Ordering::Relaxed) as u64 + MAPPED_FILE * files
    }

    /// Leave to take descriptors. Only with it is anything begun that must not be left half done.
    ///
    /// # Errors
    /// ENFILE.
    pub(crate) fn ask(&self, want: Want) -> io::Result<Leave<'_>> {
        let (count, kept) = match want {
            Want::Keep(count) => (count as i64, self.kept),
            Want::Inode => (1, self.kept),
            Want::Moment => (1, 0),
        };
        // Promised first, and taken off what is left then: whoever counts meanwhile sees one or
        // both.
        self.promised.fetch_add(count, Ordering::SeqCst);
        let leave = Leave { descriptors: self, count };
        let Some(table) = &self.table else { return Ok(leave) };
        let left = self.left.fetch_sub(count, Ordering::SeqCst) - count;
        let given = left >= kept || self.count_anew(table) >= kept;
        // Counted all the same: some file system in the share may have no handles.
        let given = given || (self.by_handle && want == Want::Inode);
        if given { Ok(leave) } else { Err(Errno::ENFILE.into()) }
    }

    /// How many are left beside those that are promised.
    fn count_anew(&self, table: &File) -> i64 {
        let mut said = lock(&self.counting);
        let before = self.left.load(Ordering::SeqCst);
        // In this order: what is opened in between counts twice, and not at all in the other one.
        let promised = self.promised.load(Ordering::SeqCst);
        let own = self.own.load(Ordering::Relaxed) + self.not_the_guests();
        let used = count(table).saturating_sub(own) as i64;
        let left = self.most - used - promised;
        if used >= self.most / 5 * 4 && !std::mem::replace(&mut *said, true) {
            self.warn(used);
        }
        // Never far ahead, so that the warning comes when it is due.
        let now = left.min((self.most / PART as i64).max(KEPT as i64));
        // Not stored: others may have taken off it since.
        self.left.fetch_add(now - before, Ordering::SeqCst);
        left
    }

    fn warn(&self, used: i64) {
        let most = self.most;
        let instead = match (self.by_handle, self.asked_for_handles) {
            (true, _) => "",
            (false, false) => {
                ", or take --inode-file-handles=prefer, which holds none for a file that is not open"
            }
            (false, true) => {
                ", or have inodes held by file handles: that wants CAP_DAC_READ_SEARCH, and a file system \
                 that has them"
            }
        };
        warn!(
            "the guest has {used} of the {most} descriptors that it may have; without more it can open and \
             make no files soon (ENFILE): raise --rlimit-nofile{instead}"
        );
    }
}

/// Whether the file system has file handles, and we may open them: as the library finds out.
///
/// # Errors
/// The system's, where not.
pub(crate) fn handles_work(dir: &Path) -> io::Result<()> {
    let (dir, mut handle, mut mount) = (File::open(dir)?, CFileHandle::default(), 0);
    name_to_handle_at(&dir, c"", &mut handle, &mut mount, libc::AT_EMPTY_PATH)?;
    open_by_handle_at(&dir, &handle, libc::O_PATH).map(drop)
}

/// How many descriptors the process has.
fn count(table: &File) -> u64 {
    let told = table.metadata().map_or(0, |table| table.len());
    if told > 0 { told } else { fd_table::numbers().map_or(0, |all| all.len() as u64) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fs::config::WindowSize;

    fn config(window: &str, threads: usize) -> FsConfig {
        let window: WindowSize = window.parse().unwrap();
        FsConfig { threads, ..FsConfig::new("/".into(), "t".parse().unwrap(), window) }
    }

    /// Shows: a larger window, more threads and more rings want more; what is too few names a
    /// number that will do.
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
        // Tests beside us open files, too.
        descriptors.own.store(0, Ordering::Relaxed);
        descriptors
    }

    /// Shows: leave is given as long as there is one left beside what others were promised, the
    /// last ones only for a moment; and it counts no more when the request is done.
    #[test]
    fn leave_is_given_while_there_is_any() {
        let descriptors = limited(1000);
        let mut given = Vec::new();
        while let Ok(leave) = descriptors.ask(Want::Keep(2)) {
            given.push(leave);
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
