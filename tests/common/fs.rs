// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-user-dax fs`, the real binary, over a directory of its own, and a guest before it. All
//! that tests know of its command line is here.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;

use tempfile::TempDir;
use vhost::vhost_user::VhostUserProtocolFeatures;

use super::driver::DriverOptions;
use super::fuse::FsGuest;
use super::fuse_abi::{MAP_READ, MAP_WRITE};
use super::memory::guest_ram_with;
use super::queue::{QUEUE_BYTES, Queue};
use super::strict_vmm::{StrictVmm, VmmOptions};
use super::{eventually, worker_of};

/// `config_size` for virtio-fs: the tag, the number of request queues, the notification size.
const CONFIG_BYTES: u32 = 44;
/// Guest memory for tests, behind the queues' own.
const SCRATCH_BYTES: u64 = 16 << 20;
/// What Linux asks for at once.
pub const RANGE: u64 = 2 << 20;
/// The window in tests, unless said otherwise.
pub const WINDOW: u64 = 32 * RANGE;

/// How a daemon is started, and what VM it meets.
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
    /// The VM's RAM regions.
    pub ram_regions: u64,
    /// Whether the driver negotiates indirect descriptors.
    pub indirect: bool,
    /// `--persist`
    pub persist: String,
    /// `--dax`
    pub dax: &'static str,
    /// Where the share's directory is made.
    pub below: PathBuf,
    /// More options.
    pub extra: Vec<String>,
    /// Whether somebody reads what the daemon logs.
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
            // All tests of shares can be run with another one, and elsewhere: with TMPDIR.
            persist: std::env::var("VUD_TEST_PERSIST").unwrap_or_else(|_| "auto".into()),
            dax: "always",
            below: std::env::temp_dir(),
            extra: Vec::new(),
            read_log: true,
        }
    }
}

impl FsOptions {
    /// The command line.
    pub fn command(&self, socket: &Path, share: &Path) -> Command {
        // Another daemon can stand in, to try the tests themselves.
        let binary = std::env::var_os("VUD_TEST_FS_BINARY");
        let binary = binary.unwrap_or_else(|| env!("CARGO_BIN_EXE_vhost-user-dax").into());
        let mut command = Command::new(binary);
        command.arg("fs").arg("--socket-path").arg(socket).arg("--shared-dir").arg(share);
        command.args(["--tag", "share", "--window-size", &self.window_bytes.to_string()]);
        command.args(["--num-request-queues", &self.request_queues.to_string()]);
        command.args(["--persist", &self.persist]);
        if self.window_bytes > 0 {
            command.args(["--dax", self.dax]);
        }
        // Else each thread may leave an arena behind, and no map can be told from a leak.
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

/// A daemon over a directory.
pub struct FsHost {
    options: FsOptions,
    /// The share and the socket lie in it.
    pub dir: TempDir,
    share: PathBuf,
    child: Child,
    said: Arc<Mutex<String>>,
    /// A stderr that nobody reads.
    _unread: Option<BufReader<ChildStderr>>,
}

impl FsHost {
    /// A daemon as most tests want it.
    pub fn new() -> Self {
        Self::with(FsOptions::default())
    }

    /// A daemon of one's choice.
    pub fn with(options: FsOptions) -> Self {
        Self::prepared(options, |_| {})
    }

    /// A daemon of one's choice that is told more.
    pub fn told(options: FsOptions, more: &[&str]) -> Self {
        Self::prepared(options, |command| {
            command.args(more);
        })
    }

    /// A daemon whose calls strace may fail: it does so by making them another one, which a filter
    /// would forbid.
    pub fn without_filter() -> Self {
        Self::told(FsOptions::default(), &["--seccomp", "none"])
    }

    /// A daemon whose share is on the disk of TMPDIR.
    pub fn on_a_disk() -> Self {
        Self::with(FsOptions { below: std::env::temp_dir(), ..FsOptions::default() })
    }

    /// Boots a guest that has a file of one range granted for writing, open for writing, stored to, and
    /// settled: the guest, the file's number and its handle.
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

    /// A daemon whose start something is done to.
    pub fn prepared(options: FsOptions, prepare: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir_in(&options.below).unwrap();
        let share = dir.path().join("share");
        fs::create_dir(&share).unwrap();
        let mut command = options.command(&dir.path().join("sock"), &share);
        prepare(&mut command);
        Self::run(options, dir, share, command)
    }

    /// A daemon over a tmpfs of `bytes`, in a mount namespace of its own, so that nothing stays
    /// mounted. `None` if that can't be had here.
    pub fn on_small_tmpfs(options: FsOptions, bytes: u64) -> Option<Self> {
        Self::with_mounts(options, &format!("mount -t tmpfs -o size={bytes} tmpfs \"$SHARE\""))
    }

    /// A daemon in a mount namespace of its own, in which `script` has mounted something in
    /// `$SHARE`. `None` if that can't be had here.
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
        // The way into the daemon's mount namespace.
        let root = PathBuf::from(format!("/proc/{}/root", host.parent_pid()));
        host.share = root.join(host.share.strip_prefix("/").unwrap());
        Some(host)
    }

    fn run(options: FsOptions, dir: TempDir, share: PathBuf, mut command: Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.to_lowercase().contains("waiting for") {
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the daemon ended: {line}");
        }
        let said = Arc::new(Mutex::new(line));
        let theirs = said.clone();
        let _unread = if options.read_log {
            thread::spawn(move || {
                for line in stderr.lines().map_while(Result::ok) {
                    let mut said = theirs.lock().unwrap();
                    said.push_str(&line);
                    said.push('\n');
                }
            });
            None
        } else {
            Some(stderr)
        };
        Self { options, dir, share, child, said, _unread }
    }

    /// A path in the share.
    pub fn path(&self, name: &str) -> PathBuf {
        self.share.join(name)
    }

    /// The file `name` in the share, with `bytes` in it.
    pub fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// The bytes of `name`.
    pub fn get(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// What the daemon has logged.
    pub fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// The daemon's process that serves the guest.
    pub fn pid(&self) -> u32 {
        worker_of(self.child.id())
    }

    /// The daemon's process that was started.
    pub fn parent_pid(&self) -> u32 {
        self.child.id()
    }

    /// A VM whose guest has not loaded its driver.
    pub fn plug(&self) -> FsGuest {
        self.plug_lacking(VhostUserProtocolFeatures::empty())
    }

    /// The same, with a front-end that lacks something.
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

    /// Waits for the daemon to end by itself, which it does when its VM has gone.
    pub fn ended(mut self) -> ExitStatus {
        self.wait_end()
    }

    /// The same, and keeps the share.
    pub fn wait_end(&mut self) -> ExitStatus {
        eventually("the daemon to end", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }

    // --- what the daemon holds ---

    /// Its open descriptors, by what they name.
    pub fn descriptors(&self) -> Vec<String> {
        let entries = fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap();
        let mut names: Vec<_> = entries
            .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
            .map(|name| name.to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    /// Its resident memory that is its own, in KiB: not the files' pages.
    pub fn own_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Its mappings of files of the share.
    pub fn file_maps(&self) -> Vec<String> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let share = self.share.to_str().unwrap();
        // Of another mount namespace, whose root has the share in /share.
        let is_there = |line: &&str| line.contains(share) || line.contains(" /share/");
        maps.lines().filter(is_there).map(str::to_owned).collect()
    }

    /// How many mappings it has of files with `name` in their names.
    pub fn maps_of(&self, name: &str) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// How many mappings it has.
    pub fn maps(&self) -> usize {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        maps.lines().count()
    }

    /// How many threads it has.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }

    /// Waits until it holds no more than `before` of descriptors.
    pub fn wait_descriptors(&self, before: &[String]) {
        eventually("the descriptors to be closed", || self.descriptors() == before);
    }
}

impl Drop for FsHost {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let said = self.said.lock().map(|said| said.clone()).unwrap_or_default();
        if thread::panicking() {
            eprintln!("the daemon said:\n{said}");
        } else {
            assert!(!said.contains("panicked"), "the daemon panicked: {said}");
        }
    }
}
