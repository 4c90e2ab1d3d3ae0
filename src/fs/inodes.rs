// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counts the inodes that the guest knows, and limits their number. virtiofsd's file system keeps
//! each inode in memory until the guest forgets it, and a hostile guest forgets none. Knows no
//! file.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::read_to_string;
use std::io;
use std::path::Path;
use std::sync::OnceLock;

use log::{debug, warn};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use crate::support::lock::{Mutex, lock};
use crate::support::size::Size;

/// Divisor: this part of the daemon's memory may be used for the guest's inodes. One eighth. (A
/// Linux guest needs more memory for an inode than the daemon, so a guest with at most 1/8 of the
/// host's memory does not reach the limit.)
const PART: u64 = 8;

/// Memory of the daemon for one inode, in bytes: 640 in virtiofsd's file system (measured with file
/// handles, the most expensive case), and 64 here.
const INODE_BYTES: u64 = 704;

/// Smallest limit, in inodes.
const LEAST: u64 = 1 << 12;

/// Assumed size of the host's memory, in bytes, if /proc/meminfo can't be read.
const UNKNOWN_BYTES: u64 = 1 << 30;

#[derive(Default)]
struct Known {
    /// Number of look-ups of each inode that the guest has not forgotten.
    lookups: HashMap<u64, u64>,
    /// Number of inodes for which room is reserved.
    reserved: usize,
    warned: bool,
}

/// The inodes that the guest knows.
pub(crate) struct Inodes {
    /// A leaf: no other lock is taken under it.
    known: Mutex<Known>,
    /// Largest number of inodes.
    most: usize,
}

/// Reserved room for one inode that a request is about to create.
pub(crate) struct Room<'a>(&'a Inodes);

impl Drop for Room<'_> {
    fn drop(&mut self) {
        lock(&self.0.known).reserved -= 1;
    }
}

impl Default for Inodes {
    fn default() -> Self {
        Self::new(memory_bytes() / PART / INODE_BYTES)
    }
}

impl Inodes {
    fn new(most: u64) -> Self {
        let most = usize::try_from(most.max(LEAST)).unwrap_or(usize::MAX);
        debug!("the guest may know {most} inodes");
        Self { known: Mutex::default(), most }
    }

    /// Reserves room for one more inode.
    ///
    /// # Errors
    /// ENFILE at the limit.
    pub(crate) fn reserve(&self) -> io::Result<Room<'_>> {
        let mut known = lock(&self.known);
        self.check(&known)?;
        known.reserved += 1;
        Ok(Room(self))
    }

    /// Counts a look-up that the reply will report to the guest. Room for a new inode is taken from
    /// `room`, or from the unreserved rest.
    ///
    /// # Errors
    /// ENFILE for a new inode at the limit.
    pub(crate) fn count(&self, nodeid: u64, room: Option<Room<'_>>) -> io::Result<()> {
        let mut known = lock(&self.known);
        if room.is_none() && !known.lookups.contains_key(&nodeid) {
            self.check(&known)?;
        }
        let lookups = known.lookups.entry(nodeid).or_default();
        *lookups = lookups.saturating_add(1);
        let due = !known.warned && known.lookups.len() >= self.most / 5 * 4;
        known.warned |= due;
        drop(known); // Before `room`, whose drop takes the lock.
        if due {
            self.warn();
        }
        Ok(())
    }

    fn check(&self, known: &Known) -> io::Result<()> {
        let is_full = known.lookups.len() + known.reserved >= self.most;
        if is_full { Err(Errno::ENFILE.into()) } else { Ok(()) }
    }

    fn warn(&self) {
        warn!(
            "the guest knows 80 % of the {} inodes that it may know, which need 1/{PART} of the \
             daemon's memory ({}); at 100 % look-ups and new files fail with ENFILE: 'echo 2 > \
             /proc/sys/vm/drop_caches' in the guest makes it forget unused inodes",
            self.most,
            Size(memory_bytes())
        );
    }

    /// The guest has forgotten `count` look-ups of an inode.
    pub(crate) fn forget(&self, nodeid: u64, count: u64) {
        let mut known = lock(&self.known);
        if let Entry::Occupied(mut lookups) = known.lookups.entry(nodeid) {
            let left = lookups.get().saturating_sub(count);
            match left {
                0 => drop(lookups.remove()),
                _ => *lookups.get_mut() = left,
            }
        }
    }

    /// The guest has unmounted: it knows no inode.
    pub(crate) fn clear(&self) {
        lock(&self.known).lookups = HashMap::new();
    }
}

/// Size of the daemon's memory, in bytes: the host's, or the smallest limit of the process and its
/// control groups. Read once: a sandboxed process sees neither /proc/meminfo nor the control groups.
/// Called before the process is sandboxed.
pub(crate) fn memory_bytes() -> u64 {
    static BYTES: OnceLock<u64> = OnceLock::new();
    *BYTES.get_or_init(read_memory_bytes)
}

fn read_memory_bytes() -> u64 {
    let limit = |of| getrlimit(of).map_or(u64::MAX, |(soft, _)| soft);
    let limits = limit(Resource::RLIMIT_DATA).min(limit(Resource::RLIMIT_AS));
    host_bytes().unwrap_or(UNKNOWN_BYTES).min(limits).min(cgroup_bytes().unwrap_or(u64::MAX))
}

fn host_bytes() -> Option<u64> {
    let text = read_to_string("/proc/meminfo").ok()?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = total.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

/// Smallest `memory.max` of the process's control group and its ancestors, in bytes. None without a
/// limit.
fn cgroup_bytes() -> Option<u64> {
    let root = Path::new("/sys/fs/cgroup");
    let groups = read_to_string("/proc/self/cgroup").ok()?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let group = root.join(group);
    let up = group.ancestors().take_while(|group| group.starts_with(root));
    up.filter_map(|group| read_to_string(group.join("memory.max")).ok()?.trim().parse().ok()).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> (Inodes, u64) {
        let inodes = Inodes::new(0);
        (2..).take(inodes.most).for_each(|nodeid| inodes.count(nodeid, None).unwrap());
        let next = 2 + inodes.most as u64;
        (inodes, next)
    }

    /// Shows: at the limit a look-up of a new inode is refused and one of a known inode is not; an
    /// inode frees its room when all its look-ups are forgotten.
    #[test]
    fn the_limit() {
        let (inodes, next) = full();
        assert!(inodes.count(next, None).is_err() && inodes.reserve().is_err());
        inodes.count(2, None).unwrap();
        inodes.forget(2, 1);
        assert!(inodes.count(next, None).is_err());
        inodes.forget(2, u64::MAX);
        inodes.count(next, None).unwrap();
        assert!(inodes.count(2, None).is_err());
        inodes.clear();
        inodes.count(2, None).unwrap();
    }

    /// Shows: other look-ups can't take reserved room, and unused room is returned.
    #[test]
    fn room_is_reserved() {
        let (inodes, next) = full();
        inodes.forget(2, 1);
        let room = inodes.reserve().unwrap();
        assert!(inodes.count(next, None).is_err() && inodes.reserve().is_err());
        drop(room);
        let room = inodes.reserve().unwrap();
        inodes.count(next, Some(room)).unwrap();
        assert!(inodes.reserve().is_err());
        assert_eq!(lock(&inodes.known).reserved, 0);
    }

    /// Shows: the size of this host's memory is found.
    #[test]
    fn memory() {
        assert!(memory_bytes() > 1 << 24, "{}", memory_bytes());
    }
}
