// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--uid-map` and `--gid-map`: a user namespace (user_namespaces(7)) for a daemon that does not
//! run as root, so that files of the guest can have more than one owner.

use std::fs;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setegid, seteuid};
use thiserror::Error;
use virtiofsd::idmap::{GidMap, UidMap};

/// Why the daemon can't enter a user namespace.
#[derive(Debug, Error)]
pub enum NamespaceError {
    /// The daemon runs as root, which can set any owner without a namespace.
    #[error("is for a daemon that is not root; as root use --translate-uid and --translate-gid")]
    Root,
    /// Error of unshare(2).
    #[error("no user namespace can be made: {0}; see user.max_user_namespaces in sysctl")]
    Unshare(io::Error),
    /// The map can be written neither by the daemon nor by newuidmap or newgidmap.
    #[error(
        "{0}; a map of other ids than the daemon's own needs newuidmap and newgidmap (package \
         uidmap) and a range in /etc/subuid and /etc/subgid"
    )]
    Map(String),
}

/// One line of a map: first id in the namespace, first id outside, number of ids.
type Line = [u32; 3];

/// Checks that the daemon does not run as root.
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

/// Enters a new user namespace with these maps. An empty map maps the daemon's own id to itself.
/// The process must have one thread only.
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
    // The helper programs must start outside of the namespace. They wait until it exists.
    let uid_mapper = Mapper::prepare("uid", uid_lines, uid.as_raw())?;
    let gid_mapper = Mapper::prepare("gid", gid_lines, gid.as_raw())?;
    unshare(CloneFlags::CLONE_NEWUSER).map_err(|e| NamespaceError::Unshare(e.into()))?;
    uid_mapper.map()?;
    gid_mapper.map()?;
    Ok(acts_as)
}

/// How one of the two maps is written.
enum Mapper {
    /// The map has only the daemon's own id: a process may write this map from inside.
    Own(&'static str, Line),
    /// A running newuidmap or newgidmap, which may map the user's ranges of /etc/subuid,
    /// /etc/subgid.
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
                    // user_namespaces(7): a process without privileges must do this before it
                    // writes gid_map.
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
