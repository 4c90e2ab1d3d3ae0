// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `--sandbox`, `--seccomp` and `--modcaps`: virtiofsd's words, and what they mean there.

use std::fmt;
use std::str::FromStr;

use rustix::thread::CapabilitySet;
use thiserror::Error;

/// `--sandbox`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SandboxMode {
    /// Mount, PID, network, IPC and UTS namespaces; as a user that is not root a user namespace,
    /// too.
    Namespace,
    /// chroot(2), where a container permits no namespaces.
    Chroot,
    /// The process keeps the host's file tree in view.
    None,
}

impl fmt::Display for SandboxMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Namespace => "namespace",
            Self::Chroot => "chroot",
            Self::None => "none",
        })
    }
}

/// `--seccomp`: what a system call that is in no table does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// It ends the process, and the parent process names the call.
    #[default]
    Kill,
    /// It is done, and the kernel logs it (audit).
    Log,
    /// It raises SIGSYS, which ends the process, with a core dump where the host keeps those.
    Trap,
    /// There is no filter.
    None,
}

/// The settings of the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SandboxOptions {
    /// None: the best that the host permits.
    pub mode: Option<SandboxMode>,
    /// What a forbidden system call does.
    pub seccomp: SeccompMode,
    /// Changes of the set of capabilities.
    pub modcaps: ModCaps,
}

/// `--modcaps`: capabilities that the worker keeps beside its usual ones, and those of the usual
/// ones that it does not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModCaps {
    added: CapabilitySet,
    removed: CapabilitySet,
}

impl Default for ModCaps {
    fn default() -> Self {
        Self { added: CapabilitySet::empty(), removed: CapabilitySet::empty() }
    }
}

impl ModCaps {
    /// `usual` with these changes.
    pub fn applied_to(self, usual: CapabilitySet) -> CapabilitySet {
        (usual | self.added) - self.removed
    }

    /// Whether all of `set` stays.
    pub fn leaves(self, set: CapabilitySet) -> bool {
        !self.removed.intersects(set)
    }
}

/// What is no list of changes.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum BadModCaps {
    /// No plus, and no minus.
    #[error("'{0}' begins with neither + nor -; write a list like +sys_admin:-mknod")]
    Sign(String),
    /// No capability.
    #[error("there is no capability '{0}'; capabilities(7) has the names, without CAP_")]
    Name(String),
}

impl FromStr for ModCaps {
    type Err = BadModCaps;

    fn from_str(text: &str) -> Result<Self, BadModCaps> {
        let mut changes = Self::default();
        for change in text.split(':') {
            let (name, adds) = match (change.strip_prefix('+'), change.strip_prefix('-')) {
                (Some(name), _) => (name, true),
                (_, Some(name)) => (name, false),
                _ => return Err(BadModCaps::Sign(change.into())),
            };
            // Not the names of groups of bits that the type's parser would take, too.
            let one = CapabilitySet::from_name(&name.to_ascii_uppercase());
            let one = one.ok_or_else(|| BadModCaps::Name(name.into()))?;
            // The last one of two changes of one capability counts.
            changes.added.set(one, adds);
            changes.removed.set(one, !adds);
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shows: names are taken in any case, the last change of a capability counts, and what is no
    /// change is named.
    #[test]
    fn modcaps() {
        let changes: ModCaps = "+sys_admin:-MKNOD:-chown:+chown".parse().unwrap();
        let usual = CapabilitySet::MKNOD | CapabilitySet::FOWNER;
        let kept = CapabilitySet::FOWNER | CapabilitySet::SYS_ADMIN | CapabilitySet::CHOWN;
        assert_eq!(changes.applied_to(usual), kept);
        assert!(!changes.leaves(CapabilitySet::MKNOD) && changes.leaves(CapabilitySet::CHOWN));
        let bad = |text: &str| text.parse::<ModCaps>().unwrap_err();
        assert_eq!(bad("chown"), BadModCaps::Sign("chown".into()));
        assert_eq!(bad("+chown:"), BadModCaps::Sign(String::new()));
        assert_eq!(bad("+cap_chown"), BadModCaps::Name("cap_chown".into()));
    }
}
