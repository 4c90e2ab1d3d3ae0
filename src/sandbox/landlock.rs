// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Landlock (landlock(7)): what remains where there is no mount namespace. It takes no capability.

use std::fs::File;
use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

/// The rules that this crate was written for. An older kernel has a part of them.
const RULES: ABI = ABI::V6;

/// Takes all of the file tree away from this process that does not lie below one of `below`, and
/// TCP. Returns whether the kernel has Landlock.
///
/// # Errors
/// The system's.
pub fn restrict(below: &[&File]) -> io::Result<bool> {
    let all = AccessFs::from_all(RULES);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)
        .and_then(|rules| rules.handle_access(AccessNet::from_all(RULES)))
        .and_then(|rules| rules.scope(Scope::from_all(RULES)))
        .and_then(Ruleset::create)
        .map_err(io::Error::other)?;
    let allowed: BitFlags<AccessFs> = all & !AccessFs::Execute;
    for dir in below {
        rules = rules.add_rule(PathBeneath::new(dir, allowed)).map_err(io::Error::other)?;
    }
    let status = rules.restrict_self().map_err(io::Error::other)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
