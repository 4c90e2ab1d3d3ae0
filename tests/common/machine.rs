// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The strict front-end's machine: memory regions, the window, and QEMU's rules about them.
//!
//! The rows (Q1 to Q13) are those of the table of what QEMU 11.1 was seen to do. Where QEMU
//! crashes, aborts or hangs, a violation is noted and fails the test; where QEMU refuses, the
//! request is refused.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserMMap};
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserFrontendReqHandler};
use vhost::{Error as VhostError, VhostBackend};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory};

use super::memory::own_fd;
use super::watchdog::Watchdog;

/// VHOST_USER_MAX_RAM_SLOTS of QEMU's hw/virtio/vhost-user.c.
pub const MAX_REGIONS: usize = 512;
/// VHOST_MEMORY_BASELINE_NREGIONS: what one SET_MEM_TABLE holds.
pub const BASELINE_REGIONS: usize = 8;
/// Where the guest put BAR 4.
const WINDOW_ADDRESS: u64 = 0x40_0000_0000;

/// A region of guest memory, as the back-end is told about it.
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

/// One SHMEM_MAP that was carried out: a real mapping of the back-end's file.
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

/// Why the back-end did not do what it was asked.
#[derive(Debug, PartialEq, Eq)]
pub enum CallError {
    /// No answer in time; the connection was cut.
    Deadlock,
    /// The back-end said no, or is gone.
    Failed(String),
}

/// What of the machine a test may bend.
#[derive(Default)]
pub(super) struct Bends {
    /// Answer every SHMEM_MAP with a failure.
    pub refuse_maps: bool,
    /// Leave live maps out of the table at a start (as with a stale table).
    pub hide_maps_at_start: bool,
    /// Leave RAM region 0, where the rings are, out of every table.
    pub hide_rings: bool,
    /// Send the table again, with all in it, before a map is refused for overlap.
    pub tell_before_refusing: bool,
    /// One SHMEM_MAP that crosses a stop fails instead of crashing QEMU: a back-end can't call
    /// back what it has sent, and vhost's `Backend` can't say when it has sent it.
    pub forgive_crossing_map: bool,
}

pub(super) struct Machine {
    pub frontend: Frontend,
    pub watchdog: Watchdog,
    pub reply_deadline: Duration,
    pub bends: Bends,
    pub slots: bool,
    pub window_bytes: u64,
    pub started: bool,
    /// A request was already in the channel when the stop was over.
    pub in_flight: bool,
    /// Maps that crossed the last stop and may be forgiven.
    pub may_cross: bool,
    pub map_requests: usize,
    pub unmap_requests: usize,
    pub table_updates: usize,
    pub refused: Vec<String>,
    pub violations: Vec<String>,
    ram: Vec<Region>,
    live: Vec<LiveMap>,
    told: Vec<Region>,
    told_freed_region: bool,
}

impl Machine {
    pub fn new(frontend: Frontend, watchdog: Watchdog, limit: Duration, ram: Vec<Region>) -> Self {
        Self {
            frontend,
            watchdog,
            reply_deadline: limit,
            bends: Bends::default(),
            slots: false,
            window_bytes: 0,
            started: false,
            in_flight: false,
            may_cross: false,
            map_requests: 0,
            unmap_requests: 0,
            table_updates: 0,
            refused: Vec::new(),
            violations: Vec::new(),
            ram,
            live: Vec::new(),
            told: Vec::new(),
            told_freed_region: false,
        }
    }

    pub fn live_maps(&self) -> usize {
        self.live.len()
    }

    /// All regions in the order of their guest addresses, as QEMU's flat view has them: RAM first.
    pub fn regions(&self) -> Vec<Region> {
        let ram = self.ram.iter().skip(usize::from(self.bends.hide_rings)).copied();
        let mut regions: Vec<_> = ram.chain(self.live.iter().map(LiveMap::region)).collect();
        regions.sort_by_key(|region| region.guest);
        regions
    }

    fn violation(&mut self, row: &str, what: &str) {
        self.violations.push(format!("{row}: {what}"));
    }

    fn refuse(&mut self, row: &str, what: &str, errno: i32) -> io::Result<u64> {
        self.refused.push(format!("{row}: {what}"));
        Err(io::Error::from_raw_os_error(errno))
    }

    // --- messages on the main channel ---

    /// One message. Not answered in time is Q3's deadlock: QEMU would hang with its lock held.
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
        self.call("SET_MEM_TABLE", true, |f| f.set_mem_table(&infos).map(drop))
    }

    /// Tells the back-end about all regions: differences with CONFIGURE_MEM_SLOTS, else the
    /// whole table. Without it, more than 8 regions can't be told at all: QEMU prints two error
    /// lines, and the back-end's table goes stale.
    pub fn tell_regions(&mut self) -> Result<(), CallError> {
        let now = self.regions();
        if !self.slots {
            return if now.len() <= BASELINE_REGIONS { self.send_table(&now) } else { Ok(()) };
        }
        let before = std::mem::take(&mut self.told);
        for gone in before.iter().filter(|r| !now.contains(r)) {
            self.call("REM_MEM_REG", true, |f| f.remove_mem_region(&gone.info()))?;
        }
        for new in now.iter().filter(|r| !before.contains(r)) {
            self.call("ADD_MEM_REG", true, |f| f.add_mem_region(&new.info()).map(drop))?;
        }
        self.table_updates += 1;
        self.told = now;
        Ok(())
    }

    /// The rules of a start. `Err(105)` is `Error starting vhost-user-base: 105` (Q13).
    pub fn tell_regions_at_start(&mut self) -> Result<(), i32> {
        if self.told_freed_region {
            self.violation("Q12", "QEMU would segfault: it removes a region that the reset freed");
            return Err(libc::EFAULT);
        }
        let mut regions = self.regions();
        if !self.slots && regions.len() > BASELINE_REGIONS {
            return Err(libc::ENOBUFS);
        }
        if self.bends.hide_maps_at_start {
            regions.truncate(self.ram.len());
            return self.send_table(&regions).map_err(|_| libc::EPROTO);
        }
        self.tell_regions().map_err(|_| libc::EPROTO)
    }

    /// A virtio reset: the maps go, and the back-end is told nothing (Q10).
    pub fn drop_maps(&mut self) {
        // Q12: with CONFIGURE_MEM_SLOTS, QEMU keeps pointers to the regions that it told about.
        self.told_freed_region |= self.slots && !self.live.is_empty();
        self.live.clear();
    }

    // --- requests on the back-end channel ---

    fn may_serve(&mut self, what: &str) -> io::Result<()> {
        if self.started {
            return Ok(());
        }
        let in_flight = std::mem::take(&mut self.in_flight);
        let forgiven = self.bends.forgive_crossing_map && self.may_cross && what == "SHMEM_MAP";
        self.may_cross = false;
        if forgiven {
            self.refused.push(format!("Q1: {what} crossed the stop"));
        } else {
            let how = if in_flight { ", sent before the stop was over" } else { "" };
            let text = format!("QEMU would segfault: {what} while the device is not started{how}");
            self.violation("Q1", &text);
        }
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    fn in_window(&self, req: &VhostUserMMap) -> bool {
        let end = { req.shm_offset }.checked_add(req.len);
        req.shmid == 0 && req.len > 0 && end.is_some_and(|end| end <= self.window_bytes)
    }

    fn map(&mut self, req: &VhostUserMMap, lent: &dyn AsRawFd) -> io::Result<u64> {
        self.map_requests += 1;
        self.may_serve("SHMEM_MAP")?;
        if self.bends.refuse_maps {
            return self.refuse("test", "told to refuse", libc::EIO);
        }
        if !self.in_window(req) {
            return self.refuse("Q5", "Bad offset/len for mmap", libc::EINVAL);
        }
        let (at, bytes, fd_offset) = (req.shm_offset, req.len, req.fd_offset);
        if self.live.iter().any(|m| at < m.at + m.bytes && m.at < at + bytes) {
            if self.bends.tell_before_refusing {
                let _ = self.tell_regions();
            }
            return self.refuse("Q4", "VIRTIO Shared Memory mapping overlap", libc::EEXIST);
        }
        let file = own_fd(lent);
        let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
        // Q7: the message's own flag changes nothing, QEMU always maps for writing.
        if flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return self.refuse(
                "Q8",
                "unable to map backing store: Permission denied",
                libc::EACCES,
            );
        }
        if file.metadata()?.len() < fd_offset.saturating_add(bytes) {
            return self.refuse("Q6", "backing store size is too small", libc::EINVAL);
        }
        if self.ram.len() + self.live.len() + 1 > MAX_REGIONS {
            self.violation("Q2", "QEMU would abort: nregions <= VHOST_USER_MAX_RAM_SLOTS");
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        let backing = FileOffset::new(file.try_clone()?, fd_offset);
        let map = MmapRegion::from_file(backing, bytes as usize).map_err(io::Error::other)?;
        self.live.push(LiveMap { at, bytes, fd_offset, file, map });
        self.update_before_ack()
    }

    fn unmap(&mut self, req: &VhostUserMMap) -> io::Result<u64> {
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

    /// Q3: the memory update, and its reply, come before the ack.
    fn update_before_ack(&mut self) -> io::Result<u64> {
        match self.tell_regions() {
            Ok(()) => Ok(0),
            Err(e) => Err(io::Error::other(format!("{e:?}"))),
        }
    }

    // --- the guest's view of the window ---

    fn mapped(&self, at: u64, bytes: usize) -> Option<(&LiveMap, usize)> {
        let live = self.live.iter().find(|m| m.at <= at && at + bytes as u64 <= m.at + m.bytes)?;
        Some((live, (at - live.at) as usize))
    }

    /// Stores through the window; false where nothing is mapped (the guest's store is lost).
    pub fn store(&self, at: u64, bytes: &[u8]) -> bool {
        let Some((live, offset)) = self.mapped(at, bytes.len()) else { return false };
        live.map.get_slice(offset, bytes.len()).unwrap().copy_from(bytes);
        true
    }

    /// Reads through the window; `None` where nothing is mapped.
    pub fn fetch(&self, at: u64, bytes: usize) -> Option<Vec<u8>> {
        let (live, offset) = self.mapped(at, bytes)?;
        let mut buffer = vec![0u8; bytes];
        live.map.get_slice(offset, bytes).unwrap().copy_to(&mut buffer[..]);
        Some(buffer)
    }
}

/// The machine under its own lock. Whoever changes it holds the big lock as well.
pub(super) struct SharedMachine {
    pub machine: Mutex<Machine>,
    /// Notified after every request of the back-end.
    pub served: Condvar,
}

/// What vhost's `FrontendReqHandler` calls.
pub(super) struct ChannelHandler(pub Arc<SharedMachine>);

impl VhostUserFrontendReqHandler for ChannelHandler {
    fn shmem_map(&self, req: &VhostUserMMap, fd: &dyn AsRawFd) -> io::Result<u64> {
        let result = self.0.machine.lock().unwrap().map(req, fd);
        self.0.served.notify_all();
        result
    }

    fn shmem_unmap(&self, req: &VhostUserMMap) -> io::Result<u64> {
        let result = self.0.machine.lock().unwrap().unmap(req);
        self.0.served.notify_all();
        result
    }
}
