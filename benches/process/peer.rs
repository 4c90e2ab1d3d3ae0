// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon, its share, and the front-end that drives it, after INIT.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;

use testkit::daemon::binary;
use testkit::fuse_abi::{self as abi, op};
use testkit::memory::{GuestMem, guest_ram_with};
use testkit::strict_vmm::{Ring, StrictVmm, VmmOptions};

use super::queue::{QueueDriver, RINGS_BYTES, Request, SLOTS_BYTES};

/// Debian's virtiofsd, as `images/build` unpacks it.
pub const VIRTIOFSD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/guest/virtiofsd");

/// The name of the file for READ and WRITE.
pub const DATA: &str = "data";
pub const DATA_BYTES: u64 = 64 << 20;
/// Number of small files in the share's root.
pub const FILES: usize = 100;

/// Which daemon runs, with which settings.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Our daemon, with a descriptor for each inode (not the default), as Debian's virtiofsd has.
    Ours {
        window_mib: u64,
        queues: usize,
    },
    /// Our daemon with its defaults: inodes by file handles.
    ByHandle,
    /// Another build of our daemon, as `Ours` with a window of 256 MiB: see [`before`].
    Before,
    Virtiofsd {
        threads: usize,
    },
}

/// The options of both daemons that switch the sandbox off.
const NO_SANDBOX: [&str; 4] = ["--sandbox", "none", "--seccomp", "none"];

/// Another build of the daemon to compare with: the path in `VUD_BENCH_BEFORE`.
pub fn before() -> Option<PathBuf> {
    std::env::var_os("VUD_BENCH_BEFORE").map(PathBuf::from)
}

impl Kind {
    /// The name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Ours { window_mib: 0, .. } => "ours, no window".into(),
            Self::Ours { queues: 1, .. } => "ours".into(),
            Self::Ours { queues, .. } => format!("ours, {queues} queues"),
            Self::ByHandle => "ours, file handles".into(),
            Self::Before => "before".into(),
            Self::Virtiofsd { threads: 0 } => "virtiofsd".into(),
            Self::Virtiofsd { threads } => format!("virtiofsd, {threads} threads"),
        }
    }

    /// Number of request queues.
    pub fn queues(self) -> usize {
        match self {
            Self::Ours { queues, .. } => queues,
            Self::ByHandle | Self::Before | Self::Virtiofsd { .. } => 1,
        }
    }

    /// The command line, without a sandbox for either daemon.
    pub fn command(self, socket: &Path, share: &Path) -> Command {
        match self {
            Self::ByHandle => {
                let mut command = Command::new(binary());
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share"]).args(NO_SANDBOX);
                command
            }
            Self::Ours { window_mib, queues } => {
                let mut command = Command::new(binary());
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share", "--window-size", &format!("{window_mib}M")]);
                command.args(["--num-request-queues", &queues.to_string()]);
                command.arg("--inode-file-handles=never").args(NO_SANDBOX);
                command
            }
            Self::Before => {
                let mut command = Command::new(before().unwrap());
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share", "--inode-file-handles=never"]);
                command
            }
            Self::Virtiofsd { threads } => {
                let mut command = Command::new(VIRTIOFSD);
                command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(NO_SANDBOX);
                command.args(["--thread-pool-size", &threads.to_string()]);
                command
            }
        }
    }
}

/// The command line of our pmem device.
pub fn pmem_command(socket: &Path, file: &Path) -> Command {
    let mut command = Command::new(binary());
    command.arg("pmem").arg("--socket-path").arg(socket).arg("--file").arg(file).args(NO_SANDBOX);
    command
}

/// A daemon, and the socket that it listens on.
pub struct Daemon {
    daemon: testkit::daemon::Daemon,
    pub socket: PathBuf,
}

impl Daemon {
    /// Starts `command`, which gets the path of a new socket in `dir`.
    pub fn start(dir: &Path, command: impl FnOnce(&Path) -> Command) -> Self {
        static STARTED: AtomicU64 = AtomicU64::new(0);
        let socket = dir.join(format!("sock-{}", STARTED.fetch_add(1, Ordering::Relaxed)));
        let mut command = command(&socket);
        command.env_remove("RUST_LOG");
        Self { daemon: testkit::daemon::Daemon::start(command), socket }
    }

    /// The process that serves the guest.
    pub fn pid(&self) -> u32 {
        testkit::worker_of(self.daemon.pid())
    }

    /// The memory `key` of /proc/PID/status, in KiB.
    pub fn resident_kib(&self, key: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().unwrap()
    }
}

/// The share and the guest's memory, common to all peers: their physical place affects the figures
/// more than the daemon does. Only one peer works at a time.
pub struct Setup {
    dir: TempDir,
    ram: GuestMem,
    /// Number of queues that have got memory for their rings.
    rings: Cell<u64>,
}

impl Setup {
    /// Address of the slots, after the rings.
    const SLOTS_AT: u64 = 4 << 20;
    const MOST_QUEUES: u64 = 5;

    /// A new share and new guest memory.
    pub fn new() -> Rc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        (0..FILES).for_each(|i| fs::write(share.join(file(i)), b"small").unwrap());
        fs::write(share.join(DATA), vec![7u8; DATA_BYTES as usize]).unwrap();
        let ram = guest_ram_with(Self::SLOTS_AT + Self::MOST_QUEUES * SLOTS_BYTES, 1);
        Rc::new(Self { dir, ram, rings: Cell::new(0) })
    }

    /// The path of the share.
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
    /// The first field, so dropped first: that ends the session.
    pub vmm: StrictVmm,
    /// The drivers of the high-priority queue and of the request queues.
    pub drivers: Vec<QueueDriver>,
    pub daemon: Daemon,
    pub setup: Rc<Setup>,
}

impl Peer {
    /// Starts a daemon, connects to it, and sends INIT.
    pub fn new(kind: Kind, setup: &Rc<Setup>) -> Self {
        let setup = setup.clone();
        let command = |socket: &Path| kind.command(socket, &setup.share());
        let daemon = Daemon::start(setup.dir.path(), command);
        let queues = kind.queues() + 1;
        let options =
            VmmOptions { queues, config_bytes: 44, device_features: 0, ..VmmOptions::default() };
        let mut vmm = StrictVmm::connect(&daemon.socket, &setup.ram, options).unwrap();
        let mut drivers: Vec<_> = (0..queues as u64).map(|queue| setup.queue(queue)).collect();
        let mut rings: Vec<_> = drivers.iter_mut().map(|queue| queue as &mut dyn Ring).collect();
        vmm.start_all(&mut rings);
        drivers[1].ask(&Request::new(op::INIT, 0, abi::init().0, abi::INIT_OUT));
        Self { kind, vmm, drivers, daemon, setup }
    }

    /// The daemon's process ID.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Sends one request on the first request queue.
    pub fn call(&mut self, opcode: u32, nodeid: u64, args: Vec<u8>, body: usize) -> Vec<u8> {
        self.drivers[1].ask(&Request::new(opcode, nodeid, args, body))
    }

    /// LOOKUP in the root. Returns the node ID.
    pub fn node(&mut self, name: &str) -> u64 {
        let args = abi::Arg::new().name(name).0;
        abi::u64_at(&self.call(op::LOOKUP, abi::ROOT, args, abi::ENTRY_OUT), 0)
    }

    /// OPEN or OPENDIR. Returns the file handle.
    pub fn open(&mut self, opcode: u32, nodeid: u64, flags: i32) -> u64 {
        abi::u64_at(&self.call(opcode, nodeid, abi::open(flags).0, abi::OPEN_OUT), 0)
    }
}

/// The name of a small file.
pub fn file(i: usize) -> String {
    format!("file-{i:06}")
}
