// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults on purpose, so that the tests can show that they would catch them (`ci/crash --broken`).
//! The feature `failpoints` compiles them in, and `VUD_FAILPOINT` names the one that is on. No
//! release build has them.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature failpoints is for debug builds: it breaks promises on purpose");

/// Whether the fault `name` is on.
#[cfg(feature = "failpoints")]
pub(crate) fn is_on(name: &str) -> bool {
    static ON: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    ON.get_or_init(|| std::env::var("VUD_FAILPOINT").ok()).as_deref() == Some(name)
}

/// Whether the fault `name` is on: never in this build.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn is_on(_name: &str) -> bool {
    false
}
