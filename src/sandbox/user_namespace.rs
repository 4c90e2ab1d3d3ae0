// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A user namespace for a daemon that is not root (user_namespaces(7)), so that a guest's files can
//! belong to more than one user all the same: `--uid-map` and `--gid-map`.

use std::fs;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setegid, seteuid};
use thiserror::Error;
use virtiofsd::idmap::{GidMap, UidMap};

/// Why there is no user namespace.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// For root the system's own users are all there.
    #[error("is for a daemon that is not root; as root take --translate-uid and --translate-gid")]
    Root,
    /// The kernel's answer.
    #[error("no user namespace can be made: {0}; see user.max_user_namespaces in sysctl")]
    Unshare(io::Error),
    /// Not by us, and not by newuidmap.
    #[error(
        "{0}; more than one's own number takes newuidmap (package uidmap) and a range in /etc/subuid"
    )]
    Map(String),
}

/// One line of a map: numbers inside, numbers outside, how many.
type Line = [u32; 3];

/// Whether this user has one to enter.
///
/// # Errors
/// [`NamespaceError::Root`].
pub fn check() -> Result<(), NamespaceError> {
    if Uid::effective().is_root() { Err(NamespaceError::Root) } else { Ok(()) }
}

/// Which user and group of a user namespace the worker acts as. None: the daemon's own.
#[derive(Debug, Clone, Copy, Default)]
pub struct ActsAs {
    uid: Option<Uid>,
    gid: Option<Gid>,
}

impl ActsAs {
    /// Changes the effective ids only: by the real ones the parent process, which has no capability,
    /// may still send signals to this process. Clears the signal of prctl(PR_SET_PDEATHSIG).
    ///
    /// # Errors
    /// The system's.
    pub(super) fn change(self) -> nix::Result<()> {
        self.gid.map_or(Ok(()), setegid)?;
        self.uid.map_or(Ok(()), seteuid)
    }
}

/// The first number inside, if `own` is none of the numbers outside: no file could be created by a
/// user that has no number, and no thread could change back to it.
fn first_unless_mapped(lines: &[Line], own: u32) -> Option<u32> {
    let is_mapped = lines
        .iter()
        .any(|[_, outside, count]| own.checked_sub(*outside).is_some_and(|offset| offset < *count));
    let first = lines.first().map(|[inside, ..]| *inside);
    first.filter(|_| !is_mapped)
}

/// Enters a new user namespace with these maps; without one it is one's own number, as it is. The
/// process must have no other thread yet.
///
/// # Errors
/// See [`NamespaceError`].
pub fn enter(uids: &[UidMap], gids: &[GidMap]) -> Result<ActsAs, NamespaceError> {
    check()?;
    let (uid, gid) = (Uid::effective(), Gid::effective());
    let mut uid_lines: Vec<Line> =
        uids.iter().map(|map| [map.inside_uid, map.outside_uid, map.count]).collect();
    let mut gid_lines: Vec<Line> =
        gids.iter().map(|map| [map.inside_gid, map.outside_gid, map.count]).collect();
    if uid_lines.is_empty() {
        uid_lines.push([uid.as_raw(), uid.as_raw(), 1]);
    }
    if gid_lines.is_empty() {
        gid_lines.push([gid.as_raw(), gid.as_raw(), 1]);
    }
    let acts_as = ActsAs {
        uid: first_unless_mapped(&uid_lines, uid.as_raw()).map(Uid::from_raw),
        gid: first_unless_mapped(&gid_lines, gid.as_raw()).map(Gid::from_raw),
    };
    // They look at us from outside, and wait until there is something to look at.
    let uid_mapper = Mapper::prepare("uid", uid_lines, uid.as_raw())?;
    let gid_mapper = Mapper::prepare("gid", gid_lines, gid.as_raw())?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| NamespaceError::Unshare(e.into()))?;
    uid_mapper.map()?;
    gid_mapper.map()?;
    Ok(acts_as)
}

/// How one of the two maps is written.
enum Mapper {
    /// One's own number: that may be written from within.
    Own(&'static str, Line),
    /// newuidmap or newgidmap, which read the ranges that one was given.
    Helper(&'static str, std::process::Child),
}

impl Mapper {
    fn prepare(what: &'static str, lines: Vec<Line>, own: u32) -> Result<Self, NamespaceError> {
        if let [line @ [_, outside, 1]] = lines[..]
            && outside == own
        {
            return Ok(Self::Own(what, line));
        }
        let numbers = lines.iter().flatten().map(u32::to_string);
        let script = format!("read -r go && exec new{what}map \"$PPID\" \"$@\"");
        Command::new("sh")
            .args(["-c", &script, "sh"])
            .args(numbers)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map(|child| Self::Helper(what, child))
            .map_err(|e| NamespaceError::Map(format!("sh: {e}")))
    }

    fn map(self) -> Result<(), NamespaceError> {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            NamespaceError::Map(format!("the {what} map can't be written: {e}"))
        };
        match self {
            Self::Own(what, [inside, outside, count]) => {
                if what == "gid" {
                    // The kernel asks for it where it is not a privileged process that writes.
                    fs::write("/proc/self/setgroups", "deny").map_err(|e| failed(what, &e))?;
                }
                let line = format!("{inside} {outside} {count}");
                fs::write(format!("/proc/self/{what}_map"), line).map_err(|e| failed(what, &e))
            }
            Self::Helper(what, mut child) => {
                if let Some(mut stdin) = child.stdin.take() {
                    stdin.write_all(b"go\n").map_err(|e| failed(what, &e))?;
                }
                let done = child.wait_with_output().map_err(|e| failed(what, &e))?;
                if done.status.success() {
                    return Ok(());
                }
                Err(failed(what, &String::from_utf8_lossy(&done.stderr).trim()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: the daemon's own user stays where any line of the map has it; else the first number
    /// takes its place.
    #[test]
    fn a_user_without_a_number() {
        let lines = [[0, 100_000, 65_536], [65_536, 1000, 1]];
        for (own, first) in [(1000, None), (100_000, None), (165_535, None), (165_536, Some(0))] {
            assert_eq!(first_unless_mapped(&lines, own), first, "{own}");
        }
        assert_eq!(first_unless_mapped(&[[7, 5, 1]], 4), Some(7));
    }
}
