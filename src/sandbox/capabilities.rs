// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Capabilities (capabilities(7)) of a process that has one thread.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
    set_no_new_privs,
};

/// What serves a share keeps, as virtiofsd does: files are made, changed and removed in the name of
/// the guest's users.
pub const SHARE: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// open_by_handle_at(2), for `--inode-file-handles`.
pub const FILE_HANDLES: CapabilitySet = CapabilitySet::DAC_READ_SEARCH;

/// Whether this process has all of `set` in effect.
pub fn has(set: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(set))
}

/// Runs `run` with no capability in effect.
///
/// # Errors
/// The system's.
pub fn without_effect<T>(run: impl FnOnce() -> T) -> io::Result<T> {
    let sets = capabilities(None)?;
    set_capabilities(None, CapabilitySets { effective: CapabilitySet::empty(), ..sets })?;
    let done = run();
    set_capabilities(None, sets)?;
    Ok(done)
}

/// Keeps of this process's capabilities those in `keep`, and in its bounding set no others; no
/// program that it might run gets more.
///
/// # Errors
/// The system's.
pub fn keep(keep: CapabilitySet) -> io::Result<()> {
    set_no_new_privs(true)?;
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(e) => return Err(e.into()),
    }
    if has(CapabilitySet::SETPCAP) {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            match capability_is_in_bounding_set(one) {
                Ok(true) if !keep.contains(one) => remove_capability_from_bounding_set(one)?,
                Ok(_) => {}
                Err(_) => break, // The kernel has no further ones.
            }
        }
    }
    let kept = capabilities(None)?.permitted & keep;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable })?;
    Ok(())
}
