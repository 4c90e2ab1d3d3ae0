// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Faults for tests of the tests: `ci/crash --broken` shows that the crash tests find them. The
//! feature `failpoints` compiles them in, and the environment variable `VUD_FAILPOINT` names the
//! active one. A release build has none.

#[cfg(all(feature = "failpoints", not(debug_assertions)))]
compile_error!("the feature failpoints is for debug builds: its faults break durability");

/// Whether the fault `name` is active.
#[cfg(feature = "failpoints")]
pub(crate) fn is_on(name: &str) -> bool {
    static ON: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    ON.get_or_init(|| std::env::var("VUD_FAILPOINT").ok()).as_deref() == Some(name)
}

/// Whether the fault `name` is active: never in this build.
#[cfg(not(feature = "failpoints"))]
pub(crate) const fn is_on(_name: &str) -> bool {
    false
}
