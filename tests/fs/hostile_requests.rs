// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Shows that malformed FUSE requests get an errno or are returned without a reply, that nothing
//! else is written to guest memory, and that the next valid request is served.

use testkit::fs::{FsHost, RANGE};
use testkit::fuse::{FIRST, FsGuest, Reply};
use testkit::fuse_abi::{self as abi, Arg, ENTRY_OUT, IN_HEADER, OUT_HEADER, ROOT, in_header, op};
use testkit::queue::Chain;

/// A guest with the files "file" and "victim".
struct Bench {
    guest: FsGuest,
    node: u64,
    fh: u64,
    host: FsHost,
}

fn bench() -> Bench {
    let host = FsHost::new();
    host.put("file", b"the file's bytes");
    host.put("victim", b"untouched");
    std::fs::write(host.dir.path().join("secret"), b"not for guests").unwrap();
    let mut guest = host.boot();
    let (node, fh) = guest.opened("file");
    Bench { guest, node, fh, host }
}

/// A valid request: name, opcode, node id, argument, length of the reply's body.
type Good = (&'static str, u32, u64, Arg, usize);

impl Bench {
    fn good_request_works(&mut self, after: &str) {
        let read = self.guest.read(self.node, self.fh, 0, 8);
        assert_eq!(read.as_deref(), Ok(&b"the file"[..]), "after {after}");
        assert_eq!(self.host.get("victim"), b"untouched", "after {after}");
        self.guest.vmm.check();
    }

    /// A request of each operation that has an argument.
    fn requests(&self) -> Vec<Good> {
        let (node, fh) = (self.node, self.fh);
        let data = |arg: Arg| arg.bytes(b"12345678");
        let open = abi::OPEN_OUT;
        vec![
            ("LOOKUP", op::LOOKUP, ROOT, Arg::new().name("file"), ENTRY_OUT),
            ("SETATTR", op::SETATTR, node, abi::set_size(16), abi::ATTR_OUT),
            ("SYMLINK", op::SYMLINK, ROOT, Arg::new().name("link").name("to"), ENTRY_OUT),
            ("MKNOD", op::MKNOD, ROOT, Arg::new().u32s(&[0o100644, 0, 0, 0]).name("n"), ENTRY_OUT),
            ("MKDIR", op::MKDIR, ROOT, Arg::new().u32s(&[0o755, 0]).name("dir"), ENTRY_OUT),
            ("UNLINK", op::UNLINK, ROOT, Arg::new().name("victim"), 0),
            ("RMDIR", op::RMDIR, ROOT, Arg::new().name("victim"), 0),
            ("RENAME", op::RENAME, ROOT, abi::rename("victim", ROOT, "x"), 0),
            ("LINK", op::LINK, ROOT, Arg::new().u64s(&[node]).name("hard"), ENTRY_OUT),
            ("OPEN", op::OPEN, node, abi::open(libc::O_RDWR), open),
            ("READ", op::READ, node, abi::read(fh, 0, 8), 8),
            ("WRITE", op::WRITE, node, data(abi::write(fh, 8, 8)), 8),
            ("RELEASE", op::RELEASE, node, abi::release(fh), 0),
            ("FSYNC", op::FSYNC, node, abi::fsync(fh, false), 0),
            ("OPENDIR", op::OPENDIR, ROOT, abi::open(0), open),
            ("CREATE", op::CREATE, ROOT, abi::create("made", 2, 0o644), ENTRY_OUT + open),
            ("FALLOCATE", op::FALLOCATE, node, abi::fallocate(fh, 0, 16, 0), 0),
            ("RENAME2", op::RENAME2, ROOT, Arg::new().u64s(&[ROOT, 0]).name("victim").name("x"), 0),
            ("LSEEK", op::LSEEK, node, Arg::new().u64s(&[fh, 0]).u32s(&[0, 0]), 8),
            (
                "COPY_FILE_RANGE",
                op::COPY_FILE_RANGE,
                node,
                abi::copy_file_range((fh, 0), (node, fh, 8), 8),
                8,
            ),
            ("SETUPMAPPING", op::SETUPMAPPING, node, abi::setupmapping(0, RANGE, 2, 0), 0),
            ("REMOVEMAPPING", op::REMOVEMAPPING, 0, abi::removemapping(&[(0, RANGE)]), 0),
        ]
    }

    /// Sends `input` as it is, with room for a reply's header and `out` further bytes. The request
    /// must be refused or returned without a reply.
    fn must_fail(&mut self, what: &str, input: Vec<Vec<u8>>, output: Vec<usize>) {
        let chain = Chain { input, output, ..Chain::default() };
        let before = self.guest.vmm.mapped_bytes();
        let offered = self.guest.queues[FIRST].offer(&chain);
        let back = self.guest.queues[FIRST].wait(offered);
        assert!(!back.wrote_more, "{what}: written past the reply");
        assert!(back.len == 0 || back.len as usize == OUT_HEADER, "{what}: answered {back:?}");
        if back.len > 0 {
            let errno = abi::u32_at(&back.output, 4) as i32;
            assert!((-4095..0).contains(&errno), "{what}: errno {errno}");
        }
        assert_eq!(self.guest.vmm.mapped_bytes(), before, "{what}: mapped");
    }
}

/// Shows that a request whose argument ends too early, at any byte, is refused.
#[test]
fn arguments_cut_short() {
    let mut b = bench();
    for (name, opcode, node, arg, out) in b.requests() {
        for cut in 0..arg.0.len() {
            let what = format!("{name} of {cut} bytes");
            let header = in_header((IN_HEADER + cut) as u32, opcode, 1, node);
            let mut input = vec![header];
            input.extend((cut > 0).then(|| arg.0[..cut].to_vec()));
            b.must_fail(&what, input, vec![OUT_HEADER, out]);
            b.good_request_works(&what);
        }
    }
}

/// Shows the same for a header whose length is not that of the request.
#[test]
fn headers_that_lie_about_the_length() {
    let mut b = bench();
    for (name, opcode, node, arg, out) in b.requests() {
        let whole = IN_HEADER + arg.0.len();
        let lies = [0, 1, 39, 40, whole - 1, whole + 1, whole + 4096, 1 << 31, u32::MAX as usize];
        for said in lies {
            let what = format!("{name} of {whole} bytes that says {said}");
            let header = in_header(said as u32, opcode, 1, node);
            b.must_fail(&what, vec![header, arg.0.clone()], vec![OUT_HEADER, out]);
            b.good_request_works(&what);
        }
    }
}

/// Shows that a header that ends too early, at any byte, is refused, in one descriptor and in two.
#[test]
fn headers_cut_short() {
    let mut b = bench();
    for cut in 1..IN_HEADER {
        let header = in_header(cut as u32, op::GETATTR, 1, ROOT)[..cut].to_vec();
        let halves = vec![header[..cut / 2].to_vec(), header[cut / 2..].to_vec()];
        b.must_fail("half a header", vec![header], vec![OUT_HEADER, abi::ATTR_OUT]);
        if cut > 1 {
            b.must_fail("half a header", halves, vec![OUT_HEADER, abi::ATTR_OUT]);
        }
        b.good_request_works("half a header");
    }
    b.must_fail("no request at all", Vec::new(), vec![OUT_HEADER]);
    b.good_request_works("no request at all");
}

/// Shows that a request in descriptors of one byte, and a reply in small ones, are served as in one
/// descriptor.
#[test]
fn requests_in_many_pieces() {
    let mut b = bench();
    for (name, opcode, node, arg) in [
        ("LOOKUP", op::LOOKUP, ROOT, Arg::new().name("file")),
        ("LSEEK", op::LSEEK, b.node, Arg::new().u64s(&[b.fh, 0]).u32s(&[0, 0])),
    ] {
        let unique = b.guest.next_unique();
        let mut bytes = in_header((IN_HEADER + arg.0.len()) as u32, opcode, unique, node);
        bytes.extend_from_slice(&arg.0);
        let input = bytes.iter().map(|&byte| vec![byte]).collect();
        let chain = Chain { input, output: vec![3; 48], ..Chain::default() };
        let pending = b.guest.send_chain(FIRST, &chain, unique);
        assert!(matches!(b.guest.reply(pending), Reply::Ok(_)), "{name}");
    }
}

/// Shows that a reply without enough room is not written behind the room, and that the request
/// leaves no open descriptor.
#[test]
fn replies_without_room() {
    let mut b = bench();
    let before = b.host.descriptors();
    let (node, fh) = (b.node, b.fh);
    let requests: Vec<Good> = vec![
        ("LOOKUP", op::LOOKUP, ROOT, Arg::new().name("file"), ENTRY_OUT),
        ("GETATTR", op::GETATTR, node, abi::getattr(), abi::ATTR_OUT),
        ("OPEN", op::OPEN, node, abi::open(0), abi::OPEN_OUT),
        ("OPENDIR", op::OPENDIR, ROOT, abi::open(0), abi::OPEN_OUT),
        ("WRITE", op::WRITE, node, abi::write(fh, 0, 8).bytes(b"the file"), 8),
        ("STATFS", op::STATFS, ROOT, Arg::new(), 80),
        ("LSEEK", op::LSEEK, node, Arg::new().u64s(&[fh, 0]).u32s(&[0, 0]), 8),
        ("READ", op::READ, node, abi::read(fh, 0, 8), 8),
    ];
    for (name, opcode, node, arg, out) in requests {
        for room in 0..OUT_HEADER + out {
            let what = format!("{name} with room for {room}");
            let header = in_header((IN_HEADER + arg.0.len()) as u32, opcode, 1, node);
            let mut input = vec![header];
            input.extend((!arg.0.is_empty()).then(|| arg.0.clone()));
            if name == "READ" && room >= OUT_HEADER {
                continue; // The reply to a READ may be cut to the room.
            }
            b.must_fail(&what, input, (room > 0).then_some(room).into_iter().collect());
            b.good_request_works(&what);
        }
    }
    // The guest never gets these handles, so their descriptors must be closed.
    b.guest.destroy();
    b.guest.init();
    (b.node, b.fh) = b.guest.opened("file");
    b.good_request_works("replies without room");
    b.host.wait_descriptors(&before);
}

/// Shows that unknown opcodes get ENOSYS.
#[test]
fn unknown_opcodes() {
    let mut b = bench();
    for opcode in [0, 7, 19, 53, 63, 64, 127, 4096, 1 << 20, 1 << 31, u32::MAX] {
        for arg in [Arg::new(), Arg::new().u64s(&[0; 16])] {
            let result = b.guest.call(opcode, ROOT, &arg, 4096);
            assert_eq!(result, Err(libc::ENOSYS), "opcode {opcode}");
            b.good_request_works("an unknown opcode");
        }
    }
}
