// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Attacks of a guest on the daemon. Each test shows the required outcome: the attacker gets an
//! errno, and other requests and guests are served.

mod any_messages;

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::eventually;
use testkit::fs::{FsHost, FsOptions, RANGE};
use testkit::fuse::{FIRST, FsGuest, Pending, Reply};
use testkit::fuse_abi::{self as abi, Arg, ENTRY_OUT, MAP_READ, MAP_WRITE, OPEN_OUT, ROOT, op};
use testkit::fuse_abi::{in_header, u64_at};
use testkit::queue::{Chain, Extern};
use testkit::virtqueue::{Desc, INDIRECT};

const BOTH: u64 = MAP_READ | MAP_WRITE;
/// Largest READ that INIT allows, in bytes.
const MAX_READ: u32 = 1 << 20;

fn with(extra: &[&str]) -> FsHost {
    let extra = extra.iter().map(|arg| arg.to_string()).collect();
    FsHost::with(FsOptions { extra, ..FsOptions::default() })
}

/// A share with a sparse file of 5 GiB.
fn big(extra: &[&str]) -> (FsHost, FsGuest, u64, u64) {
    let host = with(extra);
    File::create(host.path("big")).unwrap().set_len(5 << 30).unwrap();
    let mut guest = host.boot();
    let (node, fh) = guest.opened("big");
    (host, guest, node, fh)
}

/// Buffers that all have the same address, so that together they are larger than the guest's
/// memory.
fn aliased(guest: &FsGuest) -> Vec<Extern> {
    vec![(guest.scratch, 8 << 20); 100]
}

fn read_of(guest: &mut FsGuest, node: u64, fh: u64, size: u32, to: &[Extern]) -> Pending {
    guest.send_with(op::READ, node, &[&abi::read(fh, 0, size).0], 0, &[], to)
}

/// A request of a user other than root.
fn call_as(
    guest: &mut FsGuest,
    (opcode, node): (u32, u64),
    (uid, gid): (u32, u32),
    arg: &Arg,
    out: usize,
) -> Result<Vec<u8>, i32> {
    let unique = guest.next_unique();
    let mut head = in_header((abi::IN_HEADER + arg.0.len()) as u32, opcode, unique, node);
    head[24..28].copy_from_slice(&uid.to_le_bytes());
    head[28..32].copy_from_slice(&gid.to_le_bytes());
    let input = vec![head, arg.0.clone()];
    let chain = Chain { input, output: vec![abi::OUT_HEADER, out], ..Chain::default() };
    let pending = guest.send_chain(FIRST, &chain, unique);
    guest.result(pending)
}

fn mknod(mode: u32, name: &str) -> Arg {
    Arg::new().u32s(&[mode, 0, 0, 0]).name(name)
}

/// SETATTR of the owners that `valid` selects.
fn chown(valid: u32, uid: u32, gid: u32) -> Arg {
    Arg::new().u32s(&[valid, 0]).u64s(&[0; 6]).u32s(&[0, 0, 0, 0, 0, uid, gid, 0])
}

// --- requests that are too large ---

/// Shows: a READ of more bytes than INIT allows is refused before a byte is copied, for any number
/// of such READs, and neither a stop nor SIGTERM waits for one. A READ of the largest size is
/// served.
#[test]
fn a_read_has_a_limit() {
    let (mut host, mut guest, node, fh) = big(&[]);
    let places = aliased(&guest);
    let most = read_of(&mut guest, node, fh, MAX_READ, &places[..1]);
    assert_eq!(guest.reply_with_data(most, MAX_READ), Reply::Ok(vec![]));
    for size in [MAX_READ + 1, 2 * MAX_READ, 800 << 20] {
        let pending = read_of(&mut guest, node, fh, size, &places);
        assert_eq!(guest.reply(pending), Reply::Error(libc::EINVAL), "{size} bytes");
    }
    let many: Vec<_> = (0..20).map(|_| read_of(&mut guest, node, fh, 800 << 20, &places)).collect();
    guest.vmm.stop();
    guest.start();
    for pending in many {
        assert_eq!(guest.reply(pending), Reply::Error(libc::EINVAL));
    }
    let _ = read_of(&mut guest, node, fh, 800 << 20, &places);
    kill(Pid::from_raw(host.pid() as i32), Signal::SIGTERM).unwrap();
    assert!(host.wait_end().success());
}

/// Shows: one COPY_FILE_RANGE copies a limited number of bytes, and returns that number.
#[test]
fn a_copy_has_a_limit() {
    let (host, mut guest, node, fh) = big(&[]);
    File::create(host.path("to")).unwrap();
    let (to, its) = guest.opened("to");
    for len in [3 << 30, u64::MAX, 16 << 20] {
        let arg = abi::copy_file_range((fh, 0), (to, its, 0), len);
        let body = guest.call(op::COPY_FILE_RANGE, node, &arg, 8).unwrap();
        assert_eq!(abi::u32_at(&body, 0), 16 << 20, "{len} bytes");
    }
}

/// Shows: a request that is longer than its operation permits is refused and not kept in memory.
/// The longest permitted request of each operation is served.
#[test]
fn each_kind_has_a_length() {
    let (host, mut guest, node, fh) = big(&["--xattr"]);
    let padding = (guest.scratch, MAX_READ);
    let small = [
        (op::FSYNC, node, abi::fsync(fh, false)),
        (op::LOOKUP, ROOT, Arg::new().name("big")),
        (op::COPY_FILE_RANGE, node, abi::copy_file_range((fh, 0), (node, fh, 0), 1)),
        (op::CREATE, ROOT, abi::create("new", libc::O_RDWR, 0o644)),
        (op::REMOVEMAPPING, node, abi::removemapping(&[])),
    ];
    for (opcode, on, arg) in small {
        let pending = guest.send_with(opcode, on, &[&arg.0], 256, &[padding], &[]);
        assert_eq!(guest.reply(pending), Reply::Error(libc::EINVAL), "opcode {opcode}");
    }
    assert!(!host.path("new").exists());
    let set = |name: &str, bytes: u32| Arg::new().u32s(&[bytes, 0]).name(name);
    let long = set("user.a", (64 << 10) + 1);
    let value = (guest.scratch, (64 << 10) + 257);
    let pending = guest.send_with(op::SETXATTR, node, &[&long.0], 0, &[value], &[]);
    assert_eq!(guest.reply(pending), Reply::Error(libc::E2BIG));
    // A host file system may permit less: ext4 returns its own error.
    let whole = set("user.a", 64 << 10);
    let value = (guest.scratch, 64 << 10);
    let pending = guest.send_with(op::SETXATTR, node, &[&whole.0], 0, &[value], &[]);
    let reply = guest.reply(pending);
    assert!(matches!(reply, Reply::Ok(_) | Reply::Error(libc::ENOSPC | libc::E2BIG)), "{reply:?}");
    let name = "n".repeat(4095);
    assert_eq!(guest.lookup(ROOT, &name).unwrap_err(), libc::ENAMETOOLONG);
    let link = Arg::new().name("link").name(&"t".repeat(4095));
    guest.call(op::SYMLINK, ROOT, &link, ENTRY_OUT).unwrap();
    let ioctl = Arg::new().u64s(&[fh, 0, 0]).u32s(&[0, 0]);
    let pending = guest.send_with(op::IOCTL, node, &[&ioctl.0], 16, &[padding], &[]);
    assert_eq!(
        guest.reply(pending),
        Reply::Error(libc::ENOSYS),
        "an unsupported request is neither served nor kept"
    );
}

/// Shows: waiting requests of the largest length need little memory of the daemon.
#[test]
fn what_waits_is_small() {
    let (host, mut guest, node, fh) = big(&["--thread-pool-size", "2"]);
    let before = host.own_kib();
    let padding = (guest.scratch, MAX_READ);
    let send = |guest: &mut FsGuest| {
        guest.send_with(op::FSYNC, node, &[&abi::fsync(fh, false).0], 0, &[padding], &[])
    };
    let many: Vec<_> = (0..20).map(|_| send(&mut guest)).collect();
    for pending in many {
        assert_eq!(guest.reply(pending), Reply::Error(libc::EINVAL));
    }
    // The requests have 20 MiB; the daemon keeps less than 1 MiB of them.
    assert!(host.own_kib() < before + 1024, "{before} KiB, then {}", host.own_kib());
}

/// Shows: a chain of more than 4 GiB, and one with more descriptors than the queue has, are
/// returned, and delay no other chain.
#[test]
fn chains_that_are_too_long() {
    let (_host, mut guest, node, fh) = big(&[]);
    let huge = vec![(guest.scratch, u32::MAX); 3];
    let pending = read_of(&mut guest, node, fh, 4096, &huge);
    assert_eq!(guest.reply(pending), Reply::Returned);
    let long = vec![(guest.scratch, 16); 200];
    let pending = read_of(&mut guest, node, fh, 3200, &long);
    assert_eq!(guest.reply(pending), Reply::Returned);
    assert_eq!(guest.read(node, fh, 0, 4).unwrap(), [0; 4]);
}

// --- user and group ids of the guest ---

/// Shows: with translated ids a guest creates no file that the host's root owns. Id -1 is invalid,
/// and creates nothing.
#[test]
fn an_invalid_id_is_not_root() {
    let rule = "map:0:100000:65536";
    let host = with(&["--translate-uid", rule, "--translate-gid", rule]);
    let mut guest = host.boot();
    let ok = [("zero", 0, Some(100_000)), ("thousand", 1000, Some(101_000))];
    // No rule contains this id, so it is the same on both sides.
    let all = [ok[0], ok[1], ("high", 200_000, Some(200_000)), ("nobody", u32::MAX, None)];
    for (name, id, owner) in all {
        let made =
            call_as(&mut guest, (op::MKNOD, ROOT), (id, id), &mknod(0o100_644, name), ENTRY_OUT);
        let found = host.path(name).symlink_metadata().map(|found| (found.uid(), found.gid()));
        assert_eq!(found.ok(), owner.map(|id| (id, id)), "{name}: {:?}", made.map(drop));
    }
}

/// Shows: id -1 is refused in each request that creates a file or sets an owner, with and without
/// translation; it is accepted in requests in which Linux sends it because ids don't matter.
#[test]
fn an_invalid_id_owns_nothing() {
    const FATTR_UID: u32 = 1 << 1;
    const FATTR_GID: u32 = 1 << 2;
    const NOBODY: u32 = u32::MAX;
    let host = with(&[]);
    host.put("f", b"hello");
    let mut guest = host.boot();
    let (node, fh) = guest.opened("f");
    let make = [
        (op::MKNOD, mknod(0o100_644, "new")),
        (op::MKDIR, Arg::new().u32s(&[0o755, 0]).name("new")),
        (op::SYMLINK, Arg::new().name("new").name("target")),
        (op::CREATE, abi::create("new", libc::O_RDWR | libc::O_CREAT, 0o644)),
    ];
    for (opcode, arg) in &make {
        for ids in [(NOBODY, 0), (0, NOBODY), (NOBODY, NOBODY)] {
            let made = call_as(&mut guest, (*opcode, ROOT), ids, arg, ENTRY_OUT + OPEN_OUT);
            assert_eq!(made.unwrap_err(), libc::EINVAL, "opcode {opcode} as {ids:?}");
            assert!(host.path("new").symlink_metadata().is_err());
        }
    }
    for (valid, uid, gid) in [(FATTR_UID, NOBODY, 0), (FATTR_GID, 0, NOBODY)] {
        let given = guest.call(op::SETATTR, node, &chown(valid, uid, gid), abi::ATTR_OUT);
        assert_eq!(given.unwrap_err(), libc::EINVAL);
    }
    let ids = (NOBODY, NOBODY);
    let read = abi::read(fh, 0, 5);
    assert_eq!(call_as(&mut guest, (op::READ, node), ids, &read, 5).unwrap(), b"hello");
    call_as(&mut guest, (op::GETATTR, node), ids, &abi::getattr(), abi::ATTR_OUT).unwrap();
    call_as(&mut guest, (op::LOOKUP, ROOT), ids, &Arg::new().name("f"), ENTRY_OUT).unwrap();
}

/// Shows: which attributes the guest's root can set with --xattr: those that need CAP_SYS_ADMIN only
/// with --modcaps; without --xattr the share accepts none.
#[test]
fn attributes_of_the_hosts_root() {
    let names = ["user.a", "trusted.a", "trusted.overlay.opaque", "security.anything"];
    let all = ["--xattr", "--modcaps=+sys_admin"];
    for (extra, is_set, all_set) in
        [(&["--xattr"][..], true, false), (&all, true, true), (&[], false, false)]
    {
        let host = with(extra);
        host.put("f", b"x");
        let mut guest = host.boot();
        let node = guest.node("f");
        for name in names {
            let arg = Arg::new().u32s(&[1, 0]).name(name).bytes(b"y");
            let set = guest.call(op::SETXATTR, node, &arg, 0).map(drop);
            let is_set = is_set && (all_set || name.starts_with("user."));
            // See --xattr in docs/operation.md. A file system may not support these attributes.
            let right = match set {
                Ok(()) => is_set,
                Err(errno) => !is_set || errno == libc::EOPNOTSUPP,
            };
            assert!(right, "{name}: {set:?} with {extra:?}");
        }
    }
}

// --- what is opened ---

/// Shows: OPEN, OPENDIR and CREATE pass on to the host only flags that concern reads and writes.
#[test]
fn odd_open_flags() {
    let host = with(&[]);
    host.put("f", b"hello");
    std::fs::create_dir(host.path("d")).unwrap();
    let mut guest = host.boot();
    let (d, f) = (guest.node("d"), guest.node("f"));
    let before = host.descriptors();
    for (node, flags) in [
        (d, libc::O_TMPFILE | libc::O_RDWR),
        (f, libc::O_PATH),
        (d, libc::O_PATH | libc::O_DIRECTORY),
        (f, libc::O_TRUNC | libc::O_PATH),
        (f, -1),
    ] {
        assert_eq!(guest.open(node, flags).unwrap_err(), libc::EINVAL, "{flags:#o}");
        let opened = guest.call(op::OPENDIR, d, &abi::open(flags), OPEN_OUT);
        assert_eq!(opened.unwrap_err(), libc::EINVAL, "{flags:#o}");
        let made = guest.call(op::CREATE, ROOT, &abi::create("n", flags, 0o644), 256);
        assert_eq!(made.unwrap_err(), libc::EINVAL, "{flags:#o}");
    }
    assert_eq!(host.get("f"), b"hello");
    assert!(!host.path("n").exists());
    for flags in [libc::O_ASYNC, libc::O_CREAT, libc::O_EXCL | libc::O_CREAT, libc::O_NOCTTY, 0x20]
    {
        let fh = guest.open(f, flags | libc::O_RDWR).unwrap();
        assert_eq!(guest.read(f, fh, 0, 4).unwrap(), b"hell", "{flags:#o}");
        guest.release(f, fh).unwrap();
    }
    host.wait_descriptors(&before);
}

/// The flags of the daemon's descriptor of `name`, from /proc.
fn host_flags(host: &FsHost, name: &str) -> Vec<i32> {
    let proc = format!("/proc/{}", host.pid());
    let entries = std::fs::read_dir(format!("{proc}/fd")).unwrap().flatten();
    let its = entries.filter(|fd| {
        std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with(format!("share/{name}")))
    });
    its.map(|fd| {
        let info = format!("{proc}/fdinfo/{}", fd.file_name().to_str().unwrap());
        let info = std::fs::read_to_string(info).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        i32::from_str_radix(flags.trim(), 8).unwrap()
    })
    .filter(|flags| flags & libc::O_PATH == 0)
    .collect()
}

/// Shows: OPEN and CREATE pass the same flags on to the host, and an option permits a flag in both.
#[test]
fn create_opens_as_open_does() {
    let asked = libc::O_RDWR | libc::O_CREAT | libc::O_DIRECT | libc::O_NOATIME | libc::O_APPEND;
    let asked = asked | libc::O_ASYNC;
    let seen = libc::O_DIRECT | libc::O_NOATIME | libc::O_APPEND | libc::O_ASYNC;
    let both = &["--allow-direct-io", "--preserve-noatime"][..];
    for (extra, kept) in [(&[][..], 0), (both, libc::O_DIRECT | libc::O_NOATIME)] {
        let host = with(extra);
        host.put("old", b"");
        let mut guest = host.boot();
        let old = guest.node("old");
        guest.open(old, asked).unwrap();
        for name in ["old", "new"] {
            guest.call(op::CREATE, ROOT, &abi::create(name, asked, 0o644), 256).unwrap();
        }
        for (name, opened) in [("old", 2), ("new", 1)] {
            let flags: Vec<_> = host_flags(&host, name).iter().map(|f| f & seen).collect();
            assert_eq!(flags, vec![kept; opened], "{name} with {extra:?}");
        }
    }
}

/// Shows: a CREATE that fails at the open or the truncation leaves neither a handle nor a look-up.
/// A CREATE with O_RDONLY and O_TRUNC truncates the file.
#[test]
fn a_create_that_fails_leaves_nothing() {
    let host = with(&[]);
    host.put("f", b"hello");
    std::fs::copy("/bin/sleep", host.path("busy")).unwrap();
    let mut sleeper = Command::new(host.path("busy")).arg("1000").spawn().unwrap();
    let mut guest = host.boot();
    let before = host.descriptors();
    let create = |guest: &mut FsGuest, name: &str, flags: i32| {
        let flags = flags | libc::O_CREAT | libc::O_TRUNC;
        guest.call(op::CREATE, ROOT, &abi::create(name, flags, 0o644), ENTRY_OUT + OPEN_OUT)
    };
    assert_eq!(create(&mut guest, "busy", libc::O_RDWR).unwrap_err(), libc::ETXTBSY);
    host.wait_descriptors(&before);
    let body = create(&mut guest, "f", libc::O_RDONLY).unwrap();
    assert_eq!(abi::Entry::parse(&body).attr.size, 0);
    assert_eq!(host.get("f"), b"");
    let node = u64_at(&body, 0);
    guest.release(node, u64_at(&body, ENTRY_OUT)).unwrap();
    guest.forget(node, 1);
    host.wait_descriptors(&before);
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
}

/// Shows: files that no process may write to are not mapped for writing, also by a daemon that runs
/// as root.
#[test]
fn files_that_must_not_be_written() {
    let host = with(&[]);
    for name in ["fixed", "append", "plain"] {
        host.put(name, &[b'x'; 5000]);
    }
    let attr = |flag: &str, name: &str| {
        let done = Command::new("chattr").arg(flag).arg(host.path(name)).output();
        done.is_ok_and(|done| done.status.success())
    };
    let marked = attr("+i", "fixed") && attr("+a", "append");
    std::fs::copy("/bin/sleep", host.path("busy")).unwrap();
    let mut sleeper = Command::new(host.path("busy")).arg("1000").spawn().unwrap();
    let mut guest = host.boot();
    let files = if marked { &["busy", "fixed", "append"][..] } else { &["busy"] };
    for name in files {
        let node = guest.node(name);
        assert!(guest.setup(node, 0, RANGE, BOTH, 0).is_err(), "{name}");
        assert!(guest.setup(node, 0, RANGE, MAP_READ, 0).is_err(), "{name}: Q7");
        let fh = guest.open(node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(node, fh, 0, 1).unwrap().len(), 1, "{name}");
    }
    let plain = guest.node("plain");
    guest.setup(plain, 0, RANGE, BOTH, 0).unwrap();
    sleeper.kill().unwrap();
    sleeper.wait().unwrap();
    let _ = (attr("-i", "fixed"), attr("-a", "append"));
}

/// Shows: a file of another user, without permissions for others, is mapped if the daemon runs as
/// root.
#[test]
fn a_file_of_another_user() {
    let host = with(&[]);
    host.put("f", &[b'o'; 5000]);
    std::os::unix::fs::chown(host.path("f"), Some(1000), Some(1000)).unwrap();
    let closed = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(host.path("f"), closed).unwrap();
    let mut guest = host.boot();
    let node = guest.node("f");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    assert_eq!(guest.vmm.fetch(0, 2).unwrap(), b"oo");
    assert!(guest.vmm.store(0, b"zz"));
    assert_eq!(&host.get("f")[..3], b"zzo");
}

// --- memory that is unmapped ---

/// Offers one descriptor without the driver's help, and kicks. It refers to an indirect table at
/// `table`.
fn offer_table(guest: &mut FsGuest, head: u16, table: u64) {
    let queue = &mut guest.queues[FIRST];
    queue.set_desc(head, Desc { addr: table, len: 32, flags: INDIRECT, next: 0 });
    queue.offer_untracked(head);
    queue.force_kick();
}

/// Shows: an indirect table that lies in the window, before or behind the end of its file, is not
/// read. Its chain is returned, and the daemon continues.
#[test]
fn a_table_in_the_window() {
    let host = FsHost::with(FsOptions { request_queues: 2, ..FsOptions::default() });
    host.put("f", &[0; 5000]);
    let mut guest = host.boot();
    let node = guest.node("f");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    for (head, at) in [(5, RANGE / 2), (6, 0)] {
        let before = guest.queues[FIRST].used_idx();
        offer_table(&mut guest, head, FsGuest::in_window(at));
        eventually("the chain to be returned", || guest.queues[FIRST].used_idx() != before);
    }
    // The driver's state of the first queue does not match any more. That of the other queue does.
    guest.on = FIRST + 1;
    assert_eq!(guest.getattr(node).unwrap().size, 5000);
}

/// Shows: a reply whose buffer lies in the window, behind the end of a file that is being mapped
/// there, is not written, and the daemon continues; also if the memory table lists each map.
#[test]
fn a_reply_in_the_window() {
    for mem_slots in [true, false] {
        let host = FsHost::with(FsOptions { mem_slots, ..FsOptions::default() });
        host.put("f", &[0; 5000]);
        let mut guest = host.boot();
        let node = guest.node("f");
        for (at, moffset) in [(RANGE / 2, 0), (RANGE, RANGE)] {
            let unique = guest.next_unique();
            let arg = abi::setupmapping(0, RANGE, BOTH, moffset).0;
            let head = in_header((40 + arg.len()) as u32, op::SETUPMAPPING, unique, node);
            let output_at = vec![(FsGuest::in_window(at), 64)];
            let chain = Chain { input: vec![head, arg], output_at, ..Chain::default() };
            let pending = guest.send_chain(FIRST, &chain, unique);
            assert_eq!(guest.reply(pending), Reply::Returned);
        }
        assert_eq!(guest.getattr(node).unwrap().size, 5000);
    }
}

/// Shows: a request whose head lies in the window, behind the end of a file, is not read.
#[test]
fn a_request_in_the_window() {
    let host = with(&[]);
    host.put("f", &[0; 5000]);
    let mut guest = host.boot();
    let node = guest.node("f");
    guest.setup(node, 0, RANGE, BOTH, 0).unwrap();
    for at in [RANGE / 2, 0] {
        let unique = guest.next_unique();
        let input_at = vec![(FsGuest::in_window(at), 40)];
        let chain = Chain { input_at, output: vec![16, 128], ..Chain::default() };
        let pending = guest.send_chain(FIRST, &chain, unique);
        assert_eq!(guest.reply(pending), Reply::Returned);
    }
    // The header is in RAM, the rest in the window.
    let name = [(FsGuest::in_window(RANGE / 2), 8)];
    let pending = guest.send_with(op::LOOKUP, ROOT, &[], ENTRY_OUT, &name, &[]);
    assert_eq!(guest.reply(pending), Reply::Error(libc::EINVAL));
    assert_eq!(guest.getattr(node).unwrap().size, 5000);
}

// --- floods ---

/// Shows: a guest that mounts very often gets a limited number of lines in the log. The log has the
/// number of lines that were held back, and the first line.
#[test]
fn a_flood_of_inits() {
    let host = with(&["--announce-submounts", "--posix-acl=auto", "--xattr"]);
    let mut guest = host.plug();
    guest.start();
    for _ in 0..500 {
        guest.init();
        guest.destroy();
    }
    host.wait_said("held back");
    let said = host.said();
    assert!(said.contains("mounted; the guest may map files"), "{said}");
    assert!(!said.contains("Warning:"), "virtiofsd's own line: {said}");
    // 4 rate limits, each with 20 lines and 1 line a second. The test takes only seconds.
    assert!(said.lines().count() < 300, "{} lines", said.lines().count());
}

/// Shows: a full stderr that no process reads delays neither requests nor the daemon's end.
#[test]
fn a_full_stderr_delays_no_request() {
    let host = FsHost::with(FsOptions {
        read_log: false,
        extra: vec!["--log-level=debug".into()],
        ..FsOptions::default()
    });
    host.put("f", b"hello");
    let mut guest = host.boot();
    // Three lines for each mount. The pipe holds some hundred lines.
    for _ in 0..3000 {
        assert_eq!(guest.node("f"), guest.node("f"));
    }
    guest.power_off();
    assert!(host.ended().success());
}

// --- the share ---

/// Shows: the daemon serves the directory that the path named at the start, also if the path names
/// another directory later.
#[test]
fn the_share_is_opened_once() {
    let host = with(&[]);
    host.put("f", b"first");
    let mut guest = host.boot();
    let share = host.path("").parent().unwrap().join("share");
    std::fs::rename(&share, share.with_file_name("moved")).unwrap();
    std::fs::create_dir(&share).unwrap();
    std::fs::write(share.join("f"), b"second").unwrap();
    guest.destroy();
    guest.init();
    let (node, fh) = guest.opened("f");
    assert_eq!(guest.read(node, fh, 0, 6).unwrap(), b"first");
}
