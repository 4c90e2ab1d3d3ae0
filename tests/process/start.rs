// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The start and the end of the real daemon: access to the socket, races, signals, unfinished
//! files.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;

use nix::fcntl::{FcntlArg, Flock, FlockArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Group, Pid, Uid, mkfifo};
use tempfile::TempDir;
use testkit::daemon::wait_end;
use testkit::driver::{Answer, Driver, DriverOptions};
use testkit::eventually;
use testkit::fs::FsHost;
use testkit::memory::guest_ram;
use testkit::slow::{Strace, skip};
use testkit::strict_vmm::{StrictVmm, VmmOptions};
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-dax");
const NOBODY: u32 = 65534;

/// A directory that each user may read, for valid files of 4 MiB.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, vec![7; 4 << 20]).unwrap();
        path
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The command `before` is put in front of the daemon's, and executes it.
    fn pmem_behind(&self, before: &[&str], file: &Path) -> Command {
        let mut words = before.iter().map(std::ffi::OsStr::new).chain([BINARY.as_ref()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("pmem").arg("--socket-path").arg(self.path("sock"));
        command.arg("--file").arg(file).env_remove("RUST_LOG").stderr(Stdio::piped());
        command
    }

    /// Takes the lock beside the socket, like another process that hangs.
    fn held_lock(&self) -> Flock<File> {
        let mut options = File::options();
        options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(self.path("sock.lock")).unwrap();
        Flock::lock(file, FlockArg::LockExclusiveNonblock).unwrap()
    }

    fn pmem(&self, file: &Path) -> Command {
        self.pmem_behind(&[], file)
    }
}

/// A daemon whose stderr is not read.
struct Silent(Child);

impl Silent {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.0.id() as i32), signal).unwrap();
    }

    fn ended(&mut self) -> Option<i32> {
        wait_end(&mut self.0).code()
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A daemon, and the text of its stderr.
struct Daemon {
    child: Child,
    stderr: BufReader<ChildStderr>,
    said: String,
}

impl Daemon {
    fn spawn(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Self { child, stderr, said: String::new() }
    }

    /// Whether a line with `words` comes before the daemon ends.
    fn prints(&mut self, words: &str) -> bool {
        loop {
            let from = self.said.len();
            if self.stderr.read_line(&mut self.said).unwrap() == 0 {
                return false;
            }
            if self.said[from..].contains(words) {
                return true;
            }
        }
    }

    fn must_print(&mut self, words: &str) {
        assert!(self.prints(words), "the daemon ended without '{words}': {}", self.said);
    }

    fn waiting(command: &mut Command) -> Self {
        let mut daemon = Self::spawn(command);
        daemon.must_print("waiting for a front-end");
        daemon
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits until the daemon has blocked SIGTERM.
    fn wait_until_signals_are_blocked(&self) {
        let status = format!("/proc/{}/status", self.child.id());
        let is_blocked = || {
            let status = fs::read_to_string(&status).unwrap();
            let mut lines = status.lines();
            let mask = lines.find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
            u64::from_str_radix(mask.trim(), 16).unwrap() & 1 << (Signal::SIGTERM as i32 - 1) != 0
        };
        eventually("SIGTERM to be blocked", is_blocked);
    }

    /// Waits for the end. Returns the exit code, and the text of stderr.
    fn ended(&mut self) -> (Option<i32>, String) {
        let ended = wait_end(&mut self.child);
        while self.stderr.read_line(&mut self.said).unwrap() > 0 {}
        (ended.code(), self.said.clone())
    }

    fn terminated(mut self) {
        self.signal(Signal::SIGTERM);
        let (code, said) = self.ended();
        assert_eq!(code, Some(0), "{said}");
    }

    /// The daemon must end with code 2, and with one line that contains all `words`, besides lines
    /// of the level info.
    fn refuses(command: &mut Command, words: &[&str]) {
        Self::fails(command, 2, words);
    }

    /// The daemon must end with `code`, and with such a line.
    fn fails(command: &mut Command, code: i32, words: &[&str]) {
        let (ended, said) = Self::spawn(command).ended();
        assert_eq!(ended, Some(code), "{said}");
        let lines: Vec<_> = said.lines().filter(|line| !line.contains(": info: ")).collect();
        assert_eq!(lines.len(), 1, "{said}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} are not in: {said}");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn limit(pid: u32, what: &str) {
    let done = Command::new("prlimit").args(["--pid", &pid.to_string(), what]).status();
    assert!(done.unwrap().success(), "prlimit {what}");
}

// --- access to the socket ---

/// Connects as user nobody with the given group.
fn connect_as_nobody(path: PathBuf, group: u32) -> io::Result<UnixStream> {
    let nobody = move || {
        use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
        let (gid, uid) = (rustix::fs::Gid::from_raw(group), rustix::fs::Uid::from_raw(NOBODY));
        set_thread_groups(&[])?;
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        UnixStream::connect(path)
    };
    thread::spawn(nobody).join().unwrap()
}

/// Shows for both devices: the mode of the socket is 0600 with each umask, and other users can't
/// connect. With --socket-group it is 0660, and members of the group can connect. (The attack's
/// t20.)
#[test]
fn only_its_user_and_its_group_may_connect() {
    if !Uid::effective().is_root() {
        return skip("only_its_user_and_its_group_may_connect", "not root, so can't become nobody");
    }
    let Ok(Some(group)) = Group::from_name("nogroup") else {
        return skip("only_its_user_and_its_group_may_connect", "no group 'nogroup'");
    };
    let place = Place::new();
    let file = place.file("file");
    for umask in ["000", "022", "077", "777"] {
        let script = format!("umask {umask}; exec \"$0\" \"$@\"");
        let before = ["sh", "-c", &script];
        for device in ["pmem", "fs"] {
            for grouped in [false, true] {
                let mut command = Command::new(before[0]);
                command.args(&before[1..]).args([BINARY, device]).env_remove("RUST_LOG");
                command.arg("--socket-path").arg(place.path("sock"));
                match device {
                    "pmem" => command.arg("--file").arg(&file),
                    _ => command.args(["--tag", "t", "--shared-dir"]).arg(place.0.path()),
                };
                if grouped {
                    command.args(["--socket-group", "nogroup"]);
                }
                let daemon = Daemon::waiting(&mut command);
                let made = fs::symlink_metadata(place.path("sock")).unwrap();
                let (mode, gid) = (made.mode() & 0o7777, Gid::from_raw(made.gid()));
                assert_eq!(mode, if grouped { 0o660 } else { 0o600 }, "{umask} {device}");
                assert_eq!(gid == group.gid, grouped);
                let stranger = connect_as_nobody(place.path("sock"), 12345);
                assert_eq!(stranger.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
                let member = connect_as_nobody(place.path("sock"), group.gid.as_raw());
                assert_eq!(member.is_ok(), grouped);
                drop((member, daemon));
                assert!(place.path("sock").exists(), "it was killed");
            }
        }
    }
}

/// Shows: other users can connect at no moment: the umask is set before the bind, and not changed
/// in between.
#[test]
fn the_mode_of_the_socket_is_never_wider() {
    if !Strace::is_here() {
        return skip("the_mode_of_the_socket_is_never_wider", "no strace");
    }
    let place = Place::new();
    let trace = place.path("trace");
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-e", "trace=umask,bind,listen", "-o"]).arg(&trace);
    command.args([BINARY, "fs", "--tag", "t", "--shared-dir"]).arg(place.0.path());
    command.arg("--socket-path").arg(place.path("sock")).env_remove("RUST_LOG");
    Daemon::waiting(&mut command).terminated();
    let trace = fs::read_to_string(trace).unwrap();
    let at = trace.find("bind(").expect("a bind");
    let umasks: Vec<_> = trace[..at].lines().filter(|line| line.contains("umask(")).collect();
    assert_eq!(umasks.len(), 1, "{trace}");
    assert!(umasks[0].contains("umask(0177)"), "{trace}");
}

/// Shows: an unknown group, and a group for an inherited socket, are refused before a file is
/// created.
#[test]
fn bad_groups_are_refused() {
    let place = Place::new();
    let file = place.file("file");
    let mut command = place.pmem(&file);
    Daemon::refuses(command.args(["--socket-group", "no such group"]), &["--socket-group no such"]);
    let mut command = Command::new(BINARY);
    command.args(["pmem", "--fd", "3", "--socket-group", "nogroup", "--file"]).arg(&file);
    Daemon::refuses(&mut command, &["--socket-group"]);
    assert_eq!(place.names(), ["file"]);
}

// --- two daemons, one path ---

/// Shows: of four daemons that start at one time for one path with a dead socket, exactly one binds
/// it and can be connected to. The others report that it is in use, and leave no file.
#[test]
fn one_of_many_daemons_wins() {
    const DAEMONS: usize = 4;
    let place = Place::new();
    for round in 0..25 {
        drop(UnixListener::bind(place.path("sock")).unwrap());
        let started: Vec<_> = (0..DAEMONS)
            .map(|i| {
                let mut command = place.pmem(&place.path(&format!("file{i}")));
                let mut daemon = Daemon::spawn(command.args(["--size", "8M"]));
                thread::spawn(move || (daemon.prints("waiting for a front-end"), daemon))
            })
            .collect();
        let mut ended: Vec<_> = started.into_iter().map(|t| t.join().unwrap()).collect();
        let winner = ended.iter().position(|(waits, _)| *waits).expect("a daemon that waits");
        let (_, mut winner) = ended.remove(winner);
        for (waits, loser) in &mut ended {
            assert!(!*waits, "round {round}: two daemons have the socket");
            let (code, said) = loser.ended();
            assert_eq!(code, Some(2), "{said}");
            assert!(said.contains("another process listens there"), "{said}");
        }
        let names = place.names();
        let files = names.iter().filter(|name| name.starts_with("file")).count();
        assert_eq!((files, names.len()), (1, 2), "round {round}: {names:?}");
        drop(UnixStream::connect(place.path("sock")).expect("the winner's socket is removed"));
        assert_eq!(winner.ended().0, Some(0));
        assert!(!place.path("sock").exists());
        fs::remove_file(place.path(names.iter().find(|name| *name != "sock").unwrap())).unwrap();
    }
}

/// Shows: a daemon that ends after another one has bound its path does not remove that socket.
#[test]
fn the_next_socket_is_left_alone() {
    let place = Place::new();
    let (one, two) = (place.file("one"), place.file("two"));
    for _ in 0..10 {
        let mut first = Daemon::waiting(&mut place.pmem(&one));
        let front_end = UnixStream::connect(place.path("sock")).unwrap();
        first.must_print("a front-end has connected");
        // The daemon serves one front-end and closes its socket, which the second daemon then
        // replaces.
        let sock = place.path("sock");
        eventually("the socket to be dead", || UnixStream::connect(&sock).is_err());
        let second = Daemon::waiting(&mut place.pmem(&two));
        drop(front_end);
        assert_eq!(first.ended().0, Some(0));
        UnixStream::connect(place.path("sock")).expect("the second daemon's socket is removed");
        drop(second);
    }
}

/// Shows: the lock beside a socket is removed at the end of the start, and an empty one of a killed
/// daemon is taken over. A lock file with content, or another kind of file, is refused and named.
#[test]
fn a_left_lock_is_taken_over() {
    let place = Place::new();
    let file = place.file("file");
    File::create(place.path("sock.lock")).unwrap();
    let private = fs::Permissions::from_mode(0o600);
    fs::set_permissions(place.path("sock.lock"), private).unwrap();
    let daemon = Daemon::waiting(&mut place.pmem(&file));
    assert_eq!(place.names(), ["file", "sock"]);
    daemon.terminated();
    fs::write(place.path("sock.lock"), "precious").unwrap();
    fs::set_permissions(place.path("sock.lock"), fs::Permissions::from_mode(0o600)).unwrap();
    Daemon::refuses(&mut place.pmem(&file), &["sock.lock", "remove it"]);
    assert_eq!(fs::read(place.path("sock.lock")).unwrap(), b"precious");
    fs::remove_file(place.path("sock.lock")).unwrap();
    mkfifo(&place.path("sock.lock"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    Daemon::refuses(&mut place.pmem(&file), &["sock.lock"]);
}

/// Shows: if another process holds the lock beside the socket, a start ends with one line and code
/// 2, or at SIGTERM with code 0. No file is created in both cases.
#[test]
fn a_held_lock_ends_a_start() {
    let place = Place::new();
    let file = place.file("file");
    let _held = place.held_lock();
    for device in ["pmem", "fs"] {
        let command = || match device {
            "pmem" => place.pmem(&file),
            _ => {
                let mut command = Command::new(BINARY);
                command.args(["fs", "--tag", "t", "--shared-dir"]).arg(place.0.path());
                command.arg("--socket-path").arg(place.path("sock")).env_remove("RUST_LOG");
                command
            }
        };
        let mut told = Daemon::spawn(&mut command());
        told.wait_until_signals_are_blocked();
        told.signal(Signal::SIGTERM);
        assert_eq!(told.ended(), (Some(0), String::new()));
        Daemon::refuses(&mut command(), &["another process has held", "sock.lock"]);
        assert_eq!(place.names(), ["file", "sock.lock"]);
    }
}

/// Shows: if another process holds that lock, a daemon still ends: the socket stays, and a line
/// names the reason.
#[test]
fn a_held_lock_delays_no_end() {
    let place = Place::new();
    let file = place.file("file");
    for sigterm in [true, false] {
        let mut daemon = Daemon::waiting(&mut place.pmem(&file));
        let held = place.held_lock();
        if sigterm {
            daemon.signal(Signal::SIGTERM);
        } else {
            drop(UnixStream::connect(place.path("sock")).unwrap());
        }
        let (code, said) = daemon.ended();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("remove the socket: another process has held"), "{said}");
        assert_eq!(place.names(), ["file", "sock", "sock.lock"]);
        drop(held);
    }
    Daemon::waiting(&mut place.pmem(&file)).terminated();
    assert_eq!(place.names(), ["file"]);
}

// --- a stderr that is not read ---

/// A pipe whose buffer is full. The caller keeps the reading end.
fn full_pipe() -> (io::PipeReader, io::PipeWriter) {
    let (reader, writer) = io::pipe().unwrap();
    let set = |flags| fcntl(&writer, FcntlArg::F_SETFL(flags)).unwrap();
    set(OFlag::O_NONBLOCK);
    // A write of at most PIPE_BUF (4096) bytes is done as a whole, or not at all.
    for bytes in [4096, 1] {
        while (&writer).write(&vec![b'x'; bytes]).is_ok() {}
    }
    set(OFlag::empty());
    (reader, writer)
}

/// Shows: SIGTERM ends a daemon that is creating its file and whose stderr is full.
#[test]
fn a_full_stderr_keeps_no_signal_away() {
    let place = Place::new();
    let (_reader, full) = full_pipe();
    let mut command = place.pmem(&place.path("new"));
    let child = command.args(["--size", "4M"]).stderr(full).spawn().unwrap();
    let mut daemon = Silent(child);
    eventually("the file", || place.path("new").exists());
    daemon.signal(Signal::SIGTERM);
    assert_eq!(daemon.ended(), Some(0));
    assert!(!place.path("sock").exists());
}

/// Shows: a start that is refused ends with code 2, also if stderr is full.
#[test]
fn a_full_stderr_holds_no_refusal_up() {
    let place = Place::new();
    let (_reader, full) = full_pipe();
    let child = place.pmem(&place.path("missing")).stderr(full).spawn().unwrap();
    assert_eq!(Silent(child).ended(), Some(2));
}

// --- a front-end that does not answer ---

/// Shows: SIGTERM ends a daemon whose front-end has read a map message and does not answer it, with
/// each sender of the map.
#[test]
fn a_map_without_an_answer_keeps_no_signal_away() {
    for lacks in [Protocol::empty(), Protocol::SHARED_OBJECT] {
        let place = Place::new();
        let file = place.file("file");
        let mut command = place.pmem(&file);
        let daemon = Daemon::waiting(command.args(["--mem-slots", "off"]));
        let ram = guest_ram(1);
        let options = VmmOptions { lacks, ..VmmOptions::default() };
        let mut vmm = StrictVmm::connect(&place.path("sock"), &ram, options).unwrap();
        let mut driver = Driver::new(ram, DriverOptions::default());
        vmm.start(&mut driver);
        vmm.wait_live(1);
        assert_eq!(driver.flush_and_wait(), Answer::OK);
        vmm.reset();
        driver.reset(driver.options());
        vmm.hang_in_map();
        let seen = vmm.map_requests();
        vmm.start(&mut driver);
        vmm.wait_map_requests(seen + 1);
        let _never_answered = driver.flush();
        daemon.terminated();
        assert_eq!(place.names(), ["file"]);
        drop(vmm);
    }
}

// --- a start that is interrupted ---

/// A daemon that creates a file of 64 GiB. strace delays each fallocate(2), and lets none allocate.
fn in_the_middle_of_allocating(place: &Place) -> Daemon {
    let pipe = place.path("trace");
    let _ = fs::remove_file(&pipe);
    mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // -D: the child is the daemon itself, so it gets the signal.
    let how = "inject=fallocate:retval=0:delay_exit=200000";
    let before =
        ["strace", "-D", "-f", "-o", pipe.to_str().unwrap(), "-e", "trace=fallocate", "-e", how];
    let mut command = place.pmem_behind(&before, &place.path("new"));
    let daemon = Daemon::spawn(command.args(["--size", "64G"]));
    let mut trace = BufReader::new(File::open(pipe).unwrap());
    let mut line = String::new();
    while !line.contains("fallocate(") {
        line.clear();
        assert_ne!(trace.read_line(&mut line).unwrap(), 0, "no fallocate");
    }
    // strace must not wait for a reader of the pipe.
    thread::spawn(move || io::copy(&mut trace, &mut io::sink()));
    daemon
}

/// Shows: SIGTERM and SIGINT during the allocation of a file end the daemon with code 0 long before
/// the allocation would end, and remove the file and the socket.
#[test]
fn a_signal_breaks_off_an_allocation() {
    if !Strace::is_here() {
        return skip("a_signal_breaks_off_an_allocation", "no strace");
    }
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = in_the_middle_of_allocating(&place);
        assert!(place.path("new").exists() && place.path("sock").exists());
        daemon.signal(signal);
        let (code, said) = daemon.ended();
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("removing the incomplete file"), "{said}");
        assert!(!said.contains("waiting for a front-end"), "{said}");
        assert_eq!(place.names(), ["trace"]);
    }
}

/// Shows: an unfinished file of a killed daemon is never used, with --size and without it.
#[test]
fn an_unfinished_file_is_refused() {
    if !Strace::is_here() {
        return skip("an_unfinished_file_is_refused", "no strace");
    }
    let place = Place::new();
    let mut daemon = in_the_middle_of_allocating(&place);
    daemon.signal(Signal::SIGKILL);
    daemon.ended();
    let left = place.path("new");
    let before = fs::metadata(&left).unwrap();
    Daemon::refuses(&mut place.pmem(&left), &["lacks one byte", "remove it"]);
    Daemon::refuses(place.pmem(&left).args(["--size", "64G"]), &["lacks one byte", "remove it"]);
    let after = fs::metadata(&left).unwrap();
    assert_eq!((before.len(), before.ctime_nsec()), (after.len(), after.ctime_nsec()));
}

/// Shows: a front-end that connects during the allocation of the file is served afterwards.
#[test]
fn a_front_end_may_come_early() {
    if !Strace::is_here() {
        return skip("a_front_end_may_come_early", "no strace");
    }
    let place = Place::new();
    let how = "inject=fallocate:delay_exit=500000";
    let before = ["strace", "-D", "-f", "-o", "/dev/null", "-e", "trace=fallocate", "-e", how];
    let mut command = place.pmem_behind(&before, &place.path("new"));
    let mut daemon = Daemon::spawn(command.args(["--size", "8M"]));
    daemon.must_print("creating");
    let front_end = UnixStream::connect(place.path("sock")).unwrap();
    daemon.must_print("a front-end has connected");
    drop(front_end);
    assert_eq!(daemon.ended().0, Some(0));
}

/// Shows: SIGHUP does not end the daemon.
#[test]
fn sighup_ends_no_daemon() {
    let place = Place::new();
    let mut daemon = Daemon::waiting(&mut place.pmem(&place.file("file")));
    daemon.signal(Signal::SIGHUP);
    daemon.must_print("SIGHUP");
    drop(UnixStream::connect(place.path("sock")).unwrap());
    assert_eq!(daemon.ended().0, Some(0));
}

// --- limits and permissions of the process ---

/// Shows: a write of the guest past RLIMIT_FSIZE is EFBIG for the guest, and does not end the
/// daemon. (The attack's t31.)
#[test]
fn a_limit_of_file_sizes_ends_no_daemon() {
    let host = FsHost::new();
    host.put("f", b"x");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    limit(host.pid(), "--fsize=1048576:unlimited");
    for _ in 0..3 {
        assert_eq!(guest.write(node, fh, 10 << 20, b"1234"), Err(libc::EFBIG));
    }
    assert_eq!(guest.write(node, fh, 1000, b"1234"), Ok(4));
    assert_eq!(host.get("f").len(), 1004);
    drop(guest);
    assert!(host.ended().success());
}

/// Shows: that limit refuses a pmem file that would be too long, by an error line and not by
/// SIGXFSZ.
#[test]
fn a_limit_of_file_sizes_refuses_a_new_file() {
    let place = Place::new();
    let before = ["prlimit", "--fsize=1048576", "--"];
    for more in [&["--size", "4M"][..], &["--size", "4M", "--sparse"]] {
        let mut command = place.pmem_behind(&before, &place.path("new"));
        Daemon::refuses(
            command.args(more),
            &["4M is longer than a file may be here", "RLIMIT_FSIZE, 1M here"],
        );
        assert!(place.names().is_empty());
    }
}

/// Shows: if unshare(2) fails, the share is not served, since the daemon's threads would share an
/// umask, and one line reports it. (The attack's t15.)
#[test]
fn without_unshare_no_share_is_served() {
    if !Strace::is_here() {
        return skip("without_unshare_no_share_is_served", "no strace");
    }
    let place = Place::new();
    let mut command = Command::new("strace");
    command.args(["-D", "-f", "-o", "/dev/null", "-e", "trace=unshare"]);
    command.args(["-e", "inject=unshare:error=EPERM", BINARY, "fs", "--tag", "t"]);
    command.args(["--sandbox", "none", "--seccomp", "none"]);
    command.arg("--socket-path").arg(place.path("sock")).args(["--window-size", "0"]);
    command.arg("--shared-dir").arg(place.0.path()).env_remove("RUST_LOG");
    Daemon::fails(&mut command, 1, &["unshare(CLONE_FS)", "permit unshare"]);
    assert!(place.names().is_empty());
}

/// Shows: a path that is no file is refused without an open for reading or writing.
#[test]
fn a_device_is_not_opened_to_be_refused() {
    if !Strace::is_here() {
        return skip("a_device_is_not_opened_to_be_refused", "no strace");
    }
    let place = Place::new();
    std::os::unix::fs::symlink("/dev/null", place.path("device")).unwrap();
    mkfifo(&place.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    for name in ["device", "fifo"] {
        let trace = place.path("trace");
        let (path, out) = (place.path(name), trace.to_str().unwrap());
        let before = ["strace", "-D", "-f", "-e", "trace=open,openat,openat2", "-o", out];
        let words = ["neither a regular file nor a device-DAX node"];
        Daemon::refuses(&mut place.pmem_behind(&before, &path), &words);
        let trace = fs::read_to_string(&trace).unwrap();
        let opened: Vec<_> =
            trace.lines().filter(|line| line.contains(path.to_str().unwrap())).collect();
        assert!(!opened.is_empty(), "{trace}");
        assert!(opened.iter().all(|line| line.contains("O_PATH")), "{opened:?}");
    }
}

/// Shows: a symbolic link to a file is followed.
#[test]
fn a_link_to_a_file_is_served() {
    let place = Place::new();
    std::os::unix::fs::symlink(place.file("file"), place.path("link")).unwrap();
    Daemon::waiting(&mut place.pmem(&place.path("link"))).terminated();
    assert!(fs::symlink_metadata(place.path("link")).unwrap().file_type().is_symlink());
    assert!(!fs::metadata(place.path("link")).unwrap().file_type().is_socket());
}

// --- one front-end after another ---

/// Shows: with --keep-listening a daemon without descriptors for a front-end continues, and serves
/// that front-end when it has some.
#[test]
fn a_lack_of_descriptors_is_waited_out() {
    let place = Place::new();
    let mut command = place.pmem(&place.file("file"));
    let mut daemon = Daemon::waiting(command.arg("--keep-listening"));
    limit(testkit::worker_of(daemon.child.id()), "--nofile=8:1024");
    let front_end = UnixStream::connect(place.path("sock")).unwrap();
    daemon.must_print("can't be served yet");
    limit(testkit::worker_of(daemon.child.id()), "--nofile=1024:1024");
    daemon.must_print("a front-end has connected");
    drop(front_end);
    drop(UnixStream::connect(place.path("sock")).unwrap());
    daemon.must_print("a front-end has connected");
    daemon.terminated();
}

/// Shows: the log has a line about each front-end that connects while another one is served. It is
/// not accepted before the other one has hung up.
#[test]
fn waiting_front_ends_are_logged() {
    let place = Place::new();
    let mut command = place.pmem(&place.file("file"));
    let mut daemon = Daemon::waiting(command.arg("--keep-listening"));
    let first = UnixStream::connect(place.path("sock")).unwrap();
    daemon.must_print("a front-end has connected");
    let second = UnixStream::connect(place.path("sock")).unwrap();
    daemon.must_print("another front-end has connected, and waits");
    drop(first);
    daemon.must_print("a front-end has connected");
    drop(second);
    // Front-ends of the same second share a line.
    let threads = || {
        fs::read_dir(format!("/proc/{}/task", testkit::worker_of(daemon.child.id())))
            .unwrap()
            .count()
    };
    eventually("the session's threads to end", || threads() <= 4);
    daemon.terminated();
}

// --- the file system of the file ---

/// Shows: an untested file system has no guarantee in the log; ramfs and hugetlbfs are memory.
#[test]
fn file_systems_are_promised_what_was_found() {
    let may_mount = Command::new("unshare").args(["--mount", "true"]).status();
    if !may_mount.is_ok_and(|status| status.success()) {
        return skip("file_systems_are_promised_what_was_found", "needs root");
    }
    let place = Place::new();
    for (mount, promise) in [
        ("mount -t ramfs none mnt", "is in memory: a flush is fdatasync"),
        ("mount -t hugetlbfs -o pagesize=2M none mnt", "is in memory: a flush is fdatasync"),
        (
            "mount -t tmpfs none mnt; mkdir mnt/u mnt/w mnt/m; mount -t overlay \
             -o lowerdir=/etc,upperdir=mnt/u,workdir=mnt/w none mnt",
            "unknown file system, 0x794c7630 (overlayfs): a flush is fdatasync; data of an \
             answered flush is as durable as that file system's fdatasync",
        ),
    ] {
        let _ = fs::create_dir(place.path("mnt"));
        let script = format!(
            "set -e; {mount}; truncate -s 4M mnt/file; exec \"$0\" pmem \
             --socket-path sock --file mnt/file"
        );
        let mut command = Command::new("unshare");
        command.args(["--mount", "--propagation", "private", "sh", "-c", &script, BINARY]);
        let daemon = Daemon::waiting(command.current_dir(place.0.path()).env_remove("RUST_LOG"));
        assert!(daemon.said.contains(promise), "{}", daemon.said);
        daemon.terminated();
    }
}
