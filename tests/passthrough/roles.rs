// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Other processes: this program, run anew for one test that plays a part.

use std::fs::{self, File};
use std::io::{IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tempfile::TempDir;
use vhost_user_dax::passthrough::{CLAIMED_BYTES, PassthroughMount};

use crate::map::Map;
use crate::{RANGE_BYTES, file_here};

const ROLE: &str = "VUD_PASSTHROUGH_ROLE";

/// A process and the line to it.
pub struct Player {
    pub process: Child,
    pub line: UnixStream,
    /// Where another user finds this program.
    _program: TempDir,
}

impl Player {
    /// Starts one; `uid` is another user's, if not ours.
    pub fn start(role: &str, uid: Option<u32>) -> Self {
        let (line, theirs) = UnixStream::pair().unwrap();
        // Another user may have no way to where it was built.
        let program = tempfile::tempdir().unwrap();
        fs::set_permissions(program.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let copy = program.path().join("program");
        // By cp: a test beside this one that forks while we write would keep it busy.
        let mut cp = Command::new("cp");
        let copied = cp.arg(std::env::current_exe().unwrap()).arg(&copy).status();
        assert!(copied.unwrap().success());
        let mut command = Command::new(copy);
        command.args(["--exact", "roles::plays_a_role", "--nocapture", "--quiet"]);
        command.env(ROLE, role).stdin(OwnedFd::from(theirs)).stdout(Stdio::null());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        Self { process: command.spawn().unwrap(), line, _program: program }
    }

    /// Waits for one byte.
    pub fn told(&mut self) {
        self.line.read_exact(&mut [0]).unwrap();
    }

    /// Sends one byte.
    pub fn tell(&mut self) {
        self.line.write_all(&[1]).unwrap();
    }

    /// Until it has ended of itself, content.
    pub fn ends(mut self) {
        assert!(self.process.wait().unwrap().success());
    }
}

pub fn send_file(line: &UnixStream, file: &File) {
    let (bytes, fds) = ([IoSlice::new(&[1])], [file.as_raw_fd()]);
    let with = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(line.as_raw_fd(), &bytes, &with, MsgFlags::empty(), None).unwrap();
}

pub fn receive_file(line: &UnixStream) -> File {
    let mut byte = [0];
    let mut space = nix::cmsg_space!(i32);
    let mut into = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(line.as_raw_fd(), &mut into, Some(&mut space), flags).unwrap();
    match message.cmsgs().unwrap().next() {
        Some(ControlMessageOwned::ScmRights(fds)) => adopt(fds[0]),
        other => panic!("{other:?}"),
    }
}

#[allow(unsafe_code)] // Taking over a descriptor by its number has no safe form.
fn adopt(fd: i32) -> File {
    use std::os::fd::FromRawFd;
    // SAFETY: the kernel has just given it to us, and nobody else knows of it.
    unsafe { File::from_raw_fd(fd) }
}

/// Shows: nothing by itself; it is what the other processes of the other tests do.
#[test]
fn plays_a_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut line = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    match &*role {
        // Makes a mount, hands two files out (the real one last), and waits to be killed.
        "daemon" => {
            let real = file_here(5000);
            let mount = PassthroughMount::new().unwrap();
            let passthrough = mount.open(&real).unwrap();
            send_file(&line, &passthrough);
            send_file(&line, &real);
            line.read_exact(&mut [0]).unwrap();
            panic!("the daemon was to be killed");
        }
        // Does what QEMU does with a descriptor, then what a guest does with the map.
        "front-end" => {
            let passthrough = receive_file(&line);
            assert_eq!(passthrough.metadata().unwrap().len(), CLAIMED_BYTES);
            let _ = nix::sys::statfs::fstatfs(&passthrough).unwrap();
            let map = Map::of(&passthrough, RANGE_BYTES);
            map.store(0, b"mapped");
            line.write_all(&[1]).unwrap();
            line.read_exact(&mut [0]).unwrap();
            // The daemon's end is gone by now.
            assert_eq!(map.load(1 << 20, 5), b"later");
            map.store(1000, b"still mapped");
            assert_eq!(Seek::seek(&mut &passthrough, SeekFrom::End(0)).unwrap(), CLAIMED_BYTES);
            let told = passthrough.metadata().unwrap_err().raw_os_error();
            assert_eq!(told, Some(nix::errno::Errno::ENOTCONN as i32));
            let again = Map::of(&passthrough, RANGE_BYTES);
            assert_eq!(again.load(1000, 12), b"still mapped");
            drop(passthrough);
            map.store(2000, b"without a descriptor");
            line.write_all(&[1]).unwrap();
            line.read_exact(&mut [0]).unwrap();
        }
        "refused" => {
            let error = PassthroughMount::new().err().unwrap().to_string();
            line.write_all(error.as_bytes()).unwrap();
        }
        other => panic!("no role: {other}"),
    }
}
