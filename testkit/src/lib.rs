// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The shared code of the tests, `benches/process` and the fuzz targets: a guest's drivers, a
//! strict QEMU, fixtures around the real daemon, doubles of the engine's traits, and a model of the
//! engine.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::new_without_default)] // `new` starts a fixture: too much for `default`.

pub mod bad_backend;
mod channel;
pub mod cloud_hypervisor;
pub mod daemon;
pub mod driver;
#[allow(missing_docs)] // The names of fields and calls say it all.
pub mod fakes;
pub mod fs;
pub mod fuse;
pub mod fuse_abi;
pub mod gated_sync;
mod handshake;
pub mod machine;
pub mod memory;
#[allow(missing_docs)] // The names of fields and calls document them.
pub mod model;
pub mod queue;
pub mod slow;
pub mod strict_vmm;
pub mod virtqueue;
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

/// Time limit on every wait of a test: a longer wait is a hang. No test depends on its length.
pub const HANG: Duration = Duration::from_secs(120);

/// The length of the pmem file in tests, in bytes.
pub const FILE_BYTES: u64 = 4 << 20;

/// Waits until `done` returns true, for a condition that no event announces (in /proc, the lock of
/// another process, a number in guest memory). Calls it after pauses that double from 50 us to 10
/// ms.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG;
    let mut pause = Duration::from_micros(50);
    while !done() {
        assert!(Instant::now() < deadline, "hang: waited for {what}");
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

/// The process ID of the worker of the daemon `daemon`; `daemon` itself if it has no worker.
pub fn worker_of(daemon: u32) -> u32 {
    child_of(daemon, "vhost-user-dax").unwrap_or(daemon)
}

/// The process ID of the child of `daemon` with the command name `name`.
pub fn child_of(daemon: u32, name: &str) -> Option<u32> {
    let children =
        std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children")).ok()?;
    let is_named = |pid: &u32| {
        std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name)
    };
    children.split_whitespace().filter_map(|pid| pid.parse().ok()).find(is_named)
}

/// A pmem device over a file, with a gate in place of its disk, and a listening socket.
pub struct Host {
    /// Contains the socket, the file, and the files of the test.
    pub dir: TempDir,
    /// The file that the window shows.
    pub file: File,
    /// The device.
    pub pmem: Arc<Pmem>,
    /// The double of the disk.
    pub gate: Gate,
    socket: PathBuf,
    listener: Arc<Mutex<Listener>>,
}

impl Host {
    /// A new device with a file of [`FILE_BYTES`].
    pub fn new() -> Self {
        Self::with_bytes(FILE_BYTES)
    }

    /// A new device with a file of `bytes` bytes.
    pub fn with_bytes(bytes: u64) -> Self {
        Self::make(bytes, false)
    }

    /// A new device that offers CONFIGURE_MEM_SLOTS.
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

    /// A host with the caller's device. `gate` has an effect only if the device uses it.
    pub fn with(dir: TempDir, file: File, gate: Gate, pmem: Arc<Pmem>) -> Self {
        let socket = dir.path().join("daemon.sock");
        let listener = Arc::new(Mutex::new(Listener::new(&socket, true).unwrap()));
        Self { dir, file, pmem, gate, socket, listener }
    }

    /// Serves one front-end on a new thread.
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

    /// A guest whose driver is not loaded yet, with one RAM region.
    pub fn plug(&self) -> Guest {
        self.plug_with(DriverOptions::default(), VmmOptions::default(), guest_ram(1))
    }

    /// A guest whose driver is not loaded yet, with the given driver, front-end and RAM.
    pub fn plug_with(&self, driver: DriverOptions, vmm: VmmOptions, ram: GuestMem) -> Guest {
        let session = self.serve();
        let vmm = StrictVmm::connect(&self.socket, &ram, vmm).unwrap();
        Guest { vmm, driver: Driver::new(ram, driver), session }
    }

    /// A guest whose driver is ready and whose window is mapped.
    pub fn boot(&self) -> Guest {
        self.boot_with(DriverOptions::default())
    }

    /// A guest whose driver has the options `options`, and whose window is mapped.
    pub fn boot_with(&self, options: DriverOptions) -> Guest {
        let mut guest = self.plug_with(options, VmmOptions::default(), guest_ram(1));
        guest.start();
        guest.vmm.wait_live(1);
        guest
    }

    /// The path of the socket, for a test that connects to it itself.
    pub fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// `bytes` bytes of the file from `at` on, read on the host.
    pub fn file_bytes(&self, at: u64, bytes: usize) -> Vec<u8> {
        strict_vmm::file_bytes(&self.file, at, bytes)
    }
}

/// A thread that serves one front-end.
pub struct Session(Receiver<Result<(), SessionError>>);

impl Session {
    /// Waits for the end of the session.
    pub fn ended(self) -> Result<(), SessionError> {
        self.0.recv_timeout(HANG).expect("hang: the session does not end, or its thread panicked")
    }
}

/// A front-end with its guest, and the session that serves it.
pub struct Guest {
    /// QEMU. The first field, so that it is dropped first: that ends the session.
    pub vmm: StrictVmm,
    /// The guest's driver.
    pub driver: Driver,
    /// The daemon's session.
    pub session: Session,
}

impl Guest {
    /// Starts the device, as at DRIVER_OK or QMP `cont`.
    pub fn start(&mut self) {
        self.vmm.start(&mut self.driver);
    }

    /// The VM ends: stops and disconnects. The daemon must end the session without an error.
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
