// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which sandbox the host permits, found out before anything is made.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use log::warn;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, geteuid};
use rustix::thread::{CapabilitySet, UnshareFlags, unshare_unsafe};
use thiserror::Error;

use super::options::{SandboxMode, SandboxOptions, SeccompMode};
use super::root::{self, Share};
use super::tables::Table;
use super::user_namespace::{self, ActsAs};
use super::{Cell, capabilities};

/// A sandbox that can't be had. The exit code is 2.
#[derive(Debug, Error)]
#[allow(missing_docs)] // The texts say it better.
pub enum SandboxError {
    #[error(
        "--sandbox namespace: {0}; permit namespaces (CAP_SYS_ADMIN, or the sysctl \
         user.max_user_namespaces), or take --sandbox none"
    )]
    Namespace(String),
    #[error("--sandbox chroot takes root and CAP_SYS_CHROOT; take --sandbox namespace or none")]
    Chroot,
    #[error("--uid-map and --gid-map take --sandbox namespace; leave one of them out")]
    Maps,
    #[error(
        "--modcaps takes dac_read_search away, and --inode-file-handles needs it; take \
         --inode-file-handles=never, or leave it in"
    )]
    FileHandles,
    #[error("/proc/self/fd: {0}; mount /proc ('mount -t proc proc /proc')")]
    Proc(io::Error),
}

/// The sandbox that is used.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How the file tree is hidden.
    pub mode: SandboxMode,
    /// What a forbidden call does.
    pub seccomp: SeccompMode,
    /// This process is the host's root, or the container's.
    pub(super) is_root: bool,
    /// A user that is not root and has no user namespace has no capability that could be dropped
    /// without a loss of what it was given on purpose.
    pub(super) drops_capabilities: bool,
    /// A user namespace is entered.
    needs_user: bool,
}

impl Plan {
    /// Chooses by the options and by what the host permits. `is_mapped`: there are --uid-map and
    /// --gid-map.
    ///
    /// # Errors
    /// See [`SandboxError`].
    pub fn choose(
        options: &SandboxOptions,
        share: Option<&Share>,
        is_mapped: bool,
    ) -> Result<Self, SandboxError> {
        let is_root = geteuid().is_root();
        // A user who was given the capability is in no need of a user namespace, where it would not
        // count.
        let needs_user = is_mapped || !(is_root || capabilities::has(CapabilitySet::SYS_ADMIN));
        let plan = |mode| Self {
            mode,
            seccomp: options.seccomp,
            is_root,
            drops_capabilities: is_root || mode == SandboxMode::Namespace,
            needs_user: mode == SandboxMode::Namespace && needs_user,
        };
        match options.mode {
            Some(SandboxMode::None | SandboxMode::Chroot) if is_mapped => Err(SandboxError::Maps),
            Some(SandboxMode::None) => Ok(plan(SandboxMode::None)),
            Some(SandboxMode::Chroot) => {
                let may = is_root && capabilities::has(CapabilitySet::SYS_CHROOT);
                if may { Ok(plan(SandboxMode::Chroot)) } else { Err(SandboxError::Chroot) }
            }
            named => match try_namespaces(needs_user, share) {
                Ok(()) => Ok(plan(SandboxMode::Namespace)),
                Err(why) if named.is_some() || is_mapped => Err(SandboxError::Namespace(why)),
                Err(why) => {
                    warn!(
                        "no namespaces ({why}): the daemon sees the host's file tree as far as its \
                         user and Landlock let it; --sandbox none says that this is meant"
                    );
                    Ok(plan(SandboxMode::None))
                }
            },
        }
    }

    /// Enters the user namespace, if there is to be one and the maps have not been written yet. To
    /// be called before any thread starts, and after all that needs the host's root.
    ///
    /// # Errors
    /// See [`user_namespace::NamespaceError`].
    pub fn enter_user_namespace(
        &self,
        uids: &[virtiofsd::idmap::UidMap],
        gids: &[virtiofsd::idmap::GidMap],
    ) -> Result<ActsAs, user_namespace::NamespaceError> {
        if self.needs_user { user_namespace::enter(uids, gids) } else { Ok(ActsAs::default()) }
    }

    /// Landlock takes away what a mount namespace would have hidden from a process that has no
    /// business there. A root that serves a share keeps what it sees: its private mounts are none
    /// that a rule could name beforehand.
    pub(super) fn uses_landlock(&self, cell: &Cell) -> bool {
        match cell.table {
            Table::Pmem => true,
            _ => self.mode == SandboxMode::None && !self.is_root,
        }
    }
}

/// Looks whether there is /proc, in which the daemon finds its own descriptors in all modes.
///
/// # Errors
/// [`SandboxError::Proc`].
pub fn check_proc() -> Result<(), SandboxError> {
    File::open("/proc/self/fd").map(drop).map_err(SandboxError::Proc)
}

/// Whether a worker could have its own namespaces and its own root: a child tries all of it. The
/// reason, if not.
#[allow(unsafe_code)]
fn try_namespaces(needs_user: bool, share: Option<&Share>) -> Result<(), String> {
    let (mut reader, mut writer) = io::pipe().map_err(|e| e.to_string())?;
    // SAFETY: there is one thread, so the child may do what this process may.
    match unsafe { fork() } {
        Err(e) => Err(format!("fork: {e}")),
        Ok(ForkResult::Parent { child }) => {
            drop(writer);
            let mut why = String::new();
            let read = reader.read_to_string(&mut why);
            let ended = waitpid(child, None);
            match (read, ended) {
                (Ok(0), Ok(WaitStatus::Exited(_, 0))) => Ok(()),
                (Ok(1..), _) => Err(why),
                (_, ended) => Err(format!("the trial ended with {ended:?}")),
            }
        }
        Ok(ForkResult::Child) => {
            if let Err(why) = enter_namespaces(needs_user, share) {
                let _ = writer.write_all(why.as_bytes());
            }
            // SAFETY: the process ends, and runs none of the handlers that the parent has
            // registered.
            unsafe { libc::_exit(0) }
        }
    }
}

/// Does in the child what [`super::enter`] does for a worker, in the same order. The user namespace
/// has the daemon's own user, whatever the maps of the options are.
#[allow(unsafe_code)]
fn enter_namespaces(needs_user: bool, share: Option<&Share>) -> Result<(), String> {
    if needs_user {
        user_namespace::enter(&[], &[]).map_err(|e| e.to_string())?;
    }
    // SAFETY: this process has one thread, and ends soon.
    unsafe { unshare_unsafe(UnshareFlags::NEWPID) }
        .map_err(root::at("unshare"))
        .and_then(|()| root::leave_namespaces(UnshareFlags::NEWNET))
        .and_then(|()| root::enter(share, false))
        .map_err(|e| e.to_string())
}

/// The parent process keeps no capability. Where it could not remove the socket's file without, it
/// keeps CAP_DAC_OVERRIDE: `dir` is another user's.
///
/// # Errors
/// The system's.
pub(super) fn drop_for_parent(dir: Option<&Path>) -> io::Result<()> {
    let needed = CapabilitySet::DAC_OVERRIDE;
    let is_writable = |dir: &Path| {
        let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        let flags = rustix::fs::AtFlags::EACCESS;
        rustix::fs::accessat(rustix::fs::CWD, dir, access, flags).is_ok()
    };
    let keeps = match dir {
        Some(dir) => !capabilities::without_effect(|| is_writable(dir))?,
        None => false,
    };
    capabilities::keep(if keeps { needed } else { CapabilitySet::empty() })
}
