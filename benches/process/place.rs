// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! On which cores driver and daemon run. With one request in flight a round trip takes 7 to 9
//! microseconds where both are on one core, and 35 to 45 where another one must be woken, and the
//! scheduler's choice between the two outlasts a measurement: so it is not left the choice.

use std::fs;
use std::sync::LazyLock;

use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// The cores that this process was given, before any of its threads was put anywhere.
static ALLOWED: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let set = sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
});

/// Where driver and daemon run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Where the scheduler puts them.
    Anywhere,
    /// The driver on the first core, the daemon where the scheduler puts it.
    DriverFixed,
    /// Both on the first core.
    OneCore,
    /// The driver on the first core, the daemon on the last.
    Apart,
}

impl Place {
    /// The driver's cores.
    pub fn driver(self) -> CpuSet {
        match self {
            Self::DriverFixed => Self::OneCore.cores(0),
            place => place.cores(0),
        }
    }

    /// Puts all threads of a daemon in their place.
    pub fn put(self, pid: u32) {
        let set = self.cores(ALLOWED.len() - 1);
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap().file_name().into_string().unwrap();
            match sched_setaffinity(Pid::from_raw(task.parse().unwrap()), &set) {
                // It has ended.
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => panic!("a daemon's thread can't be put on a core: {error}"),
            }
        }
    }

    fn cores(self, apart: usize) -> CpuSet {
        let mut set = CpuSet::new();
        match self {
            Self::Anywhere | Self::DriverFixed => ALLOWED.iter().for_each(|&cpu| set.set(cpu)),
            Self::OneCore => set.set(ALLOWED[0]),
            Self::Apart => set.set(ALLOWED[apart]),
        }
        set
    }
}

/// Puts the calling thread on these cores.
pub fn stay_on(set: CpuSet) {
    sched_setaffinity(None, &set).unwrap();
}
