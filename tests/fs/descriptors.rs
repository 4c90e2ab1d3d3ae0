// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that a guest can't use the descriptors that the daemon needs, that a share with more files
//! than descriptors works, and that without descriptors, requests that free some are served and no
//! failed request leaves a file.

use std::fs;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::FsGuest;
use testkit::fuse_abi::{self as abi, Arg, Entry, MAP_READ, MAP_WRITE, ROOT, op};

const BOTH: u64 = MAP_READ | MAP_WRITE;

fn with(window_bytes: u64, extra: &[&str]) -> FsOptions {
    let extra = extra.iter().map(|&word| word.to_owned()).collect();
    FsOptions { window_bytes, extra, ..FsOptions::default() }
}

/// Smallest number of descriptors that the daemon accepts, from its error line.
fn least(window_bytes: u64, extra: &[&str]) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("sock");
    let mut options = with(window_bytes, extra);
    options.extra.extend(["--rlimit-nofile", "300"].map(String::from));
    let output = options.command(&socket, dir.path()).output().unwrap();
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{line}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(line.contains("--window-size") && line.contains("--thread-pool-size"), "{line}");
    assert!(!socket.exists());
    let (_, number) = line.split_once("use more than ").unwrap();
    number.split(',').next().unwrap().parse::<u64>().unwrap() + 1
}

/// A daemon with `for_guest` descriptors for the guest.
fn host(window_bytes: u64, handles: &str, for_guest: u64) -> FsHost {
    let handles = format!("--inode-file-handles={handles}");
    let extra = [handles.as_str(), "--thread-pool-size", "16"];
    // The smallest number leaves 64 for the guest.
    let files = (least(window_bytes, &extra) - 64 + for_guest).to_string();
    FsHost::with(with(window_bytes, &[&extra[..], &["--rlimit-nofile", &files]].concat()))
}

/// Opens `node` until the errno for a lack of descriptors comes.
fn open_all(guest: &mut FsGuest, node: u64) -> Vec<u64> {
    let mut handles = Vec::new();
    loop {
        match guest.open(node, libc::O_RDONLY) {
            Ok(handle) => handles.push(handle),
            Err(errno) => {
                assert_eq!(errno, libc::ENFILE);
                return handles;
            }
        }
    }
}

/// Shows: a guest that has opened as many files as it may can map a window of the largest size,
/// with another file in each slot; each memory region comes with its descriptor. It works over a
/// pause, and also if the guest maps first.
#[test]
fn all_descriptors_and_the_whole_window() {
    let slots = 384;
    for maps_first in [false, true] {
        let host = host(slots * RANGE, "prefer", 600);
        (0..slots).for_each(|i| host.put(&format!("f{i}"), &[1; 5000]));
        let mut guest = host.boot();
        let nodes: Vec<_> = (0..slots).map(|i| guest.node(&format!("f{i}"))).collect();
        let map_all = |guest: &mut FsGuest| {
            for (i, node) in nodes.iter().enumerate() {
                guest.setup(*node, 0, RANGE, BOTH, i as u64 * RANGE).unwrap();
            }
        };
        if maps_first {
            map_all(&mut guest);
        }
        let handles = open_all(&mut guest, nodes[0]);
        assert!(handles.len() > 450, "{} of 600", handles.len());
        if !maps_first {
            map_all(&mut guest);
        }
        assert_eq!(guest.vmm.live_maps(), slots as usize);
        guest.vmm.stop();
        guest.start();
        assert!(guest.vmm.store((slots - 1) * RANGE, b"still"));
        assert_eq!(&host.get(&format!("f{}", slots - 1))[..5], b"still");
        guest.release(nodes[0], handles[0]).unwrap();
        guest.remove(&[(0, 256 * RANGE), (256 * RANGE, 128 * RANGE)]).unwrap();
        assert_eq!((guest.vmm.refused(), guest.vmm.take_violations()), (vec![], vec![]));
    }
}

/// Creates `files` files in directories of 500, like a guest that unpacks an archive.
fn unpack(guest: &mut FsGuest, files: u64) -> Result<(), i32> {
    let mut dir = ROOT;
    for i in 0..files {
        if i % 500 == 0 {
            let arg = Arg::new().u32s(&[0o755, 0]).name(&format!("dir{}", i / 500));
            dir = Entry::parse(&guest.call(op::MKDIR, ROOT, &arg, abi::ENTRY_OUT)?).nodeid;
        }
        let arg = abi::create(&format!("file{i}"), libc::O_RDWR | libc::O_CREAT, 0o644);
        let body = guest.call(op::CREATE, dir, &arg, abi::ENTRY_OUT + abi::OPEN_OUT)?;
        let (node, fh) = (Entry::parse(&body).nodeid, abi::u64_at(&body, abi::ENTRY_OUT));
        guest.write(node, fh, 0, b"unpacked")?;
        guest.release(node, fh)?;
    }
    Ok(())
}

/// Shows: with file handles, the default, a guest unpacks, keeps in its cache and reads a tree of
/// several times more files than the daemon has descriptors, and the log has no warning.
#[test]
fn more_files_than_descriptors() {
    let host = host(8 * RANGE, "prefer", 200);
    let mut guest = host.boot();
    unpack(&mut guest, 3000).unwrap();
    let dir = guest.node("dir5");
    let file = guest.lookup(dir, "file2999").unwrap().nodeid;
    let fh = guest.open(file, libc::O_RDWR).unwrap();
    assert_eq!(guest.read(file, fh, 0, 8).unwrap(), b"unpacked");
    assert!(host.descriptors().len() < 150, "{} descriptors", host.descriptors().len());
    assert!(!host.said().contains("ENFILE"), "{}", host.said());
}

/// Shows: file handles are the default.
#[test]
fn file_handles_are_the_default() {
    let host = FsHost::new();
    (0..100).for_each(|i| host.put(&format!("f{i}"), b"x"));
    let mut guest = host.boot();
    guest.node("f0");
    let before = host.descriptors().len();
    (0..100).map(|i| guest.node(&format!("f{i}"))).for_each(|node| assert_ne!(node, ROOT));
    assert_eq!(host.descriptors().len(), before);
}

/// All names in the share, on the host.
fn on_host(host: &FsHost) -> Vec<String> {
    let all = fs::read_dir(host.path("")).unwrap();
    let mut all: Vec<_> = all.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    all.sort();
    all
}

/// Shows: if each inode holds a descriptor, the guest gets ENFILE before the daemon has none left.
/// No failed request leaves a file; one line names the options that help; directories can still be
/// listed, names and files removed, and a FORGET frees descriptors.
#[test]
fn without_file_handles() {
    let host = host(8 * RANGE, "never", 400);
    (0..600).for_each(|i| host.put(&format!("file{i}"), b"x"));
    fs::create_dir(host.path("dir")).unwrap();
    let mut guest = host.boot();
    let dir = guest.node("dir");
    let mut nodes = Vec::new();
    let refused = (0..600).find_map(|i| match guest.lookup(ROOT, &format!("file{i}")) {
        Ok(found) => {
            nodes.push(found.nodeid);
            None
        }
        Err(errno) => Some(errno),
    });
    assert_eq!(refused, Some(libc::ENFILE));
    assert!(nodes.len() > 250, "{} of 400", nodes.len());
    host.wait_said("raise --rlimit-nofile");

    let before = on_host(&host);
    let mode = libc::S_IFREG | 0o644;
    let makes: [(&str, u32, Arg, usize); 6] = [
        ("CREATE", op::CREATE, abi::create("new", libc::O_RDWR, 0o644), 144),
        ("CREATE, exclusive", op::CREATE, abi::create("new", libc::O_EXCL | 2, 0o644), 144),
        ("MKNOD", op::MKNOD, Arg::new().u32s(&[mode, 0, 0, 0]).name("new"), 128),
        ("MKDIR", op::MKDIR, Arg::new().u32s(&[0o755, 0]).name("new"), 128),
        ("SYMLINK", op::SYMLINK, Arg::new().name("new").name("target"), 128),
        ("LINK", op::LINK, Arg::new().u64s(&[nodes[0]]).name("new"), 128),
    ];
    for (what, opcode, arg, out) in &makes {
        assert_eq!(guest.call(*opcode, ROOT, arg, *out), Err(libc::ENFILE), "{what}");
        assert_eq!(on_host(&host), before, "{what}");
    }
    // A CREATE that failed does not change an existing file.
    let arg = abi::create("file599", libc::O_RDWR | libc::O_TRUNC, 0o644);
    assert_eq!(guest.call(op::CREATE, ROOT, &arg, 144), Err(libc::ENFILE));
    assert_eq!(host.get("file599"), b"x");

    // The requests of `rm -rf`.
    let names = guest.names().unwrap();
    assert!(names.iter().any(|(name, node)| name.contains("file") && *node == 0), "a name alone");
    guest.unlink("file598").unwrap();
    guest.call(op::RMDIR, ROOT, &Arg::new().name("dir"), 0).unwrap();
    guest.forget(dir, 1);
    for (i, node) in nodes.iter().enumerate().take(100) {
        guest.unlink(&format!("file{i}")).unwrap();
        guest.forget(*node, u64::MAX); // READDIRPLUS has looked it up, too.
    }
    assert_eq!(on_host(&host).len(), 601 - 102);
    for (what, opcode, arg, out) in &makes[..1] {
        guest.call(*opcode, ROOT, arg, *out).unwrap_or_else(|e| panic!("{what}: {e}"));
    }
    let said = host.said();
    assert_eq!(said.matches("raise --rlimit-nofile").count(), 1, "{said}");
    assert!(said.contains("--inode-file-handles=prefer"), "{said}");
}

/// Shows: a guest that opens all files it may, and closes them, can't use the daemon's reserve, by
/// any way to open a file. The daemon stays within its limit, and serves on.
#[test]
fn handles_of_all_kinds() {
    let host = host(8 * RANGE, "prefer", 100);
    host.put("file", &[1; 5000]);
    let mut guest = host.boot();
    let node = guest.node("file");
    let handles = open_all(&mut guest, node);
    let mut dirs = Vec::new();
    let none = loop {
        match guest.call(op::OPENDIR, ROOT, &abi::open(0), abi::OPEN_OUT) {
            Ok(body) => dirs.push(abi::u64_at(&body, 0)),
            Err(errno) => break errno,
        }
    };
    assert_eq!(none, libc::ENFILE);
    assert!(!dirs.is_empty(), "some are kept for directories");
    // Requests that need a descriptor only while they run.
    guest.node("file");
    assert_eq!(guest.read(node, handles[0], 0, 2).unwrap(), [1, 1]);
    guest.fsync(node, handles[0]).unwrap();
    guest.release(node, handles[0]).unwrap();
    guest.call(op::RELEASEDIR, ROOT, &abi::release(dirs[0]), 0).unwrap();
    for dir in &dirs[1..] {
        guest.call(op::RELEASEDIR, ROOT, &abi::release(*dir), 0).unwrap();
    }
    guest.open(node, libc::O_RDWR).unwrap();
}
