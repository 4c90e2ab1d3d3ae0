// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The strict front-end's machine: memory regions, the window, and QEMU's rules about them.
//!
//! Q1 to Q13 are the rules in docs/front-ends.md, observed with QEMU 11.1. Where QEMU crashes,
//! aborts or hangs, a violation is recorded and fails the test; where QEMU refuses a request, this
//! machine refuses it, too.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserMMap};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{Error as VhostError, VhostBackend};
use vhost_user_dax::persist::DaxNode;
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory, VolatileSlice};

use crate::watchdog::Watchdog;

/// Limit on the number of regions: VHOST_USER_MAX_RAM_SLOTS of QEMU's hw/virtio/vhost-user.c.
pub const MAX_REGIONS: usize = 512;
/// Limit on the number of regions of one SET_MEM_TABLE: VHOST_MEMORY_BASELINE_NREGIONS.
pub const BASELINE_REGIONS: usize = 8;
/// The guest address of BAR 4.
pub const WINDOW_ADDRESS: u64 = 0x40_0000_0000;

/// A region of guest memory, as memory messages describe it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub guest: u64,
    pub bytes: u64,
    pub host: u64,
    pub fd_offset: u64,
    pub fd: RawFd,
}

impl Region {
    fn info(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: self.guest,
            memory_size: self.bytes,
            userspace_addr: self.host,
            mmap_offset: self.fd_offset,
            mmap_handle: self.fd,
        }
    }
}

/// The effect of one SHMEM_MAP: a real map of the back-end's file.
struct LiveMap {
    at: u64,
    bytes: u64,
    fd_offset: u64,
    file: File,
    map: MmapRegion<()>,
}

impl LiveMap {
    fn region(&self) -> Region {
        Region {
            guest: WINDOW_ADDRESS + self.at,
            bytes: self.bytes,
            host: self.map.as_ptr() as u64,
            fd_offset: self.fd_offset,
            fd: self.file.as_raw_fd(),
        }
    }
}

/// Why a message to the back-end has failed.
#[derive(Debug, PartialEq, Eq)]
pub enum CallError {
    /// The back-end did not reply in time; the connection was shut down.
    Deadlock,
    /// The back-end replied with an error, or has disconnected.
    Failed(String),
}

/// Deviations from QEMU's usual behaviour that a test can switch on.
#[derive(Default)]
pub(super) struct Misbehaviour {
    /// Fail every SHMEM_MAP.
    pub refuse_maps: bool,
    /// Omit live maps from the memory table at a start (as with a stale table).
    pub hide_maps_at_start: bool,
    /// Omit RAM region 0, in which the rings are, from every memory table.
    pub hide_rings: bool,
    /// Send the complete memory table again just before a map is refused for overlap.
    pub tell_before_refusing: bool,
    /// Do not read the back-end channel.
    pub deaf: bool,
    /// Read a SHMEM_MAP, and neither do it nor answer it while this is true.
    pub hang_in_map: bool,
    /// Q12: the start follows the reset so soon that the regions freed by the reset still exist.
    pub start_at_once: bool,
    /// With `start_at_once`: that start sends no memory message, so the back-end is not notified of
    /// the unmapped regions before the next map.
    pub start_untold: bool,
    /// Keep the maps at a reset, as crosvm does.
    pub keep_maps: bool,
    /// Number of bytes by which the guest has moved the BAR.
    pub moved: u64,
}

pub(super) struct Machine {
    pub frontend: Frontend,
    pub watchdog: Watchdog,
    pub reply_deadline: Duration,
    pub misbehaviour: Misbehaviour,
    pub slots: bool,
    pub window_bytes: u64,
    pub started: bool,
    /// A request was in the channel when the stop was over.
    pub in_flight: bool,
    pub map_requests: usize,
    pub unmap_requests: usize,
    /// Number of requests that this front-end does not know, and has skipped.
    pub unknown_requests: usize,
    /// Time spent on requests of the back-end, up to their replies.
    pub spent: Duration,
    /// The largest number of regions so far: live maps and RAM regions.
    pub most_regions: usize,
    pub table_updates: usize,
    /// Number of memory messages so far. With CONFIGURE_MEM_SLOTS an update sends one message per
    /// added or removed region.
    pub memory_messages: usize,
    pub refused: Vec<String>,
    pub violations: Vec<String>,
    ram: Vec<Region>,
    live: Vec<LiveMap>,
    sent: Vec<Region>,
    sent_freed_region: bool,
}

impl Machine {
    pub fn new(frontend: Frontend, watchdog: Watchdog, limit: Duration, ram: Vec<Region>) -> Self {
        Self {
            frontend,
            watchdog,
            reply_deadline: limit,
            misbehaviour: Misbehaviour::default(),
            slots: false,
            window_bytes: 0,
            started: false,
            in_flight: false,
            map_requests: 0,
            unmap_requests: 0,
            unknown_requests: 0,
            spent: Duration::ZERO,
            most_regions: 0,
            table_updates: 0,
            memory_messages: 0,
            refused: Vec::new(),
            violations: Vec::new(),
            ram,
            live: Vec::new(),
            sent: Vec::new(),
            sent_freed_region: false,
        }
    }

    pub fn live_maps(&self) -> usize {
        self.live.len()
    }

    /// All regions in the order of their guest addresses, as in QEMU's flat view; RAM comes first.
    pub fn regions(&self) -> Vec<Region> {
        let ram = self.ram.iter().skip(usize::from(self.misbehaviour.hide_rings)).copied();
        let mut regions: Vec<_> = ram
            .chain(self.live.iter().map(|live| {
                let mut region = live.region();
                region.guest += self.misbehaviour.moved;
                region
            }))
            .collect();
        regions.sort_by_key(|region| region.guest);
        regions
    }

    fn violation(&mut self, row: &str, what: &str) {
        self.violations.push(format!("{row}: {what}"));
    }

    pub fn refuse(&mut self, row: &str, what: &str, errno: i32) -> io::Result<u64> {
        self.refused.push(format!("{row}: {what}"));
        Err(io::Error::from_raw_os_error(errno))
    }

    // --- messages on the main connection ---

    /// Sends one message. A missing reply is the deadlock of Q3: QEMU would hang with its lock
    /// held.
    pub fn call<T>(
        &mut self,
        what: &str,
        need_reply: bool,
        message: impl FnOnce(&mut Frontend) -> Result<T, VhostError>,
    ) -> Result<T, CallError> {
        let reply = VhostUserHeaderFlag::NEED_REPLY;
        let flags = if need_reply { reply } else { VhostUserHeaderFlag::empty() };
        self.frontend.set_hdr_flags(flags);
        let mut frontend = self.frontend.clone();
        match self.watchdog.guard(self.reply_deadline, || message(&mut frontend)) {
            Some(result) => result.map_err(|e| CallError::Failed(format!("{what}: {e:?}"))),
            None => {
                self.violation("Q3", &format!("deadlock: {what} was not answered"));
                Err(CallError::Deadlock)
            }
        }
    }

    fn send_table(&mut self, regions: &[Region]) -> Result<(), CallError> {
        let infos: Vec<_> = regions.iter().map(Region::info).collect();
        self.table_updates += 1;
        self.memory_messages += 1;
        self.call("SET_MEM_TABLE", true, |f| f.set_mem_table(&infos).map(drop))
    }

    /// Sends a memory update: with CONFIGURE_MEM_SLOTS the differences, else the whole table.
    /// Without CONFIGURE_MEM_SLOTS more than 8 regions can't be sent: QEMU prints two error lines,
    /// and the back-end's table becomes stale.
    pub fn send_regions(&mut self) -> Result<(), CallError> {
        let now = self.regions();
        if !self.slots {
            return if now.len() <= BASELINE_REGIONS { self.send_table(&now) } else { Ok(()) };
        }
        let before = std::mem::take(&mut self.sent);
        for gone in before.iter().filter(|r| !now.contains(r)) {
            self.memory_messages += 1;
            self.call("REM_MEM_REG", true, |f| f.remove_mem_region(&gone.info()))?;
        }
        for new in now.iter().filter(|r| !before.contains(r)) {
            self.memory_messages += 1;
            self.call("ADD_MEM_REG", true, |f| f.add_mem_region(&new.info()).map(drop))?;
        }
        self.table_updates += 1;
        self.sent = now;
        Ok(())
    }

    /// Sends the memory update of a start. `Err(105)` is QEMU's `Error starting vhost-user-base:
    /// 105` (Q13).
    pub fn send_regions_at_start(&mut self) -> Result<(), i32> {
        if self.sent_freed_region && !self.misbehaviour.start_at_once {
            self.violation("Q12", "QEMU would segfault: it removes a region that the reset freed");
            return Err(libc::EFAULT);
        }
        self.sent_freed_region = false;
        let mut regions = self.regions();
        if !self.slots && regions.len() > BASELINE_REGIONS {
            return Err(libc::ENOBUFS);
        }
        if self.misbehaviour.hide_maps_at_start {
            regions.truncate(self.ram.len());
            return self.send_table(&regions).map_err(|_| libc::EPROTO);
        }
        if self.misbehaviour.start_untold {
            return Ok(());
        }
        self.send_regions().map_err(|_| libc::EPROTO)
    }

    /// A virtio reset: drops the maps, without a message to the back-end (Q10).
    pub fn drop_maps(&mut self) {
        if self.misbehaviour.keep_maps {
            return;
        }
        // Q12: with CONFIGURE_MEM_SLOTS QEMU keeps pointers to the regions that it has sent.
        self.sent_freed_region |= self.slots && !self.live.is_empty();
        self.live.clear();
    }

    // --- requests on the back-end channel ---

    fn may_serve(&mut self, what: &str) -> io::Result<()> {
        if self.started {
            return Ok(());
        }
        let in_flight = std::mem::take(&mut self.in_flight);
        let how = if in_flight { ", sent before the stop was over" } else { "" };
        let text = format!("QEMU would segfault: {what} while the device is not started{how}");
        self.violation("Q1", &text);
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn in_window(&self, req: &VhostUserMMap) -> bool {
        let end = { req.shm_offset }.checked_add(req.len);
        req.shmid == 0 && req.len > 0 && end.is_some_and(|end| end <= self.window_bytes)
    }

    /// SHMEM_MAP.
    pub fn map(&mut self, req: &VhostUserMMap, mut file: File) -> io::Result<u64> {
        self.map_requests += 1;
        self.may_serve("SHMEM_MAP")?;
        if self.misbehaviour.refuse_maps {
            return self.refuse("test", "refuse_maps is set", libc::EIO);
        }
        if !self.in_window(req) {
            return self.refuse("Q5", "Bad offset/len for mmap", libc::EINVAL);
        }
        let (at, bytes, fd_offset) = (req.shm_offset, req.len, req.fd_offset);
        if self.live.iter().any(|m| at < m.at + m.bytes && m.at < at + bytes) {
            if self.misbehaviour.tell_before_refusing {
                let _ = self.send_regions();
            }
            return self.refuse("Q4", "VIRTIO Shared Memory mapping overlap", libc::EEXIST);
        }
        let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
        // Q7: QEMU ignores the message's flag, and always maps for writing.
        if flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return self.refuse(
                "Q8",
                "unable to map backing store: Permission denied",
                libc::EACCES,
            );
        }
        // By the same calls as QEMU: lseek(2) of a FUSE inode may return another size than its
        // backing file has, and the size of a device-DAX node is read from sysfs.
        let size = match DaxNode::of(&file)? {
            Some(node) => node.bytes,
            None => file.seek(SeekFrom::End(0))?,
        };
        if size <= fd_offset {
            // QEMU does the map, and extends the file if it is empty. The daemon must never cause
            // that.
            self.violation("Q6", &format!("map from {fd_offset} of a file of {size} bytes"));
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if size < fd_offset.saturating_add(bytes) {
            return self.refuse("Q6", "backing store size is too small", libc::EINVAL);
        }
        if self.ram.len() + self.live.len() + 1 > MAX_REGIONS {
            self.violation("Q2", "QEMU would abort: nregions <= VHOST_USER_MAX_RAM_SLOTS");
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let backing = FileOffset::new(file.try_clone()?, fd_offset);
        let map = MmapRegion::from_file(backing, bytes as usize).map_err(io::Error::other)?;
        self.live.push(LiveMap { at, bytes, fd_offset, file, map });
        self.most_regions = self.most_regions.max(self.ram.len() + self.live.len());
        self.update_before_ack()
    }

    /// SHMEM_UNMAP.
    pub fn unmap(&mut self, req: &VhostUserMMap) -> io::Result<u64> {
        self.unmap_requests += 1;
        self.may_serve("SHMEM_UNMAP")?;
        if !self.in_window(req) {
            return self.refuse("Q5", "Bad offset/len for unmap", libc::EINVAL);
        }
        let (at, bytes) = (req.shm_offset, req.len);
        let Some(i) = self.live.iter().position(|m| m.at == at && m.bytes == bytes) else {
            return self.refuse("Q5", "Shared memory mapping not found", libc::ENOENT);
        };
        let gone = self.live.remove(i);
        let result = self.update_before_ack();
        drop(gone);
        result
    }

    /// Q3: sends the memory update and waits for its reply, before the ack.
    fn update_before_ack(&mut self) -> io::Result<u64> {
        match self.send_regions() {
            Ok(()) => Ok(0),
            Err(e) => Err(io::Error::other(format!("{e:?}"))),
        }
    }

    // --- the guest's view of the window ---

    /// The map that covers window offset `at`, the offset in that map, and the number of bytes from
    /// there to the end of the map.
    fn mapped(&self, at: u64) -> Option<(&LiveMap, usize, usize)> {
        let live = self.live.iter().find(|m| m.at <= at && at < m.at + m.bytes)?;
        Some((live, (at - live.at) as usize, (live.at + live.bytes - at) as usize))
    }

    /// Stores to the window; false if a byte is not mapped (the guest's store is lost).
    pub fn store(&self, at: u64, bytes: &[u8]) -> bool {
        let mut done = 0;
        while done < bytes.len() {
            let Some((live, offset, left)) = self.mapped(at + done as u64) else { return false };
            let part = left.min(bytes.len() - done);
            live.map.get_slice(offset, part).unwrap().copy_from(&bytes[done..done + part]);
            done += part;
        }
        true
    }

    /// Loads from the window; `None` if a byte is not mapped.
    pub fn fetch(&self, at: u64, bytes: usize) -> Option<Vec<u8>> {
        let mut buffer = vec![0u8; bytes];
        let mut done = 0;
        while done < bytes {
            let (live, offset, left) = self.mapped(at + done as u64)?;
            let part = left.min(bytes - done);
            live.map.get_slice(offset, part).unwrap().copy_to(&mut buffer[done..done + part]);
            done += part;
        }
        Some(buffer)
    }

    /// `bytes` bytes of the window from `at` on as memory. One map must cover them.
    pub fn view(&self, at: u64, bytes: usize) -> VolatileSlice<'_> {
        let (live, offset, _) = self.mapped(at).expect("no map covers this offset");
        live.map.get_slice(offset, bytes).unwrap()
    }

    /// Whether a map covers the byte at `at`. Does not access it.
    pub fn is_mapped(&self, at: u64) -> bool {
        self.mapped(at).is_some()
    }

    /// The number of bytes of the window that maps cover.
    pub fn mapped_bytes(&self) -> u64 {
        self.live.iter().map(|m| m.bytes).sum()
    }
}

/// The machine under its own lock. A thread that changes it holds the big lock, too.
pub(super) struct SharedMachine {
    pub machine: Mutex<Machine>,
    /// Notified after every request of the back-end.
    pub served: Condvar,
}
