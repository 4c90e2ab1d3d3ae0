// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! In debug builds only: has the worker try what a guest that took it over would try, right before
//! it would serve one. tests/sandbox.rs reads the answers.

#![allow(unsafe_code)] // System calls as an attacker makes them.

use std::ffi::CString;
use std::io;

/// The attempts, with commas between: a word of `attempt`, and for some a path behind a colon.
const VARIABLE: &str = "VUD_TEST_IN_WORKER";

/// Tries each, and says on stderr what came of it.
pub(super) fn run() {
    let Ok(attempts) = std::env::var(VARIABLE) else { return };
    for what in attempts.split(',') {
        let done = attempt(what);
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        let line = if done < 0 { format!("errno {errno}") } else { format!("done {done}") };
        eprintln!("in the worker: {what}: {line}");
    }
}

fn attempt(what: &str) -> i64 {
    let (what, path) = what.split_once(':').unwrap_or((what, "/"));
    let Ok(path) = CString::new(path) else { return 0 };
    let (path, null) = (path.as_ptr(), std::ptr::null::<libc::c_void>());
    // SAFETY: all pointers are to strings, or null, and outlive the calls; a process that is forked
    // ends at once.
    unsafe {
        match what {
            "open" => i64::from(libc::open(path, libc::O_RDONLY)),
            "stat" => libc::syscall(libc::SYS_newfstatat, libc::AT_FDCWD, path, null, 0),
            "socket" => i64::from(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0)),
            "fork" => match libc::fork() {
                0 => libc::_exit(0),
                pid => i64::from(pid),
            },
            "exec" => i64::from(libc::execv(path, std::ptr::null())),
            "ptrace" => libc::ptrace(libc::PTRACE_TRACEME, 0, null, null),
            "kill" => i64::from(libc::kill(1, 0)),
            "mount" => {
                i64::from(libc::mount(c"none".as_ptr(), c"/".as_ptr(), c"tmpfs".as_ptr(), 0, null))
            }
            "chroot" => i64::from(libc::chroot(c"/".as_ptr())),
            "unshare" => i64::from(libc::unshare(libc::CLONE_NEWUSER)),
            "handle" => {
                let mut handle = [0_u32; 34];
                handle[0] = 128;
                let mut mount = 0;
                let root = libc::open(path, libc::O_RDONLY | libc::O_DIRECTORY);
                let (empty, at) = (c"".as_ptr(), handle.as_mut_ptr().cast::<libc::file_handle>());
                libc::name_to_handle_at(root, empty, at, &mut mount, libc::AT_EMPTY_PATH);
                i64::from(libc::open_by_handle_at(root, at, libc::O_PATH))
            }
            "code" => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let rwx = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
                libc::syscall(libc::SYS_mmap, null, 4096, rwx, flags, -1, 0)
            }
            #[allow(clippy::panic)]
            "panic" => std::thread::spawn(|| panic!("as the test asks")).join().is_err().into(),
            "handler" => libc::signal(libc::SIGSYS, libc::SIG_IGN) as i64,
            // `path` relative to each open directory.
            "below" => (0..256)
                .map(|fd| i64::from(libc::openat(fd, path, libc::O_RDONLY)))
                .find(|opened| *opened >= 0)
                .unwrap_or(-1),
            // The kernel sends the owner any signal that F_SETSIG names.
            "owner" => {
                let mut pipe = [0; 2];
                libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC);
                i64::from(libc::fcntl(pipe[0], libc::F_SETOWN, libc::getpid()))
            }
            "tgkill" => libc::syscall(libc::SYS_tgkill, 2, 2, 0),
            // A thread with a mount namespace of its own.
            "clone" => {
                let flags = libc::CLONE_THREAD | libc::CLONE_SIGHAND | libc::CLONE_VM;
                libc::syscall(libc::SYS_clone, flags | libc::CLONE_NEWNS, 0, 0, 0, 0)
            }
            "sockopt" => {
                let (one, length) = ([1_i32], size_of::<i32>() as libc::socklen_t);
                let value = one.as_ptr().cast();
                i64::from(libc::setsockopt(2, libc::SOL_SOCKET, libc::SO_DEBUG, value, length))
            }
            _ => 0,
        }
    }
}
