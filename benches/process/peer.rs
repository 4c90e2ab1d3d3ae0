// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon, its share, and the front-end that drives it, INIT done.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use tempfile::TempDir;

use crate::common::fuse_abi::{self as abi, op};
use crate::common::memory::{GuestMem, guest_ram_with};
use crate::common::strict_vmm::{Ring, StrictVmm, VmmOptions};

use super::lane::{LANE_BYTES, Lane, Request};

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
    Ours { window_mib: u64, queues: usize },
    Virtiofsd { threads: usize },
}

impl Kind {
    /// Its name in tables.
    pub fn name(self) -> String {
        match self {
            Self::Ours { window_mib: 0, .. } => "ours, no window".into(),
            Self::Ours { queues: 1, .. } => "ours".into(),
            Self::Ours { queues, .. } => format!("ours, {queues} queues"),
            Self::Virtiofsd { threads: 0 } => "virtiofsd".into(),
            Self::Virtiofsd { threads } => format!("virtiofsd, {threads} threads"),
        }
    }

    /// Request queues.
    pub fn queues(self) -> usize {
        match self {
            Self::Ours { queues, .. } => queues,
            Self::Virtiofsd { .. } => 1,
        }
    }

    /// The command line, nothing confined on either side.
    pub fn command(self, socket: &Path, share: &Path) -> Command {
        match self {
            Self::Ours { window_mib, queues } => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-user-dax"));
                command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
                command.args(["--tag", "share", "--window-size", &format!("{window_mib}M")]);
                command.args(["--num-request-queues", &queues.to_string()]);
                // As virtiofsd holds inodes unless it is told otherwise.
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

/// A process that ends with its owner.
pub struct Daemon {
    child: Child,
    /// The share and the socket lie in it.
    pub dir: TempDir,
    pub socket: PathBuf,
}

impl Daemon {
    /// Starts `command`, which the folder and the socket's path are given to.
    pub fn start(command: impl FnOnce(&Path, &Path) -> Command) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let mut command = command(dir.path(), &socket);
        command.env_remove("RUST_LOG").stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.to_lowercase().contains("waiting for") {
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the daemon ended: {line}");
        }
        thread::spawn(move || stderr.read_to_end(&mut Vec::new()));
        Self { child, dir, socket }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
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

/// A daemon that serves a share to a driver.
pub struct Peer {
    pub kind: Kind,
    /// Dropped first: that ends the session.
    pub vmm: StrictVmm,
    /// hiprio, then the request queues.
    pub lanes: Vec<Lane>,
    pub daemon: Daemon,
    _ram: GuestMem,
}

impl Peer {
    /// A fresh one.
    pub fn new(kind: Kind) -> Self {
        let daemon = Daemon::start(|dir, socket| {
            let share = dir.join("share");
            fs::create_dir(&share).unwrap();
            (0..FILES).for_each(|i| fs::write(share.join(file(i)), b"small").unwrap());
            fs::write(share.join(DATA), vec![7u8; DATA_BYTES as usize]).unwrap();
            kind.command(socket, &share)
        });
        let queues = kind.queues() + 1;
        let ram = guest_ram_with(LANE_BYTES * queues as u64, 1);
        let options =
            VmmOptions { queues, config_bytes: 44, device_features: 0, ..VmmOptions::default() };
        let mut vmm = StrictVmm::connect(&daemon.socket, &ram, options).unwrap();
        let mut lanes: Vec<_> =
            (0..queues as u64).map(|i| Lane::new(ram.clone(), i * LANE_BYTES)).collect();
        let mut rings: Vec<_> = lanes.iter_mut().map(|lane| lane as &mut dyn Ring).collect();
        vmm.start_all(&mut rings);
        lanes[1].ask(&Request::new(op::INIT, 0, abi::init().0, abi::INIT_OUT));
        Self { kind, vmm, lanes, daemon, _ram: ram }
    }

    /// The daemon's process.
    pub fn pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// Where its share lies.
    pub fn share(&self) -> PathBuf {
        self.daemon.dir.path().join("share")
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
