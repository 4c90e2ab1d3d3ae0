// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Row 17: the recorded trace points.

use std::cell::RefCell;
use std::sync::{Mutex, Once};

use log::{LevelFilter, Log, Metadata, Record};
use vhost_user_dax::dax::entry::PMD_PAGES;
use vhost_user_dax::dax::extent::Access;

use super::Fixture;
use testkit::fakes::lock;

thread_local! {
    static LINES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

struct Recorder;

impl Log for Recorder {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "fs_dax" && LINES.with_borrow(Option::is_some)
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            LINES.with_borrow_mut(|lines| lines.as_mut().unwrap().push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// The trace lines of this thread while `job` runs.
pub fn record(job: impl FnOnce()) -> Vec<String> {
    static ONCE: Once = Once::new();
    static RECORDING: Mutex<usize> = Mutex::new(0);
    ONCE.call_once(|| log::set_logger(&Recorder).unwrap());
    // The log level is global: it is Off for the other tests while no test records.
    let change = |by: isize| {
        let mut recording = lock(&RECORDING);
        *recording = recording.checked_add_signed(by).unwrap();
        let on = *recording > 0;
        log::set_max_level(if on { LevelFilter::Trace } else { LevelFilter::Off });
    };
    change(1);
    LINES.set(Some(Vec::new()));
    job();
    change(-1);
    LINES.take().unwrap()
}

fn names(job: impl FnOnce()) -> Vec<String> {
    let name = |line: String| {
        let (name, rest) = line.split_once(": space ").unwrap();
        let page = rest.split_whitespace().nth(2).unwrap();
        format!("{name} {page}")
    };
    record(job).into_iter().map(name).collect()
}

/// Row 17: faults of both orders, with blocks and with holes, a first store and a fallback, with
/// the kernel's names.
#[test]
fn row_17_a_recorded_trace_of_faults() {
    let fixture = Fixture::new(PMD_PAGES + 2);
    fixture.source.fill(PMD_PAGES, PMD_PAGES + 1);
    assert_eq!(
        names(|| fixture.grant(0, 0, PMD_PAGES + 2, Access::Read).unwrap()),
        [
            "dax_pmd_fault 0x0",
            "dax_pmd_load_hole 0x0",
            "dax_pmd_fault_done 0x0",
            "dax_pmd_fault 0x200",
            "dax_pmd_fault_done 0x200",
            "dax_pte_fault 0x200",
            "dax_insert_mapping 0x200",
            "dax_pte_fault_done 0x200",
            "dax_pte_fault 0x201",
            "dax_load_hole 0x201",
            "dax_pte_fault_done 0x201",
        ]
    );
    assert_eq!(
        names(|| fixture.grant(0, 0, PMD_PAGES + 2, Access::Write).unwrap()),
        [
            "dax_pmd_fault 0x0",
            "dax_pmd_insert_mapping 0x0",
            "dax_pmd_fault_done 0x0",
            "dax_pmd_fault 0x200",
            "dax_pmd_fault_done 0x200",
            "dax_pfn_mkwrite 0x200",
            "dax_pte_fault 0x201",
            "dax_insert_mapping 0x201",
            "dax_pte_fault_done 0x201",
        ]
    );
    assert_eq!(
        names(|| fixture.grant(7, 4 * PMD_PAGES, 1, Access::Write).unwrap()),
        [
            "dax_pmd_fault 0x7",
            "dax_pmd_fault_done 0x7",
            "dax_pte_fault 0x7",
            "dax_insert_mapping 0x7",
            "dax_pte_fault_done 0x7",
        ],
        "a write grant of one page of a PMD entry with blocks"
    );
}

/// Row 17: a chunk of two extents is traced as a fallback.
#[test]
fn row_17_a_recorded_trace_of_a_fallback() {
    let fixture = Fixture::new(PMD_PAGES);
    fixture.source.fill(0, PMD_PAGES - 1);
    let lines = names(|| fixture.grant(0, 0, PMD_PAGES, Access::Read).unwrap());
    assert_eq!(
        lines[..3],
        ["dax_pmd_fault 0x0", "dax_pmd_insert_mapping_fallback 0x0", "dax_pmd_fault_done 0x0"]
    );
}

/// Row 17: a writeback, with the entries it covers.
#[test]
fn row_17_a_recorded_trace_of_a_writeback() {
    let fixture = Fixture::new(PMD_PAGES + 1);
    fixture.grant(0, 0, PMD_PAGES + 1, Access::Write).unwrap();
    let lines = record(|| fixture.sync().unwrap());
    let whole = |line: &str| lines.iter().filter(|other| other.as_str() == line).count();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert!(lines[0].starts_with("dax_writeback_range: space 0 page 0x0"));
    assert_eq!(whole("dax_writeback_one: space 0 page 0x0 pages=512"), 1);
    assert_eq!(whole("dax_writeback_one: space 0 page 0x200 pages=1"), 1);
    assert!(lines[3].starts_with("dax_writeback_range_done: space 0 page 0x0"));
}
