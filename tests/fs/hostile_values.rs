// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that well-formed FUSE requests with hostile values (sizes, offsets, names, handles,
//! addresses, INIT and DESTROY at the wrong time) are refused and reach no file outside of the
//! share, and that the next valid request is served.

use std::os::unix::fs::{MetadataExt, symlink};

use testkit::fs::{FsHost, RANGE, WINDOW};
use testkit::fuse::{FIRST, FsGuest, HIPRIO, Reply};
use testkit::fuse_abi::{self as abi, Arg, ENTRY_OUT, MAP_READ, MAP_WRITE, ROOT, in_header, op};
use testkit::queue::{Chain, Extern};

/// A guest with an open file in the share, and a file beside the shared directory.
struct Bench {
    guest: FsGuest,
    node: u64,
    fh: u64,
    host: FsHost,
}

fn bench() -> Bench {
    let host = FsHost::new();
    host.put("file", b"the file's bytes");
    std::fs::create_dir(host.path("dir")).unwrap();
    std::fs::write(host.dir.path().join("secret"), b"not for guests").unwrap();
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    Bench { guest, node, fh, host }
}

impl Bench {
    fn good_request_works(&mut self, after: &str) {
        let read = self.guest.read(self.node, self.fh, 0, 8);
        assert_eq!(read.as_deref(), Ok(&b"the file"[..]), "after {after}");
        self.guest.vmm.check();
    }

    fn refused(&mut self, what: &str, opcode: u32, node: u64, arg: &Arg, out: usize) -> i32 {
        let result = self.guest.call(opcode, node, arg, out);
        let errno = result.expect_err(what);
        self.good_request_works(what);
        errno
    }
}

/// Shows that sizes and offsets that no file can have are refused, and change no file.
#[test]
fn impossible_sizes() {
    let mut b = bench();
    let (node, fh) = (b.node, b.fh);
    let four = |arg: Arg| arg.bytes(b"1234");
    let cfr = |from, to, len| abi::copy_file_range((fh, from), (node, fh, to), len);
    let lseek = |offset, whence| Arg::new().u64s(&[fh, offset]).u32s(&[whence, 0]);
    let cases: &[(&str, u32, Arg, usize)] = &[
        ("READ at 2^64 - 1", op::READ, abi::read(fh, u64::MAX, 16), 16),
        ("READ at 2^63", op::READ, abi::read(fh, 1 << 63, 16), 16),
        ("WRITE of 2^32 - 1, 4 given", op::WRITE, four(abi::write(fh, 0, u32::MAX)), 8),
        ("WRITE of 8, 4 given", op::WRITE, four(abi::write(fh, 0, 8)), 8),
        ("WRITE at 2^64 - 1", op::WRITE, four(abi::write(fh, u64::MAX, 4)), 8),
        ("WRITE over 2^63", op::WRITE, four(abi::write(fh, (1 << 63) - 2, 4)), 8),
        ("SETATTR of 2^64 - 1", op::SETATTR, abi::set_size(u64::MAX), abi::ATTR_OUT),
        ("SETATTR of 2^63", op::SETATTR, abi::set_size(1 << 63), abi::ATTR_OUT),
        ("FALLOCATE of 0", op::FALLOCATE, abi::fallocate(fh, 0, 0, 0), 0),
        ("FALLOCATE that wraps", op::FALLOCATE, abi::fallocate(fh, u64::MAX, 2, 0), 0),
        ("FALLOCATE of all", op::FALLOCATE, abi::fallocate(fh, 0, u64::MAX, 0), 0),
        ("FALLOCATE over 2^63", op::FALLOCATE, abi::fallocate(fh, (1 << 63) - 1, 2, 0), 0),
        ("FALLOCATE, unknown mode", op::FALLOCATE, abi::fallocate(fh, 0, 16, 1 << 30), 0),
        ("COPY_FILE_RANGE from 2^64 - 1", op::COPY_FILE_RANGE, cfr(u64::MAX, 0, 16), 8),
        ("COPY_FILE_RANGE to 2^64 - 1", op::COPY_FILE_RANGE, cfr(0, u64::MAX, 4), 8),
        ("COPY_FILE_RANGE onto itself", op::COPY_FILE_RANGE, cfr(0, 4, 8), 8),
        ("LSEEK, unknown whence", op::LSEEK, lseek(0, 77), 8),
        ("LSEEK_DATA behind the end", op::LSEEK, lseek(1 << 40, libc::SEEK_DATA as u32), 8),
    ];
    for (what, opcode, arg, out) in cases {
        b.refused(what, *opcode, node, arg, *out);
        assert_eq!(b.host.get("file"), b"the file's bytes", "{what}");
    }
}

/// Shows that a READ of more bytes than it has room for is refused, or returns as many bytes as
/// fit.
#[test]
fn reads_of_too_much() {
    let mut b = bench();
    for (size, room) in [(u32::MAX, 4096), (1 << 30, 16), (u32::MAX, 4), (4096, 8), (1, 0)] {
        let pending = b.guest.send(op::READ, b.node, &abi::read(b.fh, 0, size), room);
        match b.guest.reply(pending) {
            Reply::Ok(body) => {
                assert!(b"the file's bytes".starts_with(&body) && body.len() <= room)
            }
            other => assert_ne!(other, Reply::Error(libc::EAGAIN)),
        }
        b.good_request_works("a READ of too much");
    }
}

/// Shows that invalid handles and node ids, and those of another kind of file, are refused.
#[test]
fn handles_that_are_none() {
    let mut b = bench();
    let (node, good) = (b.node, b.fh);
    let gone = b.guest.open(node, libc::O_RDWR).unwrap();
    b.guest.release(node, gone).unwrap();
    for fh in [gone, 4711, u64::MAX, 1 << 63, good | 1 << 40] {
        let what = format!("handle {fh}");
        b.refused(&what, op::READ, node, &abi::read(fh, 0, 8), 8);
        b.refused(&what, op::WRITE, node, &abi::write(fh, 0, 4).bytes(b"1234"), 8);
        b.refused(&what, op::FALLOCATE, node, &abi::fallocate(fh, 0, 64, 0), 0);
        let arg = abi::copy_file_range((good, 0), (node, fh, 16), 4);
        b.refused(&what, op::COPY_FILE_RANGE, node, &arg, 8);
    }
    for nodeid in [0, 4711, u64::MAX, 1 << 63] {
        let what = format!("node {nodeid}");
        b.refused(&what, op::GETATTR, nodeid, &abi::getattr(), abi::ATTR_OUT);
        b.refused(&what, op::OPEN, nodeid, &abi::open(0), abi::OPEN_OUT);
        b.refused(&what, op::LOOKUP, nodeid, &Arg::new().name("file"), ENTRY_OUT);
        b.refused(&what, op::SETATTR, nodeid, &abi::set_size(1), abi::ATTR_OUT);
        b.refused(&what, op::RENAME, ROOT, &abi::rename("file", nodeid, "x"), 0);
        b.refused(&what, op::UNLINK, nodeid, &Arg::new().name("file"), 0);
    }
    assert_eq!(b.guest.call(op::LOOKUP, node, &Arg::new().name("x"), 128), Err(libc::ENOTDIR));
    assert_eq!(b.host.get("file"), b"the file's bytes");
}

/// Shows that invalid names reach no file: with a slash, empty, too long, "..", or without a NUL.
#[test]
fn hostile_names() {
    let mut b = bench();
    symlink("../secret", b.host.path("out")).unwrap();
    let long = "n".repeat(256);
    let huge = "n".repeat(8192);
    let names = [
        "",
        "/",
        "a/b",
        "dir/x",
        "../secret",
        "/etc/passwd",
        "dir/../file",
        "..",
        ".",
        &long,
        &huge,
    ];
    let before = std::fs::read_dir(b.host.dir.path()).unwrap().count();
    let root = std::fs::metadata(b.host.path("")).unwrap().ino();
    for name in names {
        let what = format!("{:?}", &name[..name.len().min(16)]);
        // "." and ".." of the root are the root: a daemon may return it.
        match b.guest.call(op::LOOKUP, ROOT, &Arg::new().name(name), ENTRY_OUT) {
            Err(errno) => assert_ne!(errno, libc::EAGAIN, "{what}"),
            Ok(entry) => {
                assert!(name == "." || name == "..", "{what} was found");
                assert_eq!(abi::u64_at(&entry, 40), root, "{what} is not the root");
            }
        }
        b.refused(&what, op::CREATE, ROOT, &abi::create(name, 2, 0o644), ENTRY_OUT + 16);
        b.refused(&what, op::MKDIR, ROOT, &Arg::new().u32s(&[0o755, 0]).name(name), ENTRY_OUT);
        b.refused(&what, op::SYMLINK, ROOT, &Arg::new().name(name).name("to"), ENTRY_OUT);
        b.refused(&what, op::UNLINK, ROOT, &Arg::new().name(name), 0);
        b.refused(&what, op::RMDIR, ROOT, &Arg::new().name(name), 0);
        b.refused(&what, op::RENAME, ROOT, &abi::rename(name, ROOT, "x"), 0);
        b.refused(&what, op::RENAME, ROOT, &abi::rename("file", ROOT, name), 0);
        let node = b.node;
        b.refused(&what, op::LINK, ROOT, &Arg::new().u64s(&[node]).name(name), ENTRY_OUT);
    }
    for unended in [&b"file"[..], b"f", &[0xff; 300]] {
        b.refused("no NUL", op::LOOKUP, ROOT, &Arg::new().bytes(unended), ENTRY_OUT);
        b.refused("no NUL", op::UNLINK, ROOT, &Arg::new().bytes(unended), 0);
    }
    let out = b.guest.node("out");
    b.refused("a symlink", op::OPEN, out, &abi::open(libc::O_RDWR), abi::OPEN_OUT);
    b.refused("a symlink", op::SETATTR, out, &abi::set_size(0), abi::ATTR_OUT);
    assert_eq!(std::fs::read(b.host.dir.path().join("secret")).unwrap(), b"not for guests");
    assert_eq!(std::fs::read_dir(b.host.dir.path()).unwrap().count(), before);
    assert_eq!(b.host.get("file"), b"the file's bytes");
}

/// Shows that a buffer at an address without memory gets an errno or no reply, and changes no file.
#[test]
fn addresses_that_are_no_memory() {
    let mut b = bench();
    let (node, fh) = (b.node, b.fh);
    let end = b.guest.scratch + (16 << 20);
    let places: &[(&str, Extern)] = &[
        ("behind memory", (end, 16)),
        ("over the end of memory", (end - 8, 16)),
        ("far away", (1 << 50, 16)),
        ("wraps", (u64::MAX - 7, 16)),
        ("in the window, not granted", (FsGuest::in_window(0), 16)),
        ("at the window's end", (FsGuest::in_window(WINDOW - 8), 16)),
    ];
    for &(what, place) in places {
        let read = abi::read(fh, 0, 16);
        let pending = b.guest.send_with(op::READ, node, &[&read.0], 0, &[], &[place]);
        let reply = b.guest.reply(pending);
        assert!(matches!(reply, Reply::Returned | Reply::Error(_)), "{what}: {reply:?}");
        b.good_request_works(what);
        let write = abi::write(fh, 0, 16);
        let pending = b.guest.send_with(op::WRITE, node, &[&write.0], 8, &[place], &[]);
        let reply = b.guest.reply(pending);
        assert!(matches!(reply, Reply::Returned | Reply::Error(_)), "{what}: {reply:?}");
        b.good_request_works(what);
        // The header of the request, and the room for the header of the reply.
        for (input_at, output_at) in [(vec![place], vec![]), (vec![], vec![place])] {
            let unique = b.guest.next_unique();
            let header = in_header(56, op::GETATTR, unique, node);
            let input = if input_at.is_empty() { vec![header] } else { Vec::new() };
            let output = if output_at.is_empty() { vec![16, abi::ATTR_OUT] } else { Vec::new() };
            let chain = Chain { input, input_at, output, output_at };
            let offered = b.guest.queues[FIRST].offer(&chain);
            let back = b.guest.queues[FIRST].wait(offered);
            assert!(back.len == 0 || back.len == 16, "{what}: {back:?}");
            b.good_request_works(what);
        }
    }
    assert_eq!(b.host.get("file"), b"the file's bytes");
}

/// Shows that requests before INIT are refused, that a second INIT and a DESTROY work, and that
/// grants from before are removed.
#[test]
fn init_and_destroy_at_the_wrong_time() {
    let mut b = bench();
    b.guest.setup(b.node, 0, RANGE, MAP_READ | MAP_WRITE, 0).unwrap();
    let second = b.guest.call(op::INIT, 0, &abi::init(), abi::INIT_OUT);
    if second.is_ok() {
        // INIT has succeeded and dropped all grants, or has failed and changed nothing.
        assert!(matches!(b.guest.vmm.mapped_bytes(), 0 | RANGE));
        (b.node, b.fh) = b.guest.opened("file");
    }
    b.good_request_works("a second INIT");
    b.guest.destroy();
    assert_eq!(b.guest.vmm.mapped_bytes(), 0);
    for (opcode, arg) in [
        (op::LOOKUP, Arg::new().name("file")),
        (op::GETATTR, abi::getattr()),
        (op::STATFS, Arg::new()),
        (op::OPENDIR, abi::open(0)),
        (op::CREATE, abi::create("made", 2, 0o644)),
        (op::SYNCFS, Arg::new().u64s(&[0])),
        (op::DESTROY, Arg::new()),
    ] {
        let pending = b.guest.send(opcode, ROOT, &arg, 256);
        let reply = b.guest.reply(pending);
        let fine = matches!(reply, Reply::Error(_)) || opcode == op::DESTROY;
        assert!(fine, "opcode {opcode} after DESTROY: {reply:?}");
    }
    assert!(!b.host.path("made").exists());
    b.guest.init();
    (b.node, b.fh) = b.guest.opened("file");
    b.good_request_works("INIT after DESTROY");

    b.guest.reset();
    assert!(b.guest.lookup(ROOT, "file").is_err(), "a request before INIT");
    let old = Arg::new().u32s(&[6, 0, 0, 0]);
    let reply = b.guest.call(op::INIT, 0, &old, abi::INIT_OUT);
    assert!(reply.is_err(), "INIT of version 6: {reply:?}");
    // INIT with a newer major number is answered with version 7, and the guest repeats it (fuse.h).
    let new = Arg::new().u32s(&[8, 0, 0, 0]).u32s(&[0; 12]);
    if let Ok(body) = b.guest.call(op::INIT, 0, &new, abi::INIT_OUT) {
        assert_eq!(abi::u32_at(&body, 0), 7);
    }
    b.guest.init();
    (b.node, b.fh) = b.guest.opened("file");
    b.good_request_works("a reset");
}

/// Shows that requests on the wrong queue, and FORGETs of any length, disturb no other request.
#[test]
fn the_wrong_queue() {
    let mut b = bench();
    let forgets = |count: u32, given: usize| {
        let ones = (0..given).fold(Arg::new().u32s(&[count, 0]), |arg, _| arg.u64s(&[4711, 1]));
        ones.0
    };
    let cases = [
        (op::BATCH_FORGET, forgets(2, 2)),
        (op::BATCH_FORGET, forgets(u32::MAX, 2)),
        (op::BATCH_FORGET, forgets(1 << 28, 1)),
        (op::BATCH_FORGET, forgets(3, 1)),
        (op::BATCH_FORGET, vec![1, 2, 3]),
        (op::FORGET, vec![]),
        (op::FORGET, vec![1; 7]),
        (op::INTERRUPT, vec![0; 8]),
        (op::INTERRUPT, vec![0; 3]),
    ];
    for queue in [HIPRIO, FIRST] {
        for (opcode, arg) in &cases {
            let header = in_header(40 + arg.len() as u32, *opcode, 1, ROOT);
            let mut input = vec![header];
            input.extend((!arg.is_empty()).then(|| arg.clone()));
            for output in [vec![], vec![16]] {
                let chain = Chain { input: input.clone(), output, ..Chain::default() };
                let offered = b.guest.queues[queue].offer(&chain);
                let back = b.guest.queues[queue].wait(offered);
                assert!(back.len == 0 || back.len == 16, "opcode {opcode}: {back:?}");
            }
            b.good_request_works("a forget");
        }
    }
    b.guest.on = HIPRIO;
    let node = b.node;
    let reply = b.guest.send(op::GETATTR, node, &abi::getattr(), abi::ATTR_OUT);
    let _ = b.guest.reply(reply);
    b.guest.on = FIRST;
    b.good_request_works("GETATTR on the queue of forgets");
}
