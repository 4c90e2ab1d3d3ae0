// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cores of driver and daemon. With one request in flight a round trip takes 7 to 9
//! microseconds if both are on one core, and 35 to 45 microseconds if a thread on another core must
//! be woken. The scheduler keeps its choice for longer than a measurement takes, so the benchmark
//! sets the cores itself.

use std::fs;
use std::sync::LazyLock;

use rustix::io::Errno;
use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

/// The cores of this process at its start, before any of its threads was pinned.
static ALLOWED: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let set = sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect()
});

/// The cores of driver and daemon.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Both where the scheduler puts them.
    Anywhere,
    /// The driver on the first core, the daemon where the scheduler puts it.
    DriverFixed,
    /// Both on the first core.
    OneCore,
    /// The driver on the first core, the daemon on the last one.
    Apart,
}

impl Place {
    /// The cores of the driver.
    pub fn driver(self) -> CpuSet {
        match self {
            Self::DriverFixed => Self::OneCore.cores(0),
            place => place.cores(0),
        }
    }

    /// Pins all threads of a daemon to its cores.
    pub fn put(self, pid: u32) {
        let set = self.cores(ALLOWED.len() - 1);
        for task in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let task = task.unwrap().file_name().into_string().unwrap();
            match sched_setaffinity(Pid::from_raw(task.parse().unwrap()), &set) {
                // ESRCH: the thread has ended.
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

/// Pins the calling thread to these cores.
pub fn stay_on(set: CpuSet) {
    sched_setaffinity(None, &set).unwrap();
}
