// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The in-process front-end: a guest, its driver and a strict QEMU around the real daemon.
//!
//! Also used by the benches, so it depends on nothing that only a test has.

#![allow(dead_code)] // Each test file and each bench uses its own part.

pub mod bad_backend;
mod channel;
pub mod cloud_hypervisor;
pub mod driver;
pub mod fs;
pub mod fuse;
pub mod fuse_abi;
pub mod gated_sync;
mod handshake;
pub mod machine;
pub mod memory;
pub mod queue;
pub mod slow;
pub mod strict_vmm;
pub mod watchdog;

use std::fs::{File, OpenOptions};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vhost::vhost_user::Listener;
use vhost_user_dax::device::Device;
use vhost_user_dax::pmem::Pmem;
use vhost_user_dax::session::{self, SessionError};

use driver::{Driver, DriverOptions};
use gated_sync::Gate;
use memory::{GuestMem, guest_ram};
use strict_vmm::{StrictVmm, VmmOptions};

/// After this long without an event something hangs. No test depends on its length.
pub const HANG: Duration = Duration::from_secs(30);

/// The size of the pmem file in tests.
pub const FILE_BYTES: u64 = 4 << 20;

/// Waits for something that has no event of its own: looks again and again, without a pause.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG;
    while !done() {
        assert!(Instant::now() < deadline, "hang: waited for {what}");
        thread::yield_now();
    }
}

/// The process that serves the guest: the daemon's child. The daemon itself, if it has none.
pub fn worker_of(daemon: u32) -> u32 {
    child_of(daemon, "vhost-user-dax").unwrap_or(daemon)
}

/// The daemon's child of that name.
pub fn child_of(daemon: u32, name: &str) -> Option<u32> {
    let children =
        std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).ok()?;
    let is_named = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_named)
}

/// A pmem device over a file, with a gate in the place of its disk, and a socket.
pub struct Host {
    /// Holds the socket, the file, and whatever a test wants to put there.
    pub dir: TempDir,
    /// The file that the guest sees.
    pub file: File,
    /// The device.
    pub pmem: Arc<Pmem>,
    /// Its disk.
    pub gate: Gate,
    socket: PathBuf,
    listener: Arc<Mutex<Listener>>,
}

impl Host {
    /// A fresh device.
    pub fn new() -> Self {
        Self::with_bytes(FILE_BYTES)
    }

    /// A fresh device of some size.
    pub fn with_bytes(bytes: u64) -> Self {
        Self::make(bytes, false)
    }

    /// A fresh device that offers CONFIGURE_MEM_SLOTS.
    pub fn with_mem_slots() -> Self {
        Self::make(FILE_BYTES, true)
    }

    fn make(bytes: u64, mem_slots: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pmem.img");
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(bytes).unwrap();
        let gate = Gate::new();
        let ours = Arc::new(file.try_clone().unwrap());
        let persist = gate.persist();
        Self::with(dir, file, gate, Pmem::with_mem_slots(ours, persist, mem_slots).unwrap())
    }

    /// One whose device is the caller's; `gate` is of use if it is the device's.
    pub fn with(dir: TempDir, file: File, gate: Gate, pmem: Arc<Pmem>) -> Self {
        let socket = dir.path().join("daemon.sock");
        let listener = Arc::new(Mutex::new(Listener::new(&socket, true).unwrap()));
        Self { dir, file, pmem, gate, socket, listener }
    }

    /// Serves one front-end in a thread.
    pub fn serve(&self) -> Session {
        let (done, ended) = channel();
        let listener = self.listener.clone();
        let device: Arc<dyn Device> = self.pmem.clone();
        thread::spawn(move || {
            let mut listener = listener.lock().unwrap();
            let result = session::serve_one(&mut listener, &device);
            let _ = done.send(result);
        });
        Session(ended)
    }

    /// A guest before its driver is there, with RAM of one region.
    pub fn plug(&self) -> Guest {
        self.plug_with(DriverOptions::default(), VmmOptions::default(), guest_ram(1))
    }

    /// The same, with everything chosen.
    pub fn plug_with(&self, driver: DriverOptions, vmm: VmmOptions, ram: GuestMem) -> Guest {
        let session = self.serve();
        let vmm = StrictVmm::connect(&self.socket, &ram, vmm).unwrap();
        Guest { vmm, driver: Driver::new(ram, driver), session }
    }

    /// A guest whose driver is ready and whose window is mapped.
    pub fn boot(&self) -> Guest {
        self.boot_with(DriverOptions::default())
    }

    /// The same, with a driver of one's choice.
    pub fn boot_with(&self, options: DriverOptions) -> Guest {
        let mut guest = self.plug_with(options, VmmOptions::default(), guest_ram(1));
        guest.start();
        guest.vmm.wait_live(1);
        guest
    }

    /// Where to connect by hand.
    pub fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// The file's bytes.
    pub fn file_bytes(&self, at: u64, bytes: usize) -> Vec<u8> {
        strict_vmm::file_bytes(&self.file, at, bytes)
    }
}

/// The thread that serves a front-end.
pub struct Session(Receiver<Result<(), SessionError>>);

impl Session {
    /// Waits for the session's end.
    pub fn ended(self) -> Result<(), SessionError> {
        self.0.recv_timeout(HANG).expect("hang: the session does not end, or its thread panicked")
    }
}

/// A front-end with a guest in it.
pub struct Guest {
    /// QEMU. Dropped first: that ends the session.
    pub vmm: StrictVmm,
    /// The guest's driver.
    pub driver: Driver,
    /// The daemon's side.
    pub session: Session,
}

impl Guest {
    /// DRIVER_OK, or `cont`.
    pub fn start(&mut self) {
        self.vmm.start(&mut self.driver);
    }

    /// The VM ends well: stop, hang up; the daemon must end the session without an error.
    pub fn power_off(mut self) {
        self.vmm.stop();
        drop(self.vmm);
        self.session.ended().unwrap();
    }

    /// The VM is killed; the daemon must end the session without an error.
    pub fn kill(self) {
        self.vmm.kill();
        drop(self.vmm);
        self.session.ended().unwrap();
    }
}
