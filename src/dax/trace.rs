// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: trace points with the kernel's names (behaviour 17): `RUST_LOG=fs_dax=trace`.
//! When off, each costs one comparison.

macro_rules! trace_dax {
    ($name:ident, $space:expr, $page:expr, $($more:tt)+) => {
        log::trace!(
            target: "fs_dax",
            "{}: space {} page {:#x} {}",
            concat!("dax_", stringify!($name)),
            $space.id.0,
            $page.0,
            format_args!($($more)+)
        )
    };
}

pub(super) use trace_dax;
