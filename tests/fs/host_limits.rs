// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows a window on a host that lacks something: inotify instances or watches are used up, or a
//! process aborts the private FUSE mount.

#![allow(unsafe_code)] // A filter of system calls, put on between fork and exec.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse_abi::{MAP_READ, MAP_WRITE};

const BOTH: u64 = MAP_READ | MAP_WRITE;

/// Makes a system call of the child fail with `errno`, as at a limit of the user, without an effect
/// on other processes of the user.
fn fails(command: &mut Command, call: libc::c_long, errno: i32) {
    let step = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0), // seccomp_data.nr
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let put_on = move || {
        let mut filter = filter;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: a system call that reads `program`, which outlives it. It allocates nothing.
        let done = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: `put_on` makes two system calls, and nothing else.
    unsafe { command.pre_exec(put_on) };
}

/// Shows: if the user's inotify instances are used up, the daemon ends with a line that names the
/// sysctl.
#[test]
fn no_inotify_instance() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let mut command = FsOptions::default().command(&socket, dir.path());
    fails(&mut command, libc::SYS_inotify_init1, libc::EMFILE);
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    let last = said.lines().last().unwrap();
    assert!(last.contains("fs.inotify.max_user_instances"), "{said}");
    assert!(last.contains("--window-size 0"), "{said}");
    assert!(!socket.exists());
}

/// Shows: if the user's inotify watches are used up, files are still mapped, and the log has at
/// most one line a second, which names the sysctl, for any number of maps.
#[test]
fn no_inotify_watches() {
    let begun = Instant::now();
    let host = FsHost::prepared(FsOptions::default(), |command| {
        fails(command, libc::SYS_inotify_add_watch, libc::ENOSPC);
    });
    host.put("file", &[7; 5000]);
    let mut guest = host.boot();
    let node = guest.node("file");
    for _ in 0..200 {
        guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
        assert_eq!(guest.vmm.fetch(0, 1).unwrap(), [7]);
        guest.remove(&[(0, RANGE)]).unwrap();
    }
    host.wait_said("fs.inotify.max_user_watches");
    let lines = host.said().matches("fs.inotify.max_user_watches").count();
    assert!(lines as u64 <= 1 + begun.elapsed().as_secs(), "{lines} lines");
}

/// The kernel's directories of the FUSE connections to which the daemon's mapped files belong.
fn connections(host: &FsHost) -> Vec<PathBuf> {
    let all = fs::read_dir(format!("/proc/{}/fd", host.pid())).unwrap();
    let files = all.filter_map(|entry| fs::metadata(entry.unwrap().path()).ok());
    let mapped = files.filter(|file| file.len() == 1 << 62);
    let control = host.path("").with_file_name("control");
    let number = |file: fs::Metadata| nix::sys::stat::minor(file.dev()).to_string();
    let mut all: Vec<_> = mapped.map(|file| control.join(number(file))).collect();
    all.sort();
    all.dedup();
    all
}

/// Shows: when a process aborts the private FUSE mount, existing maps stay, and the next file gets
/// a new mount, again and again. The log has a line about it.
#[test]
fn an_aborted_private_mount() {
    let control = "mkdir \"$SHARE/../control\" && mount -t fusectl fusectl \"$SHARE/../control\"";
    let Some(host) = FsHost::with_mounts(FsOptions::default(), control) else {
        eprintln!("SKIPPED an_aborted_private_mount: no mount namespace can be had here");
        return;
    };
    (0..4).for_each(|i| host.put(&format!("file{i}"), &[b'0' + i as u8; 5000]));
    let mut guest = host.boot();
    let (first, fh) = guest.opened("file0");
    guest.setup(first, 0, RANGE, BOTH, 0).unwrap();
    for i in 1..4 {
        // All connections, also that of the last round, after which nothing else is mapped.
        let connections = connections(&host);
        assert!(!connections.is_empty());
        for connection in &connections {
            fs::write(connection.join("abort"), "1").unwrap();
        }
        assert!(guest.vmm.store(100, b"kept"), "the old map");
        assert_eq!(&host.get("file0")[100..104], b"kept");
        let node = guest.node(&format!("file{i}"));
        let at = i * RANGE;
        guest.setup(node, 0, RANGE, BOTH, at).unwrap();
        assert_eq!(guest.vmm.fetch(at, 1).unwrap(), [b'0' + i as u8]);
        assert!(guest.vmm.store(at, b"new"));
        assert_eq!(&host.get(&format!("file{i}"))[..3], b"new");
        // More ranges of a file of the aborted mount may be granted or refused, but without
        // waiting.
        let more = guest.setup(first, 0, RANGE, BOTH, 8 * RANGE);
        assert!(matches!(more, Ok(()) | Err(libc::EIO)), "{more:?}");
        guest.fsync(first, fh).unwrap();
        guest.set_size(first, 4000).unwrap();
        guest.remove(&[(0, RANGE), (8 * RANGE, RANGE)]).unwrap();
        guest.setup(first, 0, RANGE, BOTH, 0).unwrap();
        assert_eq!(guest.vmm.fetch(100, 4).unwrap(), b"kept");
    }
    assert_eq!(guest.read(first, fh, 100, 4).unwrap(), b"kept");
    let said = host.said();
    assert!(said.contains("aborted, and was re-created"), "{said}");
    assert_eq!(guest.vmm.take_violations(), vec![""; 0]);
}
