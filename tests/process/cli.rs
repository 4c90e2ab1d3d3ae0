// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of the real binary: each kind of invalid input, the socket's creation and
//! removal, the lock.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use testkit::daemon::Daemon;

const BINARY: &str = env!("CARGO_BIN_EXE_vhost-user-dax");
const NOBODY: u32 = 65534;

/// A directory that contains a valid file of 4 MiB.
struct Place {
    dir: TempDir,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("good"), vec![7; 4 << 20]).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn pmem(&self, file: &str) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(self.path("sock"));
        command.arg("--file").arg(self.path(file));
        command.env_remove("RUST_LOG");
        command
    }

    /// A command with a shared directory and a tag. The caller adds the socket and the window.
    fn fs(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(BINARY);
        command.arg("fs").arg("--socket-path").arg(self.path("sock"));
        command.arg("--shared-dir").arg(self.dir.path()).args(["--tag", "share"]).args(arguments);
        command.env_remove("RUST_LOG");
        command
    }

    /// A copy of the daemon that each user can execute: user nobody may have no access to the build
    /// directory. cp makes the copy, since a file that this process writes would stay busy
    /// (ETXTBSY) in a process that another test forks.
    fn program(&self) -> PathBuf {
        let copy = self.path("daemon");
        assert!(Command::new("cp").arg(BINARY).arg(&copy).status().unwrap().success());
        copy
    }

    /// The names in the directory, each with inode, size, blocks and change time.
    fn snapshot(&self) -> BTreeMap<PathBuf, (u64, u64, u64, i64, i64)> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let describe = |path: PathBuf| {
            let m = fs::symlink_metadata(&path).unwrap();
            (path, (m.ino(), m.len(), m.blocks(), m.ctime(), m.ctime_nsec()))
        };
        entries.map(|entry| describe(entry.unwrap().path())).collect()
    }

    /// Runs `command`, which must end with code 2 and one line that contains all `words`, and must
    /// not change the directory.
    fn refuses(&self, command: &mut Command, words: &[&str]) {
        let before = self.snapshot();
        let output = command.stdin(Stdio::null()).output().unwrap();
        let line = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert_eq!(line.lines().count(), 1, "not one line: {line}");
        assert!(line.starts_with("vhost-user-dax: "), "{line}");
        for word in words {
            assert!(line.contains(word), "'{word}' is not in: {line}");
        }
        assert!(output.stdout.is_empty());
        assert_eq!(self.snapshot(), before, "something was created or changed: {line}");
    }

    /// Starts a daemon and returns when it waits for a front-end.
    fn start(&self, command: &mut Command) -> Daemon {
        Daemon::start(command)
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Reports that a test can't run here; ci/test counts these lines.
fn skip(test: &str, why: &str) {
    // Not eprintln!, which the test runner captures.
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}

/// Shows: each kind of invalid file is refused.
#[test]
fn bad_files_are_refused() {
    let place = Place::new();
    place.refuses(&mut place.pmem("missing"), &["missing: no such file", "--size"]);
    fs::create_dir(place.path("dir")).unwrap();
    place.refuses(&mut place.pmem("dir"), &["is a directory", "dir/pmem.img"]);
    nix::unistd::mkfifo(&place.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    place.refuses(&mut place.pmem("fifo"), &["neither a regular file nor a device-DAX node"]);
    fs::write(place.path("odd"), vec![0; 5 << 20]).unwrap();
    place.refuses(&mut place.pmem("odd"), &["no multiple of 2 MiB", "4M or 6M", "fallocate -l 6M"]);
    fs::write(place.path("empty"), b"").unwrap();
    place.refuses(&mut place.pmem("empty"), &["2M or 4M", "fallocate -l 2M"]);
    std::os::unix::fs::symlink("nowhere", place.path("link")).unwrap();
    for size in [&[][..], &["--size", "2M"]] {
        let words = ["is a symbolic link to nowhere", "does not exist"];
        place.refuses(place.pmem("link").args(size), &words);
    }
    let mut node = Command::new(BINARY);
    node.args(["pmem", "--file", "/dev/dax9.9", "--socket-path"]).arg(place.path("sock"));
    place.refuses(&mut node, &["no such device", "daxctl"]);
    place.refuses(place.pmem("nodir/new").args(["--size", "2M"]), &["no such directory"]);
    place.refuses(&mut place.pmem("good/new"), &["Not a directory"]);
}

/// Shows: a file that is the socket, or the lock beside it that the daemon removes, is refused
/// under each of its names.
#[test]
fn a_file_is_not_the_socket() {
    let place = Place::new();
    fs::create_dir(place.path("dir")).unwrap();
    for name in ["sock", "dir/../sock"] {
        let mut command = place.pmem(name);
        place.refuses(command.args(["--size", "2M"]), &["--file and --socket-path", "two paths"]);
    }
    place.refuses(place.pmem("sock.lock").args(["--size", "2M"]), &["lock of --socket-path"]);
    fs::write(place.path("sock.lock"), vec![7; 2 << 20]).unwrap();
    fs::set_permissions(place.path("sock.lock"), fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink("sock.lock", place.path("link")).unwrap();
    for name in ["sock.lock", "link"] {
        place.refuses(&mut place.pmem(name), &["lock of --socket-path", "take another path"]);
    }
}

/// Shows: if RLIMIT_FSIZE is too small for a window, the line names the limit. (Without root
/// privileges the line names root.)
#[test]
fn a_limit_of_the_length_is_named() {
    let place = Place::new();
    let fs = place.fs(&["--dax=always", "--log-level", "error"]);
    let mut command = Command::new("prlimit");
    command.args(["--fsize=1", "--"]).arg(BINARY).args(fs.get_args()).env_remove("RUST_LOG");
    let words = ["--dax=always", if is_root() { "RLIMIT_FSIZE" } else { "as root" }];
    place.refuses(&mut command, &words);
}

/// Shows: invalid options of an fs device are refused, each with a line that names a valid value.
#[test]
fn bad_shares_are_refused() {
    let place = Place::new();
    for (arguments, words) in [
        (&["--window-size", "3M"][..], &["2M or 4M would do"][..]),
        (&["--window-size", "1G"], &["768M would do", "QEMU aborts"]),
        (&["--window-size", "big"], &["512M or 1G"]),
        (&["--dax", "sometimes"], &["inode", "always", "never"]),
        (&["--mem-slots", "maybe"], &["on", "off"]),
        (&["--num-request-queues", "0"], &["1..=31"]),
        (&["--cache", "some"], &["--cache", "auto, always, never or metadata"]),
        (&["--posix-acl=some"], &["--posix-acl", "never, auto, always"]),
        (&["--xattrmap", "foo"], &["--xattrmap", "lacks a field", "':map::user.virtiofs.:'"]),
        (&["--xattrmap", ":all:all:::"], &["--xattrmap", "rule 1", "'all' is no type"]),
        (&["--xattrmap", ":ok:some:::"], &["--xattrmap", "rule 1", "'some' is no scope"]),
        (&["--xattrmap", ":ok:client:::"], &["--xattrmap", "must match all names"]),
        (&["--xattrmap", ":ok:server:::"], &["--xattrmap", "must match all names"]),
        (&["--posix-acl", "--translate-uid", "map:0:1000:1"], &["--posix-acl", "leave one out"]),
        (&["--translate-uid", "nonsense"], &["--translate-uid", "map:0:100000:65536"]),
        (
            &["--translate-uid", "map:0:1000:10", "--translate-uid", "map:9:5000:10"],
            &["--translate-uid map:0:1000:10", "--translate-uid map:9:5000:10", "the guest's ids"],
        ),
        (
            &["--translate-gid=host:1000:0:10", "--translate-gid=squash-host:1009:0:1"],
            &["--translate-gid host:1000:0:10", "squash-host:1009:0:1", "the host's ids"],
        ),
        (
            &["--translate-gid=forbid-guest:0:9", "--translate-gid=guest:8:0:1"],
            &["--translate-gid forbid-guest:0:9", "guest:8:0:1", "the guest's ids"],
        ),
        (
            &["--translate-uid", "guest:0:4294967000:65536"],
            &["--translate-uid", "past the last id"],
        ),
        (
            &["--translate-gid", "squash-guest:0:4294967295:9"],
            &["--translate-gid", "past the last"],
        ),
        (&["--translate-gid", "forbid-guest:9:4294967295"], &["--translate-gid", "past the last"]),
        (&["--modcaps=-dac_read_search"], &["--modcaps", "--inode-file-handles=never"]),
        (&["--rlimit-nofile", "100"], &["use more than"]),
        (&["--uid-map", "nonsense"], &["--uid-map", "':0:1000:1:'"]),
        (&["--gid-map", ":0:1:"], &["--gid-map", "':0:1000:1:'"]),
        (&["--dax=always", "--window-size=0"], &["--dax=always and --window-size 0"]),
        (&["--dax=always", "--readonly"], &["--dax=always and --readonly"]),
        (&["--dax=always", "--uid-map", ":0:0:1:"], &["--dax=always and --uid-map"]),
        (&["--dax=always", "--gid-map", ":0:0:1:"], &["--dax=always and --gid-map"]),
        (&["--window-size=2M", "--dax=never"], &["--window-size and --dax=never"]),
        (&["--window-size=2M", "--readonly"], &["--window-size and --readonly"]),
        (&["--window-size=2M", "--uid-map", ":0:0:1:"], &["--window-size and --uid-map"]),
        (&["--dax-threshold=2M", "--dax=always"], &["--dax-threshold and --dax=always"]),
        (&["--dax-threshold=2M", "--dax=never"], &["--dax-threshold and --dax=never"]),
        (&["--dax-threshold=2M", "--window-size=0"], &["--dax-threshold and --window-size 0"]),
        (&["--persist=cacheline", "--window-size=0"], &["--persist=cacheline and --window-size 0"]),
        (&["--persist=cacheline", "--dax=never"], &["--persist=cacheline and --dax=never"]),
    ] {
        place.refuses(&mut place.fs(arguments), words);
    }
    let mut command = Command::new(BINARY);
    command.args(["fs", "--tag", "t", "--socket-path"]).arg(place.path("sock"));
    place.refuses(&mut command, &["--shared-dir", "try 'vhost-user-dax fs --help'"]);
    command.arg("--shared-dir").arg(place.path("good"));
    place.refuses(&mut command, &["good: Not a directory", "name a directory"]);
    let mut command = Command::new(BINARY);
    command.args(["fs", "--tag", "t", "--shared-dir", "/proc", "--inode-file-handles=mandatory"]);
    let words = ["--inode-file-handles=mandatory", "no file handles", "use prefer"];
    place.refuses(command.arg("--socket-path").arg(place.path("sock")), &words);
    let long = "x".repeat(37);
    let mut command = Command::new(BINARY);
    command.args(["fs", "--tag", &long, "--shared-dir", "/", "--socket-path", "s"]);
    place.refuses(&mut command, &["1 to 36 bytes"]);
    if is_root() {
        let uid_map = ["--uid-map", ":0:0:1:"];
        place.refuses(&mut place.fs(&uid_map), &["not root", "--translate-uid"]);
    } else {
        skip("bad_shares_are_refused", "--uid-map as root: this is not root");
    }
}

/// Shows: options of virtiofsd without an effect are accepted, as by virtiofsd, with a warning.
#[test]
fn idle_options_are_logged() {
    let place = Place::new();
    for (arguments, words) in [
        (&["--writeback", "--cache=never"][..], "--writeback does nothing with --cache=never"),
        (&["--writeback", "--readonly"], "--writeback does nothing with --readonly"),
        (&["--allow-mmap"], "--allow-mmap does nothing without --cache=never or metadata"),
        (&["--allow-mmap", "--cache", "always"], "--allow-mmap does nothing"),
    ] {
        let daemon = place.start(&mut place.fs(arguments));
        assert!(daemon.said().contains(words), "{}", daemon.said());
        assert!(daemon.end_with(Signal::SIGTERM).success());
    }
}

/// Shows: at start the log has a line about the window of a share, or about the reason for none.
#[test]
fn a_share_logs_its_window() {
    let place = Place::new();
    for (arguments, words) in [
        (&["--window-size", "0"][..], "no window: every access is a request"),
        (&["--dax", "never"], "no window: every access is a request"),
        (&["--readonly"], "no window: the share is read-only"),
    ] {
        let daemon = place.start(&mut place.fs(arguments));
        assert!(daemon.said().contains(words), "{}", daemon.said());
        assert!(daemon.end_with(Signal::SIGTERM).success());
    }
    let daemon = place.start(&mut place.fs(&["--window-size", "64M"]));
    let told = ["a window of 64M; the ends of files are mapped", "no window: the end of a file"];
    assert!(told.iter().any(|words| daemon.said().contains(words)), "{}", daemon.said());
}

/// Shows: a daemon that is not root serves from a user namespace with the configured ids.
#[test]
fn an_ordinary_user_has_a_map_of_users() {
    if !is_root() {
        return skip("an_ordinary_user_has_a_map_of_users", "not root, so can't become nobody");
    }
    // In a chroot the kernel allows no user namespace.
    let mut probe = Command::new("unshare");
    if !probe.args(["--user", "true"]).uid(NOBODY).stderr(Stdio::null()).status().unwrap().success()
    {
        return skip("an_ordinary_user_has_a_map_of_users", "no user namespaces here");
    }
    let place = Place::new();
    nix::unistd::chown(place.dir.path(), Some(NOBODY.into()), Some(NOBODY.into())).unwrap();
    let mut command = Command::new(place.program());
    command.args(["fs", "--tag", "share", "--socket-path"]).arg(place.path("sock"));
    command.arg("--shared-dir").arg(place.dir.path()).env_remove("RUST_LOG");
    command.args(["--uid-map", ":0:65534:1:", "--gid-map", ":0:65534:1:"]);
    let daemon = place.start(command.uid(NOBODY).gid(NOBODY));
    for map in ["uid_map", "gid_map"] {
        let told = fs::read_to_string(format!("/proc/{}/{map}", daemon.pid())).unwrap();
        assert_eq!(told.split_whitespace().collect::<Vec<_>>(), ["0", "65534", "1"]);
    }
    assert!(daemon.said().contains("no window"), "{}", daemon.said());
}

/// Shows: an invalid size is refused, and the line names a valid one.
#[test]
fn bad_sizes_are_refused() {
    let place = Place::new();
    place.refuses(place.pmem("new").args(["--size", "3M"]), &["2M or 4M would do"]);
    place.refuses(place.pmem("new").args(["--size", "0"]), &["2M or 4M would do"]);
    place.refuses(place.pmem("new").args(["--size", "many"]), &["512M or 1G"]);
    place.refuses(place.pmem("new").args(["--size", "16777216T"]), &["larger than any file"]);
    place.refuses(place.pmem("good").args(["--size", "6M"]), &["is 4M, not 6M"]);
}

/// Shows: unknown and missing options also end with one line.
#[test]
fn bad_options_are_refused() {
    let place = Place::new();
    place.refuses(Command::new(BINARY).arg("pmem"), &["--socket-path", "--file"]);
    place.refuses(place.pmem("good").arg("--frobnicate"), &["--frobnicate"]);
    place.refuses(place.pmem("good").args(["--fd", "3"]), &["cannot be used with"]);
    let levels = "off, error, warn, info, debug or trace";
    place.refuses(place.pmem("good").args(["--log-level", "loud"]), &["loud", levels]);
    let help = "(try 'vhost-user-dax --help')";
    place.refuses(Command::new(BINARY).arg("foo"), &["foo", help]);
    place.refuses(Command::new(BINARY).arg("--print-capabilities"), &[help]);
    place.refuses(Command::new(BINARY).args(["fs", "--bogus"]), &["'vhost-user-dax fs --help'"]);
}

/// Shows: a file without write permission for this user is refused, and not opened for reading.
#[test]
fn a_file_without_permission_is_refused() {
    let place = Place::new();
    let mut command = place.pmem("good");
    if is_root() {
        command = Command::new(place.program());
        command.uid(NOBODY).gid(NOBODY).arg("pmem").arg("--socket-path").arg("/tmp/never");
        command.arg("--file").arg(place.path("good"));
    } else {
        fs::set_permissions(place.path("good"), fs::Permissions::from_mode(0o444)).unwrap();
    }
    place.refuses(&mut command, &["Permission denied", "uid"]);
}

/// Shows: a disk without room for all blocks is noticed at creation, and the file is removed.
#[test]
fn a_full_disk_is_refused() {
    let may_mount = Command::new("unshare").args(["--mount", "true"]).status();
    if !may_mount.is_ok_and(|status| status.success()) || !Path::new("/dev/loop-control").exists() {
        return skip("a_full_disk_is_refused", "needs root, a mount namespace and loop devices");
    }
    let place = Place::new();
    File::create(place.path("disk")).unwrap().set_len(32 << 20).unwrap();
    fs::create_dir(place.path("mnt")).unwrap();
    // In a mount namespace of its own, so that no mount stays after the test.
    let script = r#"set -e; mkfs.ext4 -q disk; mount -o loop disk mnt; code=0
        "$0" pmem --socket-path mnt/sock --file mnt/new --size 64M || code=$?
        ls -A mnt >&2; exit $code"#;
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", script, BINARY])
        .current_dir(place.dir.path())
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{said}");
    let lines: Vec<_> = said.lines().filter(|line| !line.contains(": info: ")).collect();
    assert!(
        lines[0].contains("no room for 64M (ENOSPC") || lines[0].contains("No space"),
        "{said}"
    );
    assert_eq!(lines[1..], ["lost+found"], "only the file system's own directory is left");
}

/// Shows: without --sparse all blocks exist before the guest starts; with it none does.
#[test]
fn blocks_are_allocated_at_creation_unless_sparse() {
    let place = Place::new();
    let full = place.start(place.pmem("full").args(["--size", "8M"]));
    assert!(fs::metadata(place.path("full")).unwrap().blocks() * 512 >= 8 << 20);
    assert!(full.end_with(Signal::SIGTERM).success());
    let sparse = place.start(place.pmem("holes").args(["--size", "8M", "--sparse"]));
    let made = fs::metadata(place.path("holes")).unwrap();
    assert_eq!((made.len(), made.blocks()), (8 << 20, 0));
    assert_eq!(
        made.mode() & 0o777,
        0o600,
        "the file is the VM's memory: no access for other users"
    );
    assert!(sparse.end_with(Signal::SIGTERM).success());
    let warned = place.start(&mut place.pmem("holes"));
    assert!(warned.said().contains("8M of holes"), "{}", warned.said());
}

/// Shows: at start the log has the method of a flush and what it guarantees. A method that the
/// storage does not support is refused before a file is created.
#[test]
fn persist_is_what_the_backing_can_keep() {
    let place = Place::new();
    let auto = place.start(&mut place.pmem("good"));
    assert!(auto.said().contains("a flush is fdatasync"), "{}", auto.said());
    assert!(auto.said().contains("survives this daemon, the VM and power loss"), "{}", auto.said());
    assert!(auto.end_with(Signal::SIGTERM).success());
    for file in ["good", "new"] {
        let mut command = place.pmem(file);
        command.args(["--size", "4M", "--persist=cacheline"]);
        place.refuses(&mut command, &["--persist=cacheline", "page cache", "take auto or sync"]);
    }
    place.refuses(
        &mut place.fs(&["--persist=cacheline", "--window-size", "2M"]),
        &["--shared-dir", "--persist=cacheline", "take auto or sync"],
    );
    place.refuses(place.pmem("good").arg("--persist=perhaps"), &["--persist", "auto"]);

    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    for (how, said) in [("sync", "a flush is fdatasync"), ("cacheline", "over the dirty lines")] {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(place.path("sock")).arg("--file");
        command.arg(memory.path().join("file")).args(["--size", "4M", "--persist", how]);
        let daemon = place.start(&mut command);
        assert!(daemon.said().contains(said), "{}", daemon.said());
        assert!(daemon.said().contains("no power loss"), "{}", daemon.said());
        assert!(daemon.end_with(Signal::SIGTERM).success());
    }
}

/// Shows: a second daemon on one file is refused, and the lock ends with the first daemon.
#[test]
fn a_second_daemon_on_one_file_is_refused() {
    let place = Place::new();
    let first = place.start(&mut place.pmem("good"));
    let second = || {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--socket-path").arg(place.path("other"));
        command.arg("--file").arg(place.path("good"));
        command
    };
    place.refuses(&mut second(), &["in use by another process"]);
    assert!(first.end_with(Signal::SIGTERM).success());
    drop(place.start(&mut second()));
}

/// Shows: a path that can't be bound is refused, and a socket that a process listens on stays.
#[test]
fn bad_socket_paths_are_refused() {
    let place = Place::new();
    fs::write(place.path("sock"), b"mine").unwrap();
    place.refuses(&mut place.pmem("good"), &["exists and is a file, not a socket"]);
    // A file to create must not appear either when the socket is bad.
    place.refuses(place.pmem("new").args(["--size", "2M"]), &["not a socket"]);
    fs::remove_file(place.path("sock")).unwrap();
    fs::create_dir(place.path("sock")).unwrap();
    place.refuses(
        &mut place.pmem("good"),
        &["exists and is a directory, not a socket", "name a path in it"],
    );
    fs::remove_dir(place.path("sock")).unwrap();
    std::os::unix::fs::symlink("good", place.path("sock")).unwrap();
    place.refuses(&mut place.pmem("good"), &["exists and is a symbolic link, not a socket"]);
    fs::remove_file(place.path("sock")).unwrap();

    let with_socket = |path: PathBuf| {
        let mut command = Command::new(BINARY);
        command.arg("pmem").arg("--file").arg(place.path("good")).arg("--socket-path").arg(path);
        command
    };
    place.refuses(&mut with_socket(place.path(&"s".repeat(108))), &["107"]);
    place.refuses(&mut with_socket(place.path("nodir/sock")), &["directory must exist"]);
    place.refuses(&mut with_socket(place.path("good/sock")), &["good/sock"]);

    let live = UnixListener::bind(place.path("sock")).unwrap();
    live.set_nonblocking(true).unwrap();
    place.refuses(&mut place.pmem("good"), &["another process listens there"]);
    assert!(live.accept().is_err(), "the check must not use up the other process's one session");
}

/// Shows: a socket without a listener is replaced. The daemon's socket is removed after SIGTERM and
/// SIGINT, with exit code 0.
#[test]
fn the_socket_is_removed_at_the_end() {
    let place = Place::new();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        drop(UnixListener::bind(place.path("sock")).unwrap());
        let daemon = place.start(&mut place.pmem("good"));
        assert!(fs::metadata(place.path("sock")).unwrap().file_type().is_socket());
        assert_eq!(daemon.end_with(signal).code(), Some(0));
        assert!(!place.path("sock").exists());
    }
}

/// Shows: a socket that another process has put at the daemon's path is not removed.
#[test]
fn another_socket_in_our_place_is_left_alone() {
    let place = Place::new();
    let daemon = place.start(&mut place.pmem("good"));
    fs::remove_file(place.path("sock")).unwrap();
    let _other = UnixListener::bind(place.path("sock")).unwrap();
    assert_eq!(daemon.end_with(Signal::SIGTERM).code(), Some(0));
    assert!(place.path("sock").exists());
}

/// Runs the binary with `fd` as descriptor 3.
fn with_fd(place: &Place, fd: &OwnedFd) -> Command {
    let mut command = Command::new("bash");
    let script = r#"exec 3<&"$1"; exec "$0" pmem --fd 3 --file "$2""#;
    nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    command.args(["-c", script, BINARY, &fd.as_raw_fd().to_string()]).arg(place.path("good"));
    command
}

/// Shows: --fd accepts only a listening Unix stream socket, and the line names the fault.
#[test]
fn bad_descriptors_are_refused() {
    let place = Place::new();
    let by_number = |fd: &str| {
        let mut command = Command::new(BINARY);
        command.args(["pmem", "--fd", fd]).arg("--file").arg(place.path("good"));
        command
    };
    place.refuses(&mut by_number("77"), &["--fd 77 is not open"]);
    place.refuses(&mut by_number("-1"), &["--fd -1 is not open"]);
    place.refuses(&mut by_number("0"), &["is no socket"]);
    let (pair, _other) = UnixStream::pair().unwrap();
    let bad: [(OwnedFd, &str); 4] = [
        (File::open(place.path("good")).unwrap().into(), "is no socket"),
        (UdpSocket::bind("127.0.0.1:0").unwrap().into(), "is no Unix socket"),
        (UnixDatagram::unbound().unwrap().into(), "is no stream socket"),
        (pair.into(), "is not listening"),
    ];
    for (fd, why) in &bad {
        place.refuses(&mut with_fd(&place, fd), &["--fd 3", why, "systemd"]);
    }
}

/// Shows: an inherited listening socket is served, and its path is not removed.
#[test]
fn an_inherited_listener_is_served() {
    let place = Place::new();
    let listener: OwnedFd = UnixListener::bind(place.path("activated")).unwrap().into();
    let daemon = place.start(&mut with_fd(&place, &listener));
    UnixStream::connect(place.path("activated")).unwrap();
    assert_eq!(daemon.end_with(Signal::SIGTERM).code(), Some(0));
    assert!(place.path("activated").exists());
}

/// Shows: QEMU's conventions: --print-capabilities needs no other option, and prints on stdout.
#[test]
fn capabilities_are_json() {
    let output = Command::new(BINARY).args(["pmem", "--print-capabilities"]).output().unwrap();
    assert!(output.status.success());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["type"], "pmem");
}

/// Shows: a full stream causes no panic: the exit code is 2 for a bad option, and 1 if stdout was
/// requested.
#[test]
fn full_streams_are_no_panic() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    for arguments in [&["fs", "--bogus"][..], &["foo"], &[]] {
        let status = Command::new(BINARY).args(arguments).stderr(full()).status().unwrap();
        assert_eq!(status.code(), Some(2), "{arguments:?}");
    }
    let closed = || Stdio::from(std::io::pipe().unwrap().1);
    for arguments in [
        &["fs", "--print-capabilities"][..],
        &["pmem", "--print-capabilities"],
        &["--help"],
        &["fs", "--version"],
    ] {
        for stdout in [full().into(), closed()] {
            let output = Command::new(BINARY).args(arguments).stdout(stdout).output().unwrap();
            let line = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(1), "{arguments:?}: {line}");
            assert_eq!(line.lines().count(), 1, "{line}");
            assert!(line.contains("stdout can't be written"), "{line}");
        }
    }
}

/// Shows: arguments that are not UTF-8 are refused with one line.
#[test]
fn arguments_that_are_no_text_are_refused() {
    let place = Place::new();
    for before in [&[][..], &["fs"], &["fs", "--tag"]] {
        let mut command = Command::new(BINARY);
        place.refuses(command.args(before).arg(OsStr::from_bytes(b"\xff")), &["--help"]);
    }
}

/// Shows: both commands have --version; the last one of a repeated option counts, as with
/// virtiofsd.
#[test]
fn versions_and_repeated_options() {
    for arguments in [&["--version"][..], &["fs", "--version"], &["pmem", "--version"]] {
        let output = Command::new(BINARY).args(arguments).output().unwrap();
        assert!(output.status.success());
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(said.trim_end().ends_with(env!("CARGO_PKG_VERSION")), "{said}");
    }
    let place = Place::new();
    let last = ["--tag", "last", "--window-size", "2M", "--window-size", "0", "--readonly"];
    let share = place.start(place.fs(&last).arg("--readonly"));
    assert!(share.said().contains("tag last"), "{}", share.said());
    assert!(share.said().contains("no window: every access"), "{}", share.said());
    assert!(share.end_with(Signal::SIGTERM).success());
    let pmem = place.start(place.pmem("missing").arg("--file").arg(place.path("good")));
    assert!(pmem.said().contains("good: 4M"), "{}", pmem.said());
    assert!(pmem.end_with(Signal::SIGTERM).success());
}

/// Shows: if a limit is too low or a capability is missing, one line names the option and a valid
/// value.
#[test]
fn options_beyond_a_limit_or_capability() {
    let name = "options_beyond_a_limit_or_capability";
    if !is_root() {
        return skip(name, "not root, so has no capability to drop");
    }
    let place = Place::new();
    let without = |capability: &str, arguments: &[&str]| {
        let fs = place.fs(arguments);
        let mut command = Command::new("setpriv");
        command.arg(format!("--bounding-set=-{capability}")).arg("--inh-caps=-all");
        command.args(["prlimit", "--nofile=4096:4096"]).arg(BINARY).args(fs.get_args());
        command.env_remove("RUST_LOG");
        command
    };
    place.refuses(
        &mut without("sys_resource", &["--rlimit-nofile", "5000"]),
        &["--rlimit-nofile 5000", "hard limit of 4096 descriptors", "take at most 4096"],
    );
    place.refuses(
        &mut without("dac_read_search", &["--inode-file-handles=mandatory"]),
        &["--inode-file-handles=mandatory", "CAP_DAC_READ_SEARCH", "use prefer"],
    );
    let daemon = place.start(&mut without("dac_read_search", &["--window-size", "0"]));
    let said = daemon.said();
    let warned: Vec<_> = said.lines().filter(|line| line.contains("warn:")).collect();
    assert_eq!(warned.len(), 1, "{said}");
    assert!(warned[0].contains("--inode-file-handles=prefer"), "{}", daemon.said());
    assert!(daemon.end_with(Signal::SIGTERM).success());
}

/// Shows: each session has one line at its end, and a SIGTERM without a session has none.
#[test]
fn a_session_is_reported_once() {
    let place = Place::new();
    for command in [&mut place.pmem("good"), &mut place.fs(&["--window-size", "0"])] {
        let mut child = command.arg("--keep-listening").stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut said = String::new();
        for sessions in 0..3 {
            while !said.contains("waiting for a front-end")
                || said.matches("session ended").count() < sessions
            {
                assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "the daemon ended: {said}");
            }
            if sessions < 2 {
                drop(UnixStream::connect(place.path("sock")).unwrap());
            }
        }
        kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
        stderr.read_to_string(&mut said).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(0));
        assert_eq!(said.matches("session ended").count(), 2, "{said}");
        assert_eq!(said.matches("held back").count(), 0, "{said}");
    }
}

/// Shows: a front-end that hangs up ends a daemon with code 0; with --keep-listening the daemon
/// waits for the next one.
#[test]
fn one_session_or_many() {
    let place = Place::new();
    let mut once = place.start(&mut place.pmem("good"));
    drop(UnixStream::connect(place.path("sock")).unwrap());
    assert_eq!(once.wait_end().code(), Some(0));
    assert!(!place.path("sock").exists());

    let mut command = place.pmem("good");
    let many = place.start(command.arg("--keep-listening"));
    for _ in 0..3 {
        drop(UnixStream::connect(place.path("sock")).unwrap());
    }
    assert_eq!(many.end_with(Signal::SIGTERM).code(), Some(0));
}
