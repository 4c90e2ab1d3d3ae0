// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 4 of 6: trace points with the names of the kernel's `fs_dax` events (behaviour 17), enabled
//! by `RUST_LOG=fs_dax=trace`. A disabled trace point costs one comparison.

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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use crate::dax::entry::PageIndex;
    use crate::dax::wait::SpaceId;

    struct Space {
        id: SpaceId,
    }

    /// Shows: the arguments of a disabled trace point are not evaluated (behaviour 17).
    #[test]
    fn row_17_a_trace_point_is_cheap_when_off() {
        let (space, computed) = (Space { id: SpaceId(0) }, Cell::new(0));
        let compute = || computed.set(computed.get() + 1);
        assert!(log::max_level() < log::LevelFilter::Trace, "no logger is installed here");
        trace_dax!(pte_fault, space, PageIndex(0), "{:?}", compute());
        assert_eq!(computed.get(), 0);
    }
}
