// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon's processes are left with (SECURITY.md), and what a guest that took over the
//! worker would meet.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};
use tempfile::TempDir;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};
use testkit::slow::skip;
use testkit::{child_of, eventually, worker_of};

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-dax");
const BOTH: u64 = MAP_READ | MAP_WRITE;

/// Capabilities by their numbers (linux/capability.h), as far as SECURITY.md names them.
const CAPABILITIES: [(&str, u32); 10] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("DAC_READ_SEARCH", 2),
    ("FOWNER", 3),
    ("FSETID", 4),
    ("SETGID", 6),
    ("SETUID", 7),
    ("SYS_ADMIN", 21),
    ("MKNOD", 27),
    ("SETFCAP", 31),
];

fn is_root(test: &str) -> bool {
    let is_root = Uid::effective().is_root();
    if !is_root {
        skip(test, "not root");
    }
    is_root
}

/// The table of SECURITY.md: by process, the set of capabilities, and whether there is a filter.
fn documented() -> BTreeMap<String, (u64, bool)> {
    let text = include_str!("../../SECURITY.md");
    let table = text.split("<!-- table: processes -->").nth(1).unwrap();
    let table = table.split("<!-- end -->").next().unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    rows.map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        let bit = |name| {
            let known = CAPABILITIES.iter().find(|(known, _)| *known == name);
            1 << known.unwrap_or_else(|| panic!("{name}")).1
        };
        let set = cells[2].split(' ').filter(|name| *name != "none").map(bit).sum();
        (cells[1].to_owned(), (set, cells[3] == "yes"))
    })
    .collect()
}

/// One line of a process's status, as a number.
fn status(pid: u32, key: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':')).unwrap();
    u64::from_str_radix(line.trim(), 16).unwrap()
}

fn assert_is_as_documented(pid: u32, process: &str) {
    let (set, filtered) = documented()[process];
    for key in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status(pid, key), set, "{process}: {key}");
    }
    for key in ["CapInh", "CapAmb"] {
        assert_eq!(status(pid, key), 0, "{process}: {key}");
    }
    assert_eq!(status(pid, "Seccomp"), if filtered { 2 } else { 0 }, "{process}");
    assert_eq!(status(pid, "NoNewPrivs"), 1, "{process}");
}

/// Names in a process's root.
fn root_of(pid: u32) -> Vec<String> {
    let names = fs::read_dir(format!("/proc/{pid}/root")).unwrap();
    let mut names: Vec<_> =
        names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("share")).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn pmem(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(self.path("sock"));
        command.arg("--file").arg(self.path("file")).args(["--size", "4M"]);
        self.ready(command)
    }

    fn fs(&self) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("fs").arg("--socket-path").arg(self.path("sock"));
        command.arg("--shared-dir").arg(self.path("share")).args(["--tag", "t"]);
        self.ready(command)
    }

    fn ready(&self, mut command: Command) -> Command {
        command.env_remove("RUST_LOG").stdin(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Starts it, looks at it when it waits for a front-end, and ends it.
    fn while_waiting(&self, mut command: Command, look: impl FnOnce(u32)) -> Output {
        use std::io::{BufRead, BufReader, Read};
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("waiting for a front-end") {
            assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "the daemon ended: {said}");
        }
        look(child.id());
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        stderr.read_to_string(&mut said).unwrap();
        let status = child.wait().unwrap();
        Output { status, stdout: Vec::new(), stderr: said.into_bytes() }
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Shows: parent, worker and broker have the capabilities and the filter that SECURITY.md says, of
/// both devices, and see the file tree that it says; SIGTERM to the parent ends all with code 0, and
/// the socket is gone.
#[test]
fn processes_are_left_with_what_is_documented() {
    if !is_root("processes_are_left_with_what_is_documented") {
        return;
    }
    let place = Place::new();
    let done = place.while_waiting(place.pmem(), |pid| {
        let worker = worker_of(pid);
        assert_ne!(worker, pid);
        assert_is_as_documented(pid, "parent");
        assert_is_as_documented(worker, "worker of pmem");
        assert_eq!(root_of(worker), ["proc"]);
        assert_eq!(child_of(pid, "vud-broker"), None);
    });
    assert_eq!(done.status.code(), Some(0), "{}", text(&done));
    for (window, worker) in [("0", "worker of fs, no window"), ("64M", "worker of fs, window")] {
        let mut command = place.fs();
        command.args(["--window-size", window]);
        let done = place.while_waiting(command, |pid| {
            assert_is_as_documented(pid, "parent");
            assert_is_as_documented(worker_of(pid), worker);
            assert_eq!(root_of(worker_of(pid)), ["proc", "share"]);
            let broker = child_of(pid, "vud-broker");
            assert_eq!(broker.is_some(), window != "0");
            if let Some(broker) = broker {
                assert_is_as_documented(broker, "broker");
                assert!(root_of(broker).is_empty());
            }
            for kind in ["mnt", "pid", "net", "ipc", "uts"] {
                let of = |pid| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
                assert_ne!(of(worker_of(pid)), of(pid), "{kind}");
            }
        });
        assert_eq!(done.status.code(), Some(0), "{}", text(&done));
        assert!(!place.path("sock").exists());
    }
}

/// What the worker says of `attempts`, and what the daemon says and ends with.
fn attempt(place: &Place, mut command: Command, attempts: &str) -> String {
    command.env("VUD_TEST_IN_WORKER", attempts);
    let done = place.while_waiting(command, |_| {});
    text(&done)
}

/// Shows: in the worker without a filter the namespaces and capabilities alone keep it from what
/// lies outside: no file of the host, no ptrace, no mount, no other process, no handle without the
/// option.
#[test]
fn namespaces_alone_hold() {
    if !is_root("namespaces_alone_hold") {
        return;
    }
    let place = Place::new();
    let mut command = place.fs();
    command.args(["--seccomp", "none", "--inode-file-handles=never"]);
    let said = attempt(
        &place,
        command,
        "open:/etc/passwd,open:/share/../../etc/passwd,open:/proc/1/root/etc/passwd,mount,chroot,\
         exec:/bin/sh,handle:/share,open:/share",
    );
    let fails = |what: &str, errno: i32| {
        let line = format!("in the worker: {what}: errno {errno}");
        assert!(said.contains(&line), "not '{line}': {said}");
    };
    fails("open:/etc/passwd", libc::ENOENT);
    fails("open:/share/../../etc/passwd", libc::ENOENT);
    fails("open:/proc/1/root/etc/passwd", libc::ENOENT);
    fails("mount", libc::EPERM);
    fails("chroot", libc::EPERM);
    fails("exec:/bin/sh", libc::ENOENT);
    fails("handle:/share", libc::EPERM);
    assert!(said.contains("in the worker: open:/share: done"), "{said}");
}

/// Shows: each forbidden call ends the worker; the parent names the call, ends with code 1, and
/// removes the socket. A file is no exception: what is not there is not opened.
#[test]
fn a_forbidden_call_ends_the_worker() {
    let place = Place::new();
    for (what, name) in [
        ("socket", "socket"),
        ("fork", "clone"),
        ("exec:/bin/sh", "execve"),
        ("ptrace", "ptrace"),
        ("kill", "kill"),
        ("mount", "mount"),
        ("chroot", "chroot"),
        ("unshare", "unshare"),
        ("code", "mmap"),
        ("handler", "rt_sigaction"),
        ("owner", "fcntl"),
        ("tgkill", "tgkill"),
        ("clone", "clone"),
        ("sockopt", "setsockopt"),
    ] {
        for mut command in [place.pmem(), place.fs()] {
            let done = command.env("VUD_TEST_IN_WORKER", what).output().unwrap();
            let said = text(&done);
            assert_eq!(done.status.code(), Some(1), "{what}: {said}");
            let line =
                format!("the worker process was killed by a forbidden system call: {name} (");
            assert!(said.contains(&line), "{what}: {said}");
            assert!(!place.path("sock").exists(), "{what}");
        }
    }
}

/// Shows: a panic of one thread, with the backtrace that RUST_BACKTRACE asks for, is no forbidden
/// call: the worker says it and goes on.
#[test]
fn a_backtrace_is_no_forbidden_call() {
    let place = Place::new();
    for mut command in [place.pmem(), place.fs()] {
        command.env("RUST_BACKTRACE", "1");
        let said = attempt(&place, command, "panic");
        assert!(said.contains("stack backtrace:"), "{said}");
        assert!(said.contains("in the worker: panic: done 1"), "{said}");
    }
}

/// Shows: what the other words of --seccomp do.
#[test]
fn other_actions() {
    let place = Place::new();
    let mut command = place.pmem();
    command.args(["--seccomp", "log"]);
    let said = attempt(&place, command, "socket");
    assert!(said.contains("in the worker: socket: done"), "{said}");
    let mut command = place.pmem();
    command.args(["--seccomp", "trap"]).env("VUD_TEST_IN_WORKER", "socket");
    let done = command.output().unwrap();
    assert_eq!(done.status.code(), Some(1));
    assert!(text(&done).contains("killed by a forbidden system call"), "{}", text(&done));
}

/// Shows: --sandbox chroot serves a share without a window, by file handles and by descriptors, and
/// sees nothing else; pmem sees nothing. --sandbox none leaves the root, and pmem by Landlock no
/// file in it.
#[test]
fn chroot_and_none() {
    if !is_root("chroot_and_none") {
        return;
    }
    for handles in ["never", "mandatory"] {
        let host =
            FsHost::prepared(FsOptions { dax: "inode", ..FsOptions::default() }, |command| {
                let handles = format!("--inode-file-handles={handles}");
                command.args(["--sandbox", "chroot", &handles]);
            });
        assert!(host.said().contains("no window"), "{}", host.said());
        host.put("file", b"hello");
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        assert_eq!(guest.read(node, fh, 0, 5).unwrap(), b"hello");
        assert_eq!(root_of(host.pid()), ["file"]);
        drop(guest);
        assert!(host.ended().success());
    }
    let place = Place::new();
    let mut command = place.pmem();
    command.args(["--sandbox", "chroot"]);
    place.while_waiting(command, |pid| assert!(root_of(worker_of(pid)).is_empty()));
    let mut command = place.pmem();
    command.args(["--sandbox", "none", "--seccomp", "none"]);
    let said = attempt(&place, command, "open:/etc/passwd,stat:/");
    // Without Landlock in the kernel it is opened.
    let line = format!("open:/etc/passwd: errno {}", libc::EACCES);
    if !said.contains(&line) {
        skip("chroot_and_none", "Landlock is not in effect");
    }
}

/// Shows: what contradicts itself is refused with code 2 and one line.
#[test]
fn bad_options() {
    let place = Place::new();
    let cases: &[(&[&str], &str)] = &[
        (&["--modcaps=chown"], "begins with neither + nor -"),
        (&["--modcaps=+nothing"], "no capability 'nothing'"),
        (&["--modcaps=-dac_read_search"], "--inode-file-handles=never"),
        (&["--sandbox", "cage"], "cage"),
        (&["--seccomp", "maybe"], "maybe"),
    ];
    for (options, words) in cases {
        let done = place.fs().args(*options).output().unwrap();
        assert_eq!(done.status.code(), Some(2), "{}", text(&done));
        assert!(text(&done).contains(words), "{}", text(&done));
    }
}

/// Shows: a broker that is killed takes nothing along: a map stays, its file is read and written,
/// it is unmapped; a new map fails with EIO, and one line says why.
#[test]
fn a_broker_that_is_killed() {
    if !is_root("a_broker_that_is_killed") {
        return;
    }
    let host = FsHost::new();
    host.put("old", &vec![1; RANGE as usize]);
    host.put("new", &vec![2; RANGE as usize]);
    let mut guest = host.boot();
    let (old, fh) = guest.opened("old");
    let (new, _) = guest.opened("new");
    guest.setup(old, 0, RANGE, BOTH, 0).unwrap();
    let broker = child_of(host.parent_pid(), "vud-broker").expect("a broker");
    kill(Pid::from_raw(broker as i32), Signal::SIGKILL).unwrap();
    eventually("the broker to end", || child_of(host.parent_pid(), "vud-broker").is_none());
    assert!(guest.vmm.store(0, b"still here"));
    guest.fsync(old, fh).unwrap();
    assert_eq!(&host.get("old")[..10], b"still here");
    for _ in 0..3 {
        assert_eq!(guest.setup(new, 0, RANGE, BOTH, RANGE), Err(libc::EIO));
    }
    assert_eq!(guest.read(old, fh, 0, 5).unwrap(), b"still");
    host.wait_said("the broker process has ended");
    let said = host.said();
    assert_eq!(said.matches("the broker process has ended").count(), 1, "{said}");
    drop(guest);
    let mut host = host;
    let status = host.wait_end();
    assert!(status.success(), "{status}: {}", host.said());
}

/// Shows: the worker and the broker end with a parent that is killed, and the next daemon starts at
/// once on the same socket and file.
#[test]
fn a_parent_that_is_killed_takes_all_along() {
    let place = Place::new();
    for _ in 0..3 {
        let mut child = place.pmem().spawn().unwrap();
        eventually("the socket", || place.path("sock").exists());
        eventually("the worker", || worker_of(child.id()) != child.id());
        let worker = worker_of(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        let done = place.while_waiting(place.pmem(), |_| {
            assert!(!Path::new(&format!("/proc/{worker}/fd/0")).exists());
        });
        assert_eq!(done.status.code(), Some(0), "{}", text(&done));
    }
}

/// Shows: what the daemon inherits is closed: a directory would be a way out.
#[test]
fn inherited_descriptors_are_closed() {
    let place = Place::new();
    let mut command = Command::new("sh");
    command.args(["-c", "exec 7</ 8</etc; exec \"$0\" \"$@\"", BINARY, "pmem"]);
    command.arg("--socket-path").arg(place.path("sock"));
    command.arg("--file").arg(place.path("file")).args(["--size", "4M"]);
    place.while_waiting(place.ready(command), |pid| {
        let fds = fs::read_dir(format!("/proc/{}/fd", worker_of(pid))).unwrap();
        for fd in fds.flatten() {
            // Not by names: a mount of the worker's own has the name "/", too.
            let id = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
            let found = id(&fd.path());
            assert!(found.is_none() || found != id(Path::new("/")), "{fd:?}");
            assert!(found.is_none() || found != id(Path::new("/etc")), "{fd:?}");
        }
    });
}

/// Shows: no descriptor of the worker leads to the host's files by `..`, in any mode that hides
/// them; the standard descriptors are no exception, should one be a directory.
#[test]
fn no_descriptor_leads_out() {
    if !is_root("no_descriptor_leads_out") {
        return;
    }
    let place = Place::new();
    let up = "../".repeat(12);
    for mode in ["namespace", "chroot"] {
        for command in [place.pmem(), place.fs()] {
            let mut shell = Command::new("sh");
            shell.args(["-c", "exec \"$0\" \"$@\" </"]).arg(command.get_program());
            shell.args(command.get_args());
            shell.args(["--sandbox", mode, "--seccomp", "none"]);
            let mut shell = place.ready(shell);
            // Landlock hides files in `chroot`, too, where the kernel has it: of pmem only.
            shell.stdin(Stdio::inherit());
            let said = attempt(&place, shell, &format!("below:{up}etc/passwd,below:../mem"));
            assert_eq!(said.matches(": errno").count(), 2, "{mode}: {said}");
        }
    }
}

/// Shows: a daemon that is started with SIGCHLD ignored has the same sandbox and the same exit
/// code as any other.
#[test]
fn an_ignored_sigchld_weakens_nothing() {
    let place = Place::new();
    let command = place.pmem();
    let mut env = Command::new("env");
    env.args(["--ignore-signal=CHLD", "--"]).arg(command.get_program()).args(command.get_args());
    let done = place.while_waiting(place.ready(env), |pid| {
        let of = |pid| fs::read_link(format!("/proc/{pid}/ns/pid")).unwrap();
        assert_ne!(of(worker_of(pid)), of(pid));
    });
    assert_eq!(done.status.code(), Some(0), "{}", text(&done));
}

/// As a user without any capability.
fn as_nobody(command: &Command) -> Command {
    let mut setpriv = Command::new("setpriv");
    setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--inh-caps=-all"]);
    setpriv.args(["--bounding-set=-all", "--"]).arg(command.get_program()).args(command.get_args());
    setpriv
}

/// Shows: as a plain user both devices start with nothing but the options, and say what is missing;
/// a share is served to a guest.
#[test]
fn a_plain_user_serves_a_guest() {
    if !is_root("a_plain_user_serves_a_guest") {
        return;
    }
    let (place, binary) = place_for_nobody();
    let mut pmem = Command::new(&binary);
    pmem.arg("pmem").arg("--socket-path").arg(place.path("sock"));
    pmem.arg("--file").arg(place.path("file")).args(["--size", "4M"]);
    let done = place.while_waiting(place.ready(as_nobody(&pmem)), |pid| {
        assert_eq!(status(worker_of(pid), "CapEff"), 0);
    });
    assert_eq!(done.status.code(), Some(0), "{}", text(&done));
    let options =
        FsOptions { below: place.0.path().to_owned(), dax: "inode", ..FsOptions::default() };
    for sandbox in [&[][..], &["--sandbox", "none"]] {
        let host = FsHost::prepared(
            FsOptions {
                dax: "inode",
                extra: Vec::new(),
                window_bytes: 64 << 20,
                ..options.clone()
            },
            |command| {
                command.args(sandbox);
                let share = command.get_args().skip_while(|a| *a != "--shared-dir").nth(1).unwrap();
                let home = Path::new(share).parent().unwrap().to_owned();
                for dir in [Path::new(share), &home] {
                    nix::unistd::chown(dir, Some(65534.into()), Some(65534.into())).unwrap();
                }
                let mut plain = Command::new(&binary);
                plain.args(command.get_args());
                *command = as_nobody(&plain);
                command.env_remove("RUST_LOG");
            },
        );
        assert!(host.said().contains("no window"), "{}", host.said());
        host.put("file", b"hello");
        nix::unistd::chown(&host.path("file"), Some(65534.into()), Some(65534.into())).unwrap();
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        assert_eq!(guest.read(node, fh, 0, 5).unwrap(), b"hello");
        drop(guest);
        assert!(host.ended().success());
    }
}

/// A directory with a copy of the daemon that a plain user may run, and the daemon's path.
fn place_for_nobody() -> (Place, PathBuf) {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let binary = dir.path().join("daemon");
    fs::copy(BINARY, &binary).unwrap();
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).unwrap();
    (Place(dir), binary)
}

/// Shows: a plain user's daemon serves a guest whose users are all subordinate users of the host,
/// none of them the daemon's own: what the guest's root creates belongs to the first of them.
#[test]
fn a_plain_user_with_subordinate_users_only() {
    const TEST: &str = "a_plain_user_with_subordinate_users_only";
    if !is_root(TEST) {
        return;
    }
    let (place, binary) = place_for_nobody();
    // In place of the setuid programs of the package uidmap, and of a range in /etc/subuid.
    for what in ["uid", "gid"] {
        let program = place.path(&format!("new{what}map"));
        let script = format!(
            "#!/bin/sh\npid=$1; shift; printf '%s %s %s\\n' \"$@\" > /proc/$pid/{what}_map\n"
        );
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let options = FsOptions {
        below: place.0.path().to_owned(),
        window_bytes: 0,
        extra: vec!["--uid-map=:0:100000:65536:".into(), "--gid-map=:0:200000:65536:".into()],
        ..FsOptions::default()
    };
    let host = FsHost::prepared(options, |command| {
        let share = command.get_args().skip_while(|a| *a != "--shared-dir").nth(1).unwrap();
        let share = Path::new(share);
        for dir in [share, share.parent().unwrap()] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o777)).unwrap();
        }
        let mut setpriv = Command::new("setpriv");
        setpriv.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]);
        setpriv.args(["--inh-caps=-all,+setuid,+setgid", "--ambient-caps=+setuid,+setgid", "--"]);
        setpriv.arg(&binary).args(command.get_args()).env_remove("RUST_LOG");
        let path = std::env::var("PATH").unwrap_or_default();
        setpriv.env("PATH", format!("{}:{path}", place.0.path().display()));
        *command = setpriv;
    });
    let mut guest = host.boot();
    let (node, fh) = guest.create("file").unwrap();
    guest.write(node, fh, 0, b"hello").unwrap();
    let made = fs::metadata(host.path("file")).unwrap();
    assert_eq!((made.uid(), made.gid(), host.get("file")), (100_000, 200_000, b"hello".to_vec()));
    // The worker's user is not the parent's, and the parent has no capability.
    kill(Pid::from_raw(host.parent_pid() as i32), Signal::SIGTERM).unwrap();
    let mut host = host;
    assert!(host.wait_end().success(), "{}", host.said());
}

/// A command that runs `daemon` once a shell, with root's rights in a new mount namespace or user
/// namespace, has run `script`.
fn after(script: &str, unshare: &[&str], daemon: &Command) -> Command {
    let mut command = Command::new("unshare");
    command.args(unshare).args(["sh", "-c", &format!("{script} && exec \"$@\""), "sh"]);
    command.arg(daemon.get_program()).args(daemon.get_args());
    command
}

/// Shows: where a kind of namespace is forbidden, both devices start without namespaces, and one
/// line says so; with --sandbox namespace they are refused with code 2, and no file is left.
#[test]
fn hosts_that_forbid_a_kind_of_namespace() {
    let kinds = ["pid", "mnt", "ipc", "uts", "net"];
    for kind in kinds {
        let script = format!("echo 0 > /proc/sys/user/max_{kind}_namespaces");
        let unshare = ["--user", "--map-root-user"];
        if !after(&script, &unshare, &Command::new("true")).status().is_ok_and(|s| s.success()) {
            skip("hosts_that_forbid_a_kind_of_namespace", "no user namespaces");
            return;
        }
        for fs in [false, true] {
            let place = Place::new();
            let mut daemon = if fs { place.fs() } else { place.pmem() };
            let done = place.while_waiting(place.ready(after(&script, &unshare, &daemon)), |pid| {
                assert_eq!(root_of(worker_of(pid)), root_of(std::process::id()), "{kind}");
            });
            assert_eq!(done.status.code(), Some(0), "{kind}: {}", text(&done));
            assert!(text(&done).contains("no namespaces (unshare: "), "{kind}: {}", text(&done));
            let _ = fs::remove_file(place.path("file"));
            daemon.args(["--sandbox", "namespace"]);
            let done = place.ready(after(&script, &unshare, &daemon)).output().unwrap();
            assert_eq!(done.status.code(), Some(2), "{kind}: {}", text(&done));
            assert_eq!(text(&done).lines().count(), 1, "{kind}: {}", text(&done));
            assert!(!place.path("file").exists() && !place.path("sock").exists(), "{kind}");
        }
    }
}

/// Shows: the limit of the inodes that a guest may know comes from the host's memory and control
/// groups in the sandbox, too, where neither can be read.
#[test]
fn the_memory_of_the_host_is_known_in_the_sandbox() {
    let place = Place::new();
    let limit = |sandbox: &[&str]| {
        let mut command = place.fs();
        command.args(["--log-level", "debug"]).args(sandbox);
        let said = text(&place.while_waiting(command, |_| {}));
        let line = said.lines().find(|line| line.contains("the guest may know"));
        line.unwrap_or_else(|| panic!("{said}")).to_owned()
    };
    assert_eq!(limit(&[]), limit(&["--sandbox", "none"]));
}

/// Shows: without /proc both devices are refused with code 2 and one line that says what to mount,
/// whether or not the file exists, and nothing is left.
#[test]
fn a_host_without_proc() {
    if !is_root("a_host_without_proc") {
        return;
    }
    for has_file in [false, true] {
        let place = Place::new();
        if has_file {
            fs::File::create(place.path("file")).unwrap().set_len(4 << 20).unwrap();
        }
        for daemon in [place.fs(), place.pmem()] {
            for sandbox in ["namespace", "none"] {
                let mut command = after("umount -l /proc", &["--mount"], &daemon);
                command.args(["--sandbox", sandbox]);
                let done = place.ready(command).output().unwrap();
                let said = text(&done);
                assert_eq!(done.status.code(), Some(2), "{said}");
                assert_eq!(said.matches("mount -t proc proc /proc").count(), 1, "{said}");
                assert_eq!(said.lines().count(), 1, "{said}");
                assert_eq!(place.path("file").exists(), has_file, "{said}");
                assert!(!place.path("sock").exists(), "{said}");
            }
        }
    }
}

/// Prints what a map and its removal, a LOOKUP and a READ cost with the sandbox, and with what
/// `--sandbox none --seccomp none` leaves of it: medians of rounds that take turns. By hand.
#[test]
#[ignore = "a measurement"]
fn cost() {
    const ROUNDS: usize = 2000;
    let hosts = [&[][..], &["--sandbox", "none", "--seccomp", "none"]]
        .map(|more| FsHost::told(FsOptions::default(), more));
    let mut guests = hosts.each_ref().map(|host| {
        host.put("file", &vec![1; RANGE as usize]);
        let mut guest = host.boot();
        let (node, fh) = guest.opened("file");
        (guest, node, fh)
    });
    let mut times = [const { [const { Vec::new() }; 3] }; 2];
    for round in 0..ROUNDS {
        for which in [round % 2, 1 - round % 2] {
            let (guest, node, fh) = &mut guests[which];
            let [map, lookup, read] = &mut times[which];
            let begun = std::time::Instant::now();
            guest.setup(*node, 0, RANGE, BOTH, 0).unwrap();
            guest.remove(&[(0, RANGE)]).unwrap();
            map.push(begun.elapsed());
            let begun = std::time::Instant::now();
            guest.node("file");
            lookup.push(begun.elapsed());
            let begun = std::time::Instant::now();
            guest.read(*node, *fh, 0, 4096).unwrap();
            read.push(begun.elapsed());
        }
    }
    for (i, what) in ["map and removal", "LOOKUP", "READ of 4 KiB"].into_iter().enumerate() {
        let [sandboxed, none] = times.each_mut().map(|kinds| {
            kinds[i].sort();
            kinds[i][ROUNDS / 2]
        });
        let ratio = sandboxed.as_secs_f64() / none.as_secs_f64();
        eprintln!("{what}: {sandboxed:?}, without {none:?}: {ratio:.3}x");
    }
}
