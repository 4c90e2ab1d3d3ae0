// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real `vhost-user-dax fs` over a temporary directory, and a guest that uses it. All options
//! that tests pass to the daemon are in this file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::thread;

use tempfile::TempDir;
use vhost::vhost_user::VhostUserProtocolFeatures;

use crate::daemon::{Daemon, binary};
use crate::driver::DriverOptions;
use crate::fuse::FsGuest;
use crate::fuse_abi::{MAP_READ, MAP_WRITE};
use crate::memory::guest_ram_with;
use crate::queue::{QUEUE_BYTES, Queue};
use crate::strict_vmm::{StrictVmm, VmmOptions};
use crate::{eventually, worker_of};

/// `config_size` for virtio-fs, in bytes: the tag, the number of request queues, the notification
/// size.
const CONFIG_BYTES: u32 = 44;
/// Guest memory for tests, in bytes, after that of the queues.
const SCRATCH_BYTES: u64 = 16 << 20;
/// Length of one range in bytes: Linux requests maps of this size.
pub const RANGE: u64 = 2 << 20;
/// Length of the window in bytes, unless a test sets another one.
pub const WINDOW: u64 = 32 * RANGE;

/// The options of a daemon and of its VM.
#[derive(Debug, Clone)]
pub struct FsOptions {
    /// `--window-size`
    pub window_bytes: u64,
    /// `--num-request-queues`
    pub request_queues: usize,
    /// `--mem-slots`
    pub mem_slots: bool,
    /// `--keep-listening`
    pub keep_listening: bool,
    /// The number of the VM's RAM regions.
    pub ram_regions: u64,
    /// Whether the driver negotiates indirect descriptors.
    pub indirect: bool,
    /// `--persist`
    pub persist: String,
    /// `--dax`
    pub dax: &'static str,
    /// The directory in which the share's directory is created.
    pub below: PathBuf,
    /// Further options.
    pub extra: Vec<String>,
    /// Whether a thread reads the daemon's log.
    pub read_log: bool,
}

impl Default for FsOptions {
    fn default() -> Self {
        Self {
            window_bytes: WINDOW,
            request_queues: 1,
            mem_slots: true,
            keep_listening: false,
            ram_regions: 1,
            indirect: true,
            // VUD_TEST_PERSIST and TMPDIR run all tests of shares with another `--persist`, or
            // elsewhere.
            persist: std::env::var("VUD_TEST_PERSIST").unwrap_or_else(|_| "auto".into()),
            dax: "always",
            below: std::env::temp_dir(),
            extra: Vec::new(),
            read_log: true,
        }
    }
}

impl FsOptions {
    /// The command that starts the daemon.
    pub fn command(&self, socket: &Path, share: &Path) -> Command {
        // VUD_TEST_FS_BINARY replaces the daemon, to check the tests themselves.
        let other = std::env::var_os("VUD_TEST_FS_BINARY");
        let mut command = Command::new(other.map_or_else(binary, PathBuf::from));
        command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
        command.args(["--tag", "share", "--window-size", &self.window_bytes.to_string()]);
        command.args(["--num-request-queues", &self.request_queues.to_string()]);
        command.args(["--persist", &self.persist]);
        if self.window_bytes > 0 {
            command.args(["--dax", self.dax]);
        }
        // With several arenas, a thread could leave a map behind that looks like a leak.
        command.env("MALLOC_ARENA_MAX", "1");
        command.args(["--mem-slots", if self.mem_slots { "on" } else { "off" }]);
        if self.keep_listening {
            command.arg("--keep-listening");
        }
        command.args(&self.extra);
        command.env_remove("RUST_LOG");
        command
    }
}

/// A daemon over a temporary directory.
pub struct FsHost {
    options: FsOptions,
    /// Contains the share and the socket.
    pub dir: TempDir,
    share: PathBuf,
    daemon: Daemon,
}

impl FsHost {
    /// A daemon with the default options.
    pub fn new() -> Self {
        Self::with(FsOptions::default())
    }

    /// A daemon with `options`.
    pub fn with(options: FsOptions) -> Self {
        Self::prepared(options, |_| {})
    }

    /// A daemon with `options` and the command line arguments `more`.
    pub fn told(options: FsOptions, more: &[&str]) -> Self {
        Self::prepared(options, |command| {
            command.args(more);
        })
    }

    /// A daemon without a system call filter: strace injects an error by replacing the call's number,
    /// which the filter forbids.
    pub fn without_filter() -> Self {
        Self::told(FsOptions::default(), &["--seccomp", "none"])
    }

    /// A daemon whose share is in TMPDIR.
    pub fn on_a_disk() -> Self {
        Self::with(FsOptions { below: std::env::temp_dir(), ..FsOptions::default() })
    }

    /// Boots a guest that has opened a file of one range, has it granted for writing, has stored to
    /// it, and has made it durable. Returns the guest, the node id and the file handle.
    pub fn boot_with_stored_file(&self) -> (FsGuest, u64, u64) {
        self.put("file", &vec![1; RANGE as usize]);
        fs::File::open(self.path("file")).unwrap().sync_all().unwrap();
        let mut guest = self.boot();
        let (node, fh) = guest.opened("file");
        guest.setup(node, 0, RANGE, MAP_READ | MAP_WRITE, 0).unwrap();
        assert!(guest.vmm.store(0, &[2]));
        guest.flush(node, fh).unwrap();
        guest.fsync(node, fh).unwrap();
        (guest, node, fh)
    }

    /// A daemon whose command `prepare` changes before the start.
    pub fn prepared(options: FsOptions, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir_in(&options.below).unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        let mut command = options.command(&dir.path().join("sock"), &share);
        prepare(&mut command);
        Self::run(options, dir, share, command)
    }

    /// A daemon over a tmpfs of `bytes` bytes in its own mount namespace, which unmounts the tmpfs
    /// when it ends. `None` if unshare(1) can't create a mount namespace.
    pub fn on_small_tmpfs(options: FsOptions, bytes: u64) -> Option<Self> {
        Self::with_mounts(options, &format!("mount -t tmpfs -o size={bytes} tmpfs \"$SHARE\""))
    }

    /// A daemon in its own mount namespace, in which `script` has mounted a file system on or below
    /// `$SHARE`. `None` if unshare(1) can't create a mount namespace.
    pub fn with_mounts(options: FsOptions, script: &str) -> Option<Self> {
        let mut probe = Command::new("unshare");
        if !probe.args(["--mount", "true"]).status().is_ok_and(|status| status.success()) {
            return None;
        }
        let dir = tempfile::tempdir_in(&options.below).unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        let daemon = options.command(&dir.path().join("sock"), &share);
        let script = format!("mount --make-rprivate / && {script} && exec \"$@\"");
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", &script, "sh"]).env("SHARE", &share);
        command.arg(daemon.get_program()).args(daemon.get_args()).env_remove("RUST_LOG");
        let mut host = Self::run(options, dir, share, command);
        // The share as the daemon's mount namespace shows it.
        let root = PathBuf::from(format!("/proc/{}/root", host.parent_pid()));
        host.share = root.join(host.share.strip_prefix("/").unwrap());
        Some(host)
    }

    fn run(options: FsOptions, dir: TempDir, share: PathBuf, command: Command) -> Self {
        let daemon = Daemon::start_and_read(command, options.read_log);
        Self { options, dir, share, daemon }
    }

    /// The path of `name` in the share.
    pub fn path(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }

    /// Creates the file `name` in the share with the content `bytes`.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The content of the file `name`.
    pub fn get(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// The daemon's log so far.
    pub fn said(&self) -> String {
        self.daemon.said()
    }

    /// Waits until the daemon's log contains `words`.
    pub fn wait_said(&self, words: &str) {
        self.daemon.wait_said(words);
    }

    /// The process ID of the daemon's worker, which serves the guest.
    pub fn pid(&self) -> u32 {
        worker_of(self.daemon.pid())
    }

    /// The process ID of the daemon's parent process, which was started.
    pub fn parent_pid(&self) -> u32 {
        self.daemon.pid()
    }

    /// A VM whose guest has not loaded its driver yet.
    pub fn plug(&self) -> FsGuest {
        self.plug_lacking(VhostUserProtocolFeatures::empty())
    }

    /// A VM whose front-end lacks the protocol features `lacks`, before its guest has loaded its
    /// driver.
    pub fn plug_lacking(&self, lacks: VhostUserProtocolFeatures) -> FsGuest {
        let queues = self.options.request_queues + 1;
        let scratch = queues as u64 * QUEUE_BYTES;
        let ram = guest_ram_with(scratch + SCRATCH_BYTES, self.options.ram_regions);
        let vmm = VmmOptions {
            lacks,
            queues,
            config_bytes: CONFIG_BYTES,
            device_features: 0,
            ..VmmOptions::default()
        };
        let vmm = StrictVmm::connect(&self.dir.path().join("sock"), &ram, vmm).unwrap();
        let driver = DriverOptions { indirect: self.options.indirect, ..DriverOptions::default() };
        let queues =
            (0..queues as u64).map(|i| Queue::new(ram.clone(), i * QUEUE_BYTES, driver)).collect();
        FsGuest::new(vmm, ram, queues, scratch)
    }

    /// A VM whose guest has sent INIT.
    pub fn boot(&self) -> FsGuest {
        let mut guest = self.plug();
        guest.start();
        guest.init();
        guest
    }

    /// Waits until the daemon ends by itself, which it does when its front-end has disconnected.
    pub fn ended(mut self) -> ExitStatus {
        self.wait_end()
    }

    /// Like [`ended`](Self::ended), but keeps the share.
    pub fn wait_end(&mut self) -> ExitStatus {
        self.daemon.wait_end()
    }

    // --- the daemon's resources ---

    /// The targets of its open descriptors.
    pub fn descriptors(&self) -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut names: Vec<_> = entries
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Its resident anonymous memory, in KiB; pages of files are not included.
    pub fn own_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Its maps of files of the share: lines of /proc/PID/maps.
    pub fn file_maps(&self) -> Vec<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let share = self.share.to_str().unwrap();
        // Of another mount namespace, whose root has the share in /share.
        let is_there = |line: &&str| line.contains(share) || line.contains(" /share/");
        maps.lines().filter(is_there).map(str::to_owned).collect()
    }

    /// The number of its maps of files with `name` in their names.
    pub fn maps_of(&self, name: &str) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// The number of its maps.
    pub fn maps(&self) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().count()
    }

    /// The number of its threads.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }

    /// Waits until no thread of it runs, or has run between two looks: what can be done is done, and
    /// what is left waits for something outside. The watchdog is not counted: it looks every few
    /// milliseconds while a request waits, and what it starts shows in other threads.
    pub fn wait_idle(&self) {
        let mut before = None;
        eventually("the daemon to be idle", || {
            let now = self.switches();
            let is_idle = now.is_some() && now == before;
            before = now;
            is_idle
        });
    }

    /// How often each thread has left a processor, but for the watchdog; `None` while one of them is
    /// on it.
    fn switches(&self) -> Option<Vec<u64>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap();
        let of = |status: String| {
            let lines: Vec<_> = status.lines().filter_map(|line| line.split_once(":\t")).collect();
            let get = |key| lines.iter().find(|line| line.0 == key).map(|line| line.1);
            let number = |key| get(key)?.parse::<u64>().ok();
            let is_watchdog = get("Name")? == "watchdog";
            let runs = get("State")?.starts_with('R') && !is_watchdog;
            let switches = number("voluntary_ctxt_switches")?;
            (!runs).then_some(if is_watchdog { 0 } else { switches })
        };
        // None, too, if a thread ends between the listing and the read: it has run.
        tasks.map(|task| of(fs::read_to_string(task.ok()?.path().join("status")).ok()?)).collect()
    }

    /// Waits until its descriptors are those of `before`.
    pub fn wait_descriptors(&self, before: &[String]) {
        eventually("the descriptors to be closed", || self.descriptors() == before);
    }
}

impl Drop for FsHost {
    fn drop(&mut self) {
        self.daemon.kill();
        let said = self.daemon.said();
        if thread::panicking() {
            eprintln!("the daemon said:\n{said}");
        } else {
            assert!(!said.contains("panicked"), "the daemon panicked: {said}");
        }
    }
}
