// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 1 of 6: what each device's process is left with, and the processes beside it. Knows the
//! sandbox, and of a device its settings only.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::thread::CapabilitySet;
use virtiofsd::passthrough::InodeFileHandlesMode;

use super::DaemonError;
use super::config::{ConfigError, FsRunConfig};
use super::listener::{BoundSocket, SocketSpec};
use crate::fs::FsConfig;
use crate::fs::descriptors::mapped_files;
use crate::fs::inodes;
use crate::passthrough::Mounter;
use crate::passthrough::broker::Broker;
use crate::sandbox::root::{self, Share};
use crate::sandbox::tables::Table;
use crate::sandbox::{
    self, Cell, CleanUp, Forked, ModCaps, Plan, SandboxError, SandboxMode, capabilities,
};

/// Closes what this process has inherited but for the listener, and undoes an inherited
/// disposition of SIGCHLD.
pub(super) fn close_inherited(socket: &SocketSpec) {
    sandbox::report_children();
    sandbox::close_inherited(match socket {
        SocketSpec::Fd(fd) => Some(*fd),
        SocketSpec::Path { .. } => None,
    });
}

/// Forks the worker, and returns in it, shut in: from here on there may be threads. The parent
/// process removes the socket's file when the worker has ended.
fn enter(
    plan: &Plan,
    cell: Cell,
    helper: Option<Forked>,
    bound: &BoundSocket,
) -> Result<(), DaemonError> {
    let clean_up = CleanUp {
        run: &|| bound.remove(),
        keep: bound.descriptor().into_iter().collect(),
        dir: bound.dir(),
    };
    // What the host does not permit was found out before a file was made: a resource is lacking.
    sandbox::enter(plan, cell, helper, &clean_up)
        .map_err(|e| io::Error::new(e.kind(), format!("the sandbox: {e}")))?;
    bound.leave();
    Ok(())
}

/// The worker of a file.
///
/// # Errors
/// What could not be had.
pub(super) fn pmem(plan: &Plan, modcaps: ModCaps, bound: &BoundSocket) -> Result<(), DaemonError> {
    let acts_as = plan.enter_user_namespace(&[], &[]).map_err(ConfigError::from)?;
    let cell = Cell {
        share: None,
        readonly: false,
        acts_as,
        capabilities: modcaps.applied_to(CapabilitySet::empty()),
        table: Table::Pmem,
    };
    enter(plan, cell, None, bound)
}

/// The capabilities of the worker of a share.
///
/// # Errors
/// What contradicts itself.
pub(super) fn share_capabilities(config: &FsRunConfig) -> Result<CapabilitySet, SandboxError> {
    let modcaps = config.sandbox.modcaps;
    let needed = match config.fs.inode_file_handles {
        InodeFileHandlesMode::Never => CapabilitySet::empty(),
        _ => capabilities::FILE_HANDLES,
    };
    if !modcaps.leaves(needed) {
        return Err(SandboxError::FileHandles);
    }
    Ok(modcaps.applied_to(capabilities::SHARE | needed))
}

/// The worker of a share, and its broker. Returns the settings as they are in the worker.
///
/// # Errors
/// What could not be had.
pub(super) fn share(
    plan: &Plan,
    config: &FsRunConfig,
    share: Share,
    capabilities: CapabilitySet,
    bound: &BoundSocket,
) -> Result<FsConfig, DaemonError> {
    let fs = &config.fs;
    let is_mapped = !fs.uid_map.is_empty() || !fs.gid_map.is_empty();
    let (mounter, helper) = mounter(plan, fs, is_mapped)?;
    let acts_as = plan.enter_user_namespace(&fs.uid_map, &fs.gid_map).map_err(ConfigError::from)?;
    let table = if helper.is_some() { Table::ShareWithWindow } else { Table::Share };
    let share_path = share.path_text();
    let cell = Cell { share: Some(share), readonly: fs.readonly, acts_as, capabilities, table };
    inodes::memory_bytes();
    enter(plan, cell, helper, bound)?;
    let (shared_dir, chroot) = match plan.mode {
        SandboxMode::Namespace => (PathBuf::from(root::SHARE), None),
        SandboxMode::Chroot => (PathBuf::from("/"), Some(share_path)),
        SandboxMode::None => (fs.shared_dir.clone(), None),
    };
    Ok(FsConfig { shared_dir, chroot, mounter, ..fs.clone() })
}

/// What will make the window's private mount.
fn mounter(
    plan: &Plan,
    fs: &FsConfig,
    is_mapped: bool,
) -> Result<(Mounter, Option<Forked>), DaemonError> {
    if !fs.wants_window() {
        return Ok((Mounter::Unprivileged, None));
    }
    if plan.mode == SandboxMode::Chroot {
        return Ok((Mounter::Chroot, None));
    }
    if is_mapped || !capabilities::has(CapabilitySet::SYS_ADMIN) {
        return Ok((Mounter::Unprivileged, None));
    }
    // One more: a mount is tried when it is made.
    let most = mapped_files(fs) as usize + 1;
    let (broker, helper) = Broker::fork(most, plan.seccomp)?;
    Ok((Mounter::Broker(Arc::new(broker)), Some(helper)))
}
