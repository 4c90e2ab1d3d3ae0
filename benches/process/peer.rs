// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon, its share, and the front-end that drives it, INIT done.

use std::cell::Cell;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use tempfile::TempDir;

use crate::common::fuse_abi::{self as abi, op};
use crate::common::memory::{GuestMem, guest_ram_with};
use crate::common::strict_vmm::{Ring, StrictVmm, VmmOptions};

use super::queue::{QueueDriver, RINGS_BYTES, Request, SLOTS_BYTES};

/// Debian's, as `images/build` unpacks it.
pub const VIRTIOFSD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest/virtiofsd");

/// The file that READ and WRITE go to.
pub const DATA: &str = "data";
pub const DATA_BYTES: u64 = 64 << 20;
/// Small files, in the root.
pub const FILES: usize = 100;

/// Which daemon, and how it is run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Each inode held by a descriptor (not the default), as the virtiofsd of Debian does.
    Ours {
        window_mib: u64,
        queues: usize,
    },
    /// As it is by default: inodes by file handles.
    ByHandle,
    Virtiofsd {
        threads: usize,
    },
}

impl Kind {
    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Ours { window_mib: 0, .. } => "ours, no window".into(),
            Self::Ours { queues: 1, .. } => "ours".into(),
            Self::Ours { queues, .. } => format!("ours, {queues} queues"),
            Self::ByHandle => "ours, file handles".into(),
            Self::Virtiofsd { threads: 0 } => "virtiofsd".into(),
            Self::Virtiofsd { threads } => format!("virtiofsd, {threads} threads"),
        }
    }

    /// Request queues.
    pub fn queues(self) -> usize {
        match self {
            Self::Ours { queues, .. } => queues,
            Self::ByHandle | Self::Virtiofsd { .. } => 1,
        }
    }

    /// The command line, nothing confined on either side.
    pub fn command(self, socket: &Path, share: &Path) -> Command {
        match self {
            Self::ByHandle => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-dax"));
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share"]);
                command
            }
            Self::Ours { window_mib, queues } => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-dax"));
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share", "--window-size", &format!("{window_mib}M")]);
                command.args(["--num-request-queues", &queues.to_string()]);
                command.arg("--inode-file-handles=never");
                command
            }
            Self::Virtiofsd { threads } => {
                let mut command = Command::new(VIRTIOFSD);
                command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--sandbox", "none", "--seccomp", "none"]);
                command.args(["--thread-pool-size", &threads.to_string()]);
                command
            }
        }
    }
}

/// Our pmem device's command line.
pub fn pmem_command(socket: &Path, file: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-dax"));
    command.arg("pmem").arg("--socket-path").arg(socket).arg("--file").arg(file);
    command
}

/// A process that ends with its owner.
pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
}

impl Daemon {
    /// Starts `command`, which the socket's path is given to; that lies in `dir`.
    pub fn start(dir: &Path, command: impl FnOnce(&Path) -> Command) -> Self {
        static STARTED: AtomicU64 = AtomicU64::new(0);
        let socket = dir.join(format!("sock-{}", STARTED.fetch_add(1, Ordering::Relaxed)));
        let mut command = command(&socket);
        command.env_remove("RUST_LOG").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.to_lowercase().contains("waiting for") {
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the daemon ended: {line}");
        }
        thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
        Self { child, socket }
    }

    /// Its process that serves the guest.
    pub fn pid(&self) -> u32 {
        crate::common::worker_of(self.child.id())
    }

    /// Resident memory of the kind `key` of /proc/PID/status, in KiB.
    pub fn resident_kib(&self, key: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What peers have in common: the share, and the guest's memory. Where these lie makes more of a
/// difference than who serves it; and one peer works at a time.
pub struct Ground {
    dir: TempDir,
    ram: GuestMem,
    /// Rings that have their place.
    rings: Cell<u64>,
}

impl Ground {
    /// Where the slots begin, behind the rings.
    const SLOTS_AT: u64 = 4 << 20;
    const MOST_QUEUES: u64 = 5;

    /// A fresh one.
    pub fn new() -> Rc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        (0..FILES).for_each(|i| fs::write(share.join(file(i)), b"small").unwrap());
        fs::write(share.join(DATA), vec![7u8; DATA_BYTES as usize]).unwrap();
        let ram = guest_ram_with(Self::SLOTS_AT + Self::MOST_QUEUES * SLOTS_BYTES, 1);
        Rc::new(Self { dir, ram, rings: Cell::new(0) })
    }

    /// The share.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    fn queue(&self, queue: u64) -> QueueDriver {
        let place = self.rings.replace(self.rings.get() + 1) * RINGS_BYTES;
        assert!(place + RINGS_BYTES <= Self::SLOTS_AT && queue < Self::MOST_QUEUES);
        QueueDriver::new(self.ram.clone(), place, Self::SLOTS_AT + queue * SLOTS_BYTES)
    }
}

/// A daemon that serves a share to a driver.
pub struct Peer {
    pub kind: Kind,
    /// Dropped first: that ends the session.
    pub vmm: StrictVmm,
    /// hiprio, then the request queues.
    pub lanes: Vec<QueueDriver>,
    pub daemon: Daemon,
    pub ground: Rc<Ground>,
}

impl Peer {
    /// A fresh one.
    pub fn new(kind: Kind, ground: &Rc<Ground>) -> Self {
        let ground = ground.clone();
        let command = |socket: &Path| kind.command(socket, &ground.share());
        let daemon = Daemon::start(ground.dir.path(), command);
        let queues = kind.queues() + 1;
        let options =
            VmmOptions { queues, config_bytes: 44, device_features: 0, ..VmmOptions::default() };
        let mut vmm = StrictVmm::connect(&daemon.socket, &ground.ram, options).unwrap();
        let mut lanes: Vec<_> = (0..queues as u64).map(|queue| ground.queue(queue)).collect();
        let mut rings: Vec<_> = lanes.iter_mut().map(|queue| queue as &mut dyn Ring).collect();
        vmm.start_all(&mut rings);
        lanes[1].ask(&Request::new(op::INIT, 0, abi::init().0, abi::INIT_OUT));
        Self { kind, vmm, lanes, daemon, ground }
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// One request on the first queue that has one.
    pub fn call(&mut self, opcode: u32, nodeid: u64, args: Vec<u8>, body: usize) -> Vec<u8> {
        self.lanes[1].ask(&Request::new(opcode, nodeid, args, body))
    }

    /// LOOKUP in the root.
    pub fn node(&mut self, name: &str) -> u64 {
        let args = abi::Arg::new().name(name).0;
        abi::u64_at(&self.call(op::LOOKUP, abi::ROOT, args, abi::ENTRY_OUT), 0)
    }

    /// OPEN or OPENDIR.
    pub fn open(&mut self, opcode: u32, nodeid: u64, flags: i32) -> u64 {
        abi::u64_at(&self.call(opcode, nodeid, abi::open(flags).0, abi::OPEN_OUT), 0)
    }
}

/// The name of a small file.
pub fn file(i: usize) -> String {
    format!("file-{i:06}")
}
