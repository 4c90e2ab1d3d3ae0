// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which system calls each process may make once it is set up. Each group says what makes its
//! calls. The lists come from traces of the test suites and of guests, and from reading what the
//! libraries call in cases that those do not reach.

use libc::*;

/// Whose calls are in a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Table {
    /// What serves a file as persistent memory.
    Pmem,
    /// What serves a share without a window.
    Share,
    /// What serves a share with a window, and has a broker.
    ShareWithWindow,
    /// What makes backing ids.
    Broker,
}

/// A call that is allowed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Allowed {
    /// With any arguments.
    Any(c_long),
    /// Where the argument of this index is such.
    If(c_long, u8, Arg),
}

/// What an argument is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    /// This number, in its lower 32 bits.
    Is(u64),
    /// Any other number.
    IsNot(u64),
    /// Whatever lacks these bits.
    Lacks(u64),
    /// Whatever has the first bits and lacks the second ones.
    HasAndLacks(u64, u64),
}

/// Memory: malloc, stacks of threads, files and guest memory that are mapped.
const MEMORY: &[c_long] = &[SYS_brk, SYS_madvise, SYS_mremap, SYS_munmap];

/// Threads: the C library's and the standard library's. (Making them: see `Table::allowed`.)
const THREADS: &[c_long] = &[
    SYS_clone3, // Refused with ENOSYS by the other filter.
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_getpid,
    SYS_gettid,
    SYS_membarrier,
    SYS_rseq,
    SYS_sched_getaffinity,
    SYS_sched_yield,
    SYS_sysinfo, // sysconf(3): memory.
    SYS_set_robust_list,
];

/// Signals, the daemon's end, abort(3), and the handler of SIGBUS (`persist/sigbus.rs`). (Changing
/// what a signal does: see `Table::allowed`.)
const SIGNALS: &[c_long] = &[
    SYS_restart_syscall,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_rt_sigtimedwait,
    SYS_sigaltstack,
];

/// Time, waiting, random keys of hash tables.
const TIME: &[c_long] =
    &[SYS_clock_gettime, SYS_clock_nanosleep, SYS_getrandom, SYS_gettimeofday, SYS_nanosleep];

/// vhost, vhost-user-backend and the listener: messages with descriptors, kicks and calls, the
/// search for the back-end channel's socket. No socket is made.
const SESSION: &[c_long] = &[
    SYS_accept4,
    SYS_close,
    SYS_dup,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_getpeername,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_pipe2,
    SYS_ppoll,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_shutdown,
];

/// cachestat(2), which the libc crate does not know: `persist/dirty.rs`.
const SYS_CACHESTAT: c_long = 451;

/// fchmodat2(2), which newer C libraries call for fchmodat(3) with flags.
const SYS_FCHMODAT2: c_long = 452;

/// Open files: both devices read, write, measure and sync them. openat is for /proc/self/fd. A
/// backtrace of a panic reads the working directory and the link /proc/self/exe.
const FILES: &[c_long] = &[
    SYS_CACHESTAT,
    SYS_fallocate,
    SYS_fdatasync,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_getcwd,
    SYS_getdents64,
    SYS_lseek,
    SYS_newfstatat,
    SYS_openat,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_read,
    SYS_readlinkat,
    SYS_readv,
    SYS_statx,
    SYS_sync_file_range,
    SYS_write,
    SYS_writev,
];

/// The file system of virtiofsd's library, by what the guest asks for.
const SHARE: &[c_long] = &[
    SYS_copy_file_range,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_FCHMODAT2,
    SYS_fchdir, // Extended attributes of what can't be opened: by a path relative to the thread.
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchown,
    SYS_fchownat,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_flock,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_ftruncate,
    SYS_getxattr,
    SYS_lgetxattr,
    SYS_linkat,
    SYS_listxattr,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_name_to_handle_at,
    SYS_openat2,
    SYS_open_by_handle_at,
    SYS_removexattr,
    SYS_renameat,
    SYS_renameat2,
    SYS_setxattr,
    SYS_statfs,
    SYS_symlinkat,
    SYS_syncfs,
    SYS_umask,
    SYS_unlinkat,
    SYS_utimensat,
];

/// The same library, when it acts as one of the guest's users. libcap-ng asks for capabilities.
const USERS: &[c_long] = &[
    SYS_capget,
    SYS_capset,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgroups,
    SYS_getuid,
    SYS_getgid,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
];

/// The window: files that are mapped are watched (`fs/dax/watch.rs`), and their passthrough files
/// are tried with a file in memory (`passthrough`).
const WINDOW: &[c_long] =
    &[SYS_inotify_add_watch, SYS_inotify_init1, SYS_inotify_rm_watch, SYS_memfd_create];

/// Commands of fcntl(2): the standard library, vmm-sys-util, the fuse device's and the memory
/// regions' checks (`passthrough/mod.rs`, `device/memory.rs`).
const FCNTL: &[c_int] =
    &[F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GET_SEALS];

/// Flags of clone(2) that make namespaces.
const NAMESPACES: u64 = (CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET) as u64;

/// What x86-64 has beside the calls that all architectures have.
#[cfg(target_arch = "x86_64")]
const OLD: &[c_long] = &[SYS_epoll_wait, SYS_open, SYS_poll, SYS_readlink, SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[c_long] = &[];

#[cfg(target_arch = "x86_64")]
const OLD_OF_SHARES: &[c_long] = &[SYS_unlink];
#[cfg(not(target_arch = "x86_64"))]
const OLD_OF_SHARES: &[c_long] = &[];

/// `PR_SET_VMA` (linux/prctl.h): the C library names its memory if GLIBC_TUNABLES asks for it.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// `PR_GET_AUXV` (linux/prctl.h).
const PR_GET_AUXV: u64 = 0x4155_5856;

/// `FS_IOC_FIEMAP` (linux/fs.h): where the blocks of a file on a DAX file system are.
const FS_IOC_FIEMAP: u64 = 0xC020_660B;

/// The broker (`passthrough/broker.rs`): messages, two ioctls, one more mount from a context that
/// was made ready before. Its memory is malloc's.
const BROKER: &[c_long] = &[
    SYS_brk,
    SYS_close,
    SYS_exit_group,
    SYS_fsmount,
    SYS_futex,
    SYS_getpid,
    SYS_gettid,
    SYS_madvise,
    SYS_munmap,
    SYS_recvmsg,
    SYS_restart_syscall,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sendmsg,
];

/// `FSCONFIG_CMD_CREATE` (linux/mount.h).
const FSCONFIG_CMD_CREATE: u64 = 6;

/// `FUSE_DEV_IOC_BACKING_OPEN` and `FUSE_DEV_IOC_BACKING_CLOSE` (linux/fuse.h).
const BACKING_OPEN: u64 = 0x4010_E501;
const BACKING_CLOSE: u64 = 0x4004_E502;

impl Table {
    /// Whether its process starts threads.
    pub(super) fn starts_threads(self) -> bool {
        self != Self::Broker
    }

    /// What its process may do.
    pub(super) fn allowed(self) -> Vec<Allowed> {
        let any = |calls: &[c_long]| calls.iter().copied().map(Allowed::Any).collect::<Vec<_>>();
        // No memory becomes code.
        let no_code = [SYS_mmap, SYS_mprotect]
            .map(|number| Allowed::If(number, 2, Arg::Lacks(PROT_EXEC as u64)));
        if self == Self::Broker {
            let mut allowed = any(BROKER);
            allowed.extend(no_code);
            // The standard library looks whether what it closes is open, in debug builds. The
            // broker looks whether a file is open for reading and writing.
            for command in [F_GETFD, F_GETFL] {
                allowed.push(Allowed::If(SYS_fcntl, 1, Arg::Is(command as u64)));
            }
            // Its end by a bug: a panic that is written to the closed stderr, abort(3), and the
            // standard library's handler of SIGSEGV. Else the parent process would name one of these
            // calls in place of the signal.
            allowed.push(Allowed::If(SYS_write, 0, Arg::Is(STDERR_FILENO as u64)));
            allowed.push(Allowed::If(SYS_writev, 0, Arg::Is(STDERR_FILENO as u64)));
            allowed.push(Allowed::If(SYS_rt_sigaction, 0, Arg::IsNot(SIGSYS as u64)));
            let this = u64::from(std::process::id());
            allowed.push(Allowed::If(SYS_tgkill, 0, Arg::Is(this)));
            allowed.push(Allowed::If(SYS_fsconfig, 1, Arg::Is(FSCONFIG_CMD_CREATE)));
            for request in [BACKING_OPEN, BACKING_CLOSE] {
                allowed.push(Allowed::If(SYS_ioctl, 1, Arg::Is(request)));
            }
            return allowed;
        }
        let mut allowed = any(MEMORY);
        for group in [THREADS, SIGNALS, TIME, SESSION, FILES, OLD] {
            allowed.extend(any(group));
        }
        allowed.extend(no_code);
        // pthread_create(3); no process, and no thread in namespaces of its own.
        let thread = Arg::HasAndLacks(CLONE_THREAD as u64, NAMESPACES);
        allowed.push(Allowed::If(SYS_clone, 0, thread));
        // Not F_SETOWN: by it and F_SETSIG the kernel would send any signal to any process of this
        // user. Not F_SETLEASE: a lease delays opens by host processes.
        for command in FCNTL {
            allowed.push(Allowed::If(SYS_fcntl, 1, Arg::Is(*command as u64)));
        }
        // The handler of a forbidden call stays.
        allowed.push(Allowed::If(SYS_rt_sigaction, 0, Arg::IsNot(SIGSYS as u64)));
        // A thread's name; rustix reads the size of a page from the auxiliary vector.
        for what in [PR_SET_NAME as u64, PR_SET_VMA, PR_GET_AUXV] {
            allowed.push(Allowed::If(SYS_prctl, 0, Arg::Is(what)));
        }
        // A ring's indices, which may lie where no memory is (`ring/vring.rs`): this process's own.
        let this = u64::from(std::process::id());
        allowed.push(Allowed::If(SYS_process_vm_readv, 0, Arg::Is(this)));
        // abort(3) and pthread_kill(3): signals to this process's own threads only.
        allowed.push(Allowed::If(SYS_tgkill, 0, Arg::Is(this)));
        // Limits are read, and not set.
        allowed.push(Allowed::If(SYS_prlimit64, 2, Arg::Lacks(u64::MAX)));
        // Unread bytes of a socket (`window/channel/raw.rs`); FIEMAP (`dax/fiemap.rs`).
        for request in [TIOCOUTQ, FIONREAD, FIONBIO, FS_IOC_FIEMAP] {
            allowed.push(Allowed::If(SYS_ioctl, 1, Arg::Is(request)));
        }
        if matches!(self, Self::Share | Self::ShareWithWindow) {
            for group in [SHARE, USERS, OLD_OF_SHARES] {
                allowed.extend(any(group));
            }
            // A thread's own umask and working directory: virtiofsd's library asks for that.
            allowed.push(Allowed::If(SYS_unshare, 0, Arg::Is(CLONE_FS as u64)));
            for what in [PR_CAPBSET_READ, PR_CAP_AMBIENT] {
                // libcap-ng.
                allowed.push(Allowed::If(SYS_prctl, 0, Arg::Is(what as u64)));
            }
        }
        if self == Self::ShareWithWindow {
            allowed.extend(any(WINDOW));
        }
        allowed
    }
}

/// Names of calls that a process which was taken over is likely to try, and of some that a library
/// may come to make.
const NAMES: &[(c_long, &str)] = &[
    (SYS_accept, "accept"),
    (SYS_bind, "bind"),
    (SYS_bpf, "bpf"),
    (SYS_chdir, "chdir"),
    (SYS_chroot, "chroot"),
    (SYS_clone, "clone"),
    (SYS_connect, "connect"),
    (SYS_dup3, "dup3"),
    (SYS_execve, "execve"),
    (SYS_execveat, "execveat"),
    (SYS_fcntl, "fcntl"),
    (SYS_finit_module, "finit_module"),
    (SYS_fsopen, "fsopen"),
    (SYS_getcwd, "getcwd"),
    (SYS_getrlimit, "getrlimit"),
    (SYS_inotify_init1, "inotify_init1"),
    (SYS_io_uring_setup, "io_uring_setup"),
    (SYS_ioctl, "ioctl"),
    (SYS_kill, "kill"),
    (SYS_listen, "listen"),
    (SYS_mmap, "mmap"),
    (SYS_mount, "mount"),
    (SYS_move_mount, "move_mount"),
    (SYS_mprotect, "mprotect"),
    (SYS_msync, "msync"),
    (SYS_open_by_handle_at, "open_by_handle_at"),
    (SYS_open_tree, "open_tree"),
    (SYS_openat, "openat"),
    (SYS_perf_event_open, "perf_event_open"),
    (SYS_pidfd_getfd, "pidfd_getfd"),
    (SYS_pidfd_open, "pidfd_open"),
    (SYS_pivot_root, "pivot_root"),
    (SYS_prctl, "prctl"),
    (SYS_prlimit64, "prlimit64"),
    (SYS_process_vm_readv, "process_vm_readv"),
    (SYS_process_vm_writev, "process_vm_writev"),
    (SYS_ptrace, "ptrace"),
    (SYS_rt_sigaction, "rt_sigaction"),
    (SYS_setns, "setns"),
    (SYS_socket, "socket"),
    (SYS_socketpair, "socketpair"),
    (SYS_setsockopt, "setsockopt"),
    (SYS_splice, "splice"),
    (SYS_sysinfo, "sysinfo"),
    (SYS_tgkill, "tgkill"),
    (SYS_tkill, "tkill"),
    (SYS_umount2, "umount2"),
    (SYS_uname, "uname"),
    (SYS_unshare, "unshare"),
    (SYS_userfaultfd, "userfaultfd"),
    (SYS_vhangup, "vhangup"),
    (SYS_wait4, "wait4"),
    (SYS_write, "write"),
];

/// The name of a call, as far as it is known, and its number.
pub(super) fn name_of(number: u32) -> String {
    match NAMES.iter().find(|(known, _)| *known == c_long::from(number)) {
        Some((_, name)) => format!("{name} ({number})"),
        None => format!("number {number} ('ausyscall {number}' has its name)"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(allowed: &Allowed) -> c_long {
        match *allowed {
            Allowed::Any(number) | Allowed::If(number, ..) => number,
        }
    }

    /// Shows: no call is in a table both with any arguments and with some, and none twice; what
    /// would undo the sandbox is in none.
    #[test]
    fn tables_are_consistent() {
        for table in [Table::Pmem, Table::Share, Table::ShareWithWindow, Table::Broker] {
            let allowed = table.allowed();
            for call in &allowed {
                let number = number(call);
                let same = allowed.iter().filter(|other| self::number(other) == number);
                let is_alone = same.count() == 1;
                assert!(is_alone || matches!(call, Allowed::If(..)), "{table:?}: {number}");
            }
            for never in [
                SYS_bpf,
                SYS_chroot,
                SYS_connect,
                SYS_execve,
                SYS_execveat,
                SYS_fsopen,
                SYS_kill,
                SYS_mount,
                SYS_move_mount,
                SYS_open_tree,
                SYS_pivot_root,
                SYS_ptrace,
                SYS_seccomp,
                SYS_setns,
                SYS_setsockopt,
                SYS_socket,
                SYS_vhangup,
            ] {
                assert!(allowed.iter().all(|call| number(call) != never), "{table:?}: {never}");
            }
        }
    }
}
