// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Other processes: this test program, started again for the one test `plays_a_role`.

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

/// A child process and the socket to it.
pub struct Player {
    pub process: Child,
    pub line: UnixStream,
    /// The folder with a copy of this program that another user can execute.
    _program: TempDir,
}

impl Player {
    /// Starts a child process in `role`, as user `uid` if there is one.
    pub fn start(role: &str, uid: Option<u32>) -> Self {
        let (line, child_end) = UnixStream::pair().unwrap();
        // Another user may lack permission for the build folder.
        let program = tempfile::tempdir().unwrap();
        fs::set_permissions(program.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let copy = program.path().join("program");
        // cp writes the copy: if this process wrote it, a child forked by another test would hold
        // it open for writing, and exec would fail with ETXTBSY.
        let mut cp = Command::new("cp");
        let copied = cp.arg(std::env::current_exe().unwrap()).arg(&copy).status();
        assert!(copied.unwrap().success());
        let mut command = Command::new(copy);
        command.args(["--exact", "roles::plays_a_role", "--nocapture", "--quiet"]);
        command.env(ROLE, role).stdin(OwnedFd::from(child_end)).stdout(Stdio::null());
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        Self { process: command.spawn().unwrap(), line, _program: program }
    }

    /// Waits for one byte from the child.
    pub fn wait_byte(&mut self) {
        self.line.read_exact(&mut [0]).unwrap();
    }

    /// Sends one byte to the child.
    pub fn send_byte(&mut self) {
        self.line.write_all(&[1]).unwrap();
    }

    /// Waits until the child has ended, with code 0.
    pub fn join(mut self) {
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
    // SAFETY: the kernel has just opened this descriptor for us, and no other code has its number.
    unsafe { File::from_raw_fd(fd) }
}

/// The body of the child processes of the other tests; without a role it does nothing.
#[test]
fn plays_a_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut line = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    match &*role {
        // Makes a mount, sends two files (the passthrough file, then the real one), and waits to be
        // killed.
        "daemon" => {
            let real = file_here(5000);
            let mount = PassthroughMount::new().unwrap();
            let passthrough = mount.open(&real).unwrap();
            send_file(&line, &passthrough);
            send_file(&line, &real);
            line.read_exact(&mut [0]).unwrap();
            panic!("the daemon was not killed");
        }
        // Acts as QEMU with the descriptor, then as a guest with the map.
        "front-end" => {
            let passthrough = receive_file(&line);
            assert_eq!(passthrough.metadata().unwrap().len(), CLAIMED_BYTES);
            let _ = nix::sys::statfs::fstatfs(&passthrough).unwrap();
            let map = Map::of(&passthrough, RANGE_BYTES);
            map.store(0, b"mapped");
            line.write_all(&[1]).unwrap();
            line.read_exact(&mut [0]).unwrap();
            // The parent has dropped the mount and the passthrough file by now.
            assert_eq!(map.load(1 << 20, 5), b"later");
            map.store(1000, b"still mapped");
            assert_eq!(Seek::seek(&mut &passthrough, SeekFrom::End(0)).unwrap(), CLAIMED_BYTES);
            let errno = passthrough.metadata().unwrap_err().raw_os_error();
            assert_eq!(errno, Some(nix::errno::Errno::ENOTCONN as i32));
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
