// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random messages: each opcode, with right, nearly right and wrong arguments, several at one time,
//! on real files and maps.

use std::collections::VecDeque;

use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, Pending, Reply};
use testkit::fuse_abi::{self as abi, Arg, ENTRY_OUT, OPEN_OUT, ROOT, in_header, op, u64_at};
use testkit::queue::Chain;

/// Number of messages for each seed: they take some seconds.
const MESSAGES: u64 = 4000;
/// Number of messages after which the files are created again.
const AFRESH: u64 = 500;
const NAMES: [&str; 13] =
    ["a", "b", "c", "d0", "d1", "l", "p", "x", ".", "..", "", "a/b", "\u{fffd}"];

/// A xorshift64 generator.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A random 64-bit number, often one at the edge of a range.
    fn word(&mut self) -> u64 {
        match self.below(10) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => 1 << 63,
            4 => RANGE * self.below(40),
            5 => self.below(8192),
            6 => u64::from(u32::MAX),
            7 => (1 << 63) - self.below(5000),
            8 => 5000 + self.below(10),
            _ => self.next(),
        }
    }

    /// A number that is mostly below `n`.
    fn mostly(&mut self, n: u64) -> u64 {
        if self.below(4) > 0 { self.below(n) } else { self.word() }
    }
}

/// Node ids and handles that the guest has got, and some invalid ones.
struct Known {
    rng: Rng,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Known {
    fn forget(&mut self) {
        self.nodes = vec![ROOT, ROOT, 0, u64::MAX];
        self.handles = vec![0, u64::MAX];
    }

    fn node(&mut self) -> u64 {
        let nodes = self.nodes.clone();
        self.rng.pick(&nodes)
    }

    fn handle(&mut self) -> u64 {
        let handles = self.handles.clone();
        self.rng.pick(&handles)
    }

    fn learn(&mut self, opcode: u32, body: &[u8]) {
        let makes = [op::LOOKUP, op::CREATE, op::MKDIR, op::MKNOD, op::LINK, op::SYMLINK];
        if makes.contains(&opcode) && body.len() >= ENTRY_OUT {
            self.nodes.push(u64_at(body, 0));
        }
        if opcode == op::CREATE && body.len() >= ENTRY_OUT + OPEN_OUT {
            self.handles.push(u64_at(body, ENTRY_OUT));
        }
        if [op::OPEN, op::OPENDIR].contains(&opcode) && body.len() >= OPEN_OUT {
            self.handles.push(u64_at(body, 0));
        }
        for all in [&mut self.nodes, &mut self.handles] {
            if all.len() > 40 {
                all.remove(5);
            }
        }
    }

    fn flags(&mut self) -> i32 {
        let any = self.rng.next() as i32;
        self.rng.pick(&[libc::O_RDWR, libc::O_RDONLY, libc::O_RDWR | libc::O_TRUNC, any])
    }

    /// Arguments for an opcode, mostly with a valid form.
    fn arg(&mut self, opcode: u32) -> Arg {
        let (fh, node, name) = (self.handle(), self.node(), self.rng.pick(&NAMES));
        let r = &mut self.rng;
        match opcode {
            op::INIT => abi::init(),
            op::SETUPMAPPING => {
                let (from, len) =
                    (RANGE.wrapping_mul(r.mostly(3)), RANGE.wrapping_mul(r.mostly(3)));
                abi::setupmapping(from, len, r.mostly(4), RANGE.wrapping_mul(r.mostly(32)))
            }
            op::REMOVEMAPPING => {
                let some: Vec<_> =
                    (0..r.below(4)).map(|_| (RANGE * r.below(32), RANGE * r.below(4))).collect();
                abi::removemapping(&some)
            }
            op::SETATTR => {
                let (valid, size) = (r.next() as u32 & 0xfff, r.mostly(6 << 20));
                let arg = Arg::new().u32s(&[valid, 0]).u64s(&[fh, size, 0, r.word(), r.word(), 0]);
                let (mode, id) = (r.next() as u32 & 0o7777, r.pick(&[0, 1000, u32::MAX]));
                arg.u32s(&[0, 0, 0, 0o644 | mode, 0, id, id, 0])
            }
            op::WRITE => {
                let bytes = vec![r.next() as u8; r.below(9000) as usize];
                abi::write(fh, r.mostly(5 << 20), bytes.len() as u32).bytes(&bytes)
            }
            op::READ | op::READDIR | op::READDIRPLUS => {
                abi::read(fh, r.word(), r.mostly(9000) as u32)
            }
            op::OPEN | op::OPENDIR => abi::open(self.flags()),
            op::CREATE => abi::create(name, self.flags(), 0o644),
            op::FALLOCATE => {
                let mode = r.pick(&[0, 1, 3, 8, 16, 17, 32, 64, -1]);
                abi::fallocate(fh, r.mostly(4 << 20), r.mostly(4 << 20), mode)
            }
            op::COPY_FILE_RANGE => {
                let to = (node, self.handle(), self.rng.mostly(8 << 20));
                abi::copy_file_range((fh, self.rng.below(8000)), to, self.rng.mostly(1 << 20))
            }
            op::RENAME => abi::rename(name, node, r.pick(&NAMES)),
            op::RENAME2 => Arg::new().u64s(&[node, r.word() & 15]).name(name).name(r.pick(&NAMES)),
            op::LINK => Arg::new().u64s(&[node]).name(name),
            op::MKNOD => Arg::new().u32s(&[r.next() as u32, r.next() as u32, 0, 0]).name(name),
            op::MKDIR => Arg::new().u32s(&[0o755, 0]).name(name),
            op::SYMLINK => Arg::new().name(name).name("../../etc/passwd"),
            op::SETXATTR => {
                let name = r.pick(&["user.a", "security.capability", ""]);
                Arg::new().u32s(&[r.mostly(5) as u32, 0]).name(name).bytes(b"abcd")
            }
            op::GETXATTR => Arg::new().u32s(&[r.mostly(70_000) as u32, 0]).name("user.a"),
            op::FORGET => Arg::new().u64s(&[r.pick(&[1, 2, u64::MAX])]),
            op::FSYNC | op::FSYNCDIR | op::FLUSH | op::RELEASE | op::RELEASEDIR => abi::flush(fh),
            op::LSEEK => Arg::new().u64s(&[fh, r.word()]).u32s(&[r.below(6) as u32, 0]),
            op::LOOKUP | op::UNLINK | op::RMDIR | op::REMOVEXATTR => Arg::new().name(name),
            _ => Arg::new().u64s(&[r.word(), r.word(), r.word(), r.word()]),
        }
    }

    fn opcode(&mut self) -> u32 {
        let r = &mut self.rng;
        let any = 1 + r.below(52) as u32;
        // A mount or an unmount is rare.
        let any =
            if matches!(any, op::INIT | op::DESTROY) && r.below(20) > 0 { op::LOOKUP } else { any };
        r.pick(&[
            op::SETUPMAPPING,
            op::REMOVEMAPPING,
            op::SETATTR,
            op::WRITE,
            op::OPEN,
            any,
            any,
            any,
        ])
    }

    fn send(&mut self, guest: &mut FsGuest, opcode: u32) -> Pending {
        let mut arg = self.arg(opcode);
        if self.rng.below(30) == 0 && opcode != op::INIT {
            arg = Arg((0..self.rng.below(200)).map(|_| self.rng.next() as u8).collect());
        }
        let (node, unique) = (self.node(), guest.next_unique());
        let r = &mut self.rng;
        let len = 40 + arg.0.len() as u32;
        let len = if r.below(60) == 0 { r.next() as u32 } else { len };
        let mut head = in_header(len, opcode, unique, node);
        let id = r.pick(&[0, 0, 0, 1000, u32::MAX]).to_le_bytes();
        head[24..28].copy_from_slice(&id);
        head[28..32].copy_from_slice(&id);
        let mut input = vec![head, arg.0];
        input.retain(|part| !part.is_empty());
        let room = r.pick(&[0, 300, 9000, 9000, 9000]);
        let mut output = vec![abi::OUT_HEADER, room];
        output.retain(|bytes| *bytes > 0);
        if matches!(opcode, op::FORGET | op::BATCH_FORGET) && r.below(2) == 0 {
            output.clear();
        }
        guest.send_chain(FIRST, &Chain { input, output, ..Chain::default() }, unique)
    }
}

fn make_files(guest: &mut FsGuest, known: &mut Known) {
    for name in ["a", "b", "c"] {
        if let Ok((node, fh)) = guest.create(name) {
            let _ = guest.write(node, fh, 0, &[7; 5000]);
            known.nodes.push(node);
            known.handles.push(fh);
        }
    }
}

fn settle(guest: &mut FsGuest, known: &mut Known, (opcode, pending): (u32, Pending)) {
    if let Reply::Ok(body) = guest.reply(pending) {
        known.learn(opcode, &body);
    }
}

fn run(seed: u64, handles: &str) {
    let extra = ["--xattr", "--rlimit-nofile=2500", handles].map(String::from).to_vec();
    let options = FsOptions { extra, ..FsOptions::default() };
    // A file system of its own, so that the messages can't fill the disk and leave no file behind.
    let Some(host) = FsHost::on_small_tmpfs(options, 48 << 20) else {
        return eprintln!("skipped: no mount namespace to be had");
    };
    let mut guest = host.boot();
    let mut known =
        Known { rng: Rng(0x9e37_79b9_7f4a_7c15 ^ seed), nodes: vec![], handles: vec![] };
    let mut pending = VecDeque::new();
    for sent in 0..MESSAGES {
        let opcode = known.opcode();
        if sent % AFRESH == 0 || matches!(opcode, op::INIT | op::DESTROY) {
            // Sometimes while other requests still run.
            if opcode == op::DESTROY {
                guest.destroy();
            }
            guest.init();
            known.forget();
            make_files(&mut guest, &mut known);
            continue;
        }
        pending.push_back((opcode, known.send(&mut guest, opcode)));
        while pending.len() as u64 > known.rng.below(10) {
            let Some(first) = pending.pop_front() else { break };
            settle(&mut guest, &mut known, first);
        }
    }
    while let Some(first) = pending.pop_front() {
        settle(&mut guest, &mut known, first);
    }
    guest.init();
    make_files(&mut guest, &mut known);
    let (node, fh) = guest.create("last").unwrap();
    assert_eq!(guest.write(node, fh, 0, b"served"), Ok(6));
    assert_eq!(guest.read(node, fh, 0, 6).unwrap(), b"served");
    guest.vmm.check();
    let lines = host.said().lines().count();
    assert!(lines < 1000, "{lines} lines");
    let outside = std::fs::read_dir(host.dir.path()).unwrap().flatten().count();
    assert_eq!(outside, 2, "the share and the socket");
}

/// Shows: whichever messages a guest sends, each chain is returned with a well-formed reply, the
/// log stays short, no rule of the front-end is broken, no file appears outside of the share, and
/// later requests are served.
#[test]
fn any_messages() {
    run(1, "--inode-file-handles=never");
    run(2, "--inode-file-handles=prefer");
}
