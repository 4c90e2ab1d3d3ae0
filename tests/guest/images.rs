// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The files made by `images/build`, the limit on the number of VMs, and the log of cases.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

/// The folder with the files made by `images/build`.
pub struct Images {
    folder: PathBuf,
}

impl Images {
    /// `None` if `VUD_GUEST=skip` asks to skip the guest tests.
    pub fn find(test: &str) -> Option<Self> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/guest");
        let images = Self { folder };
        if std::env::var_os("VUD_GUEST").is_some_and(|value| value == "skip") {
            images.log_case("skip", test, "-", 0);
            return None;
        }
        assert!(
            images.folder.join("env").exists(),
            "no guest image: run images/build first (or set VUD_GUEST=skip)"
        );
        Some(images)
    }

    pub fn qemu(&self) -> PathBuf {
        self.folder.join("qemu-system-x86_64")
    }

    pub fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// A kernel that keeps several flushes in flight, if the package archive still had one.
    pub fn kernel_parallel(&self) -> Option<PathBuf> {
        Some(self.folder.join("vmlinuz-parallel")).filter(|path| path.exists())
    }

    pub fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }

    /// Debian's virtiofsd, for comparison.
    pub fn virtiofsd(&self) -> PathBuf {
        self.folder.join("virtiofsd")
    }

    /// The folder of user-mode Linux, if `images/uml` could reach a newer Debian release.
    pub fn uml(&self) -> Option<PathBuf> {
        Some(self.folder.join("uml")).filter(|path| path.join("version").exists())
    }

    /// A disk with test programs; `ci/demo` does not build it.
    pub fn tools(&self) -> Option<PathBuf> {
        Some(self.folder.join("tools.img")).filter(|path| path.exists())
    }

    /// Appends one line to `cases.log`; `ci/test` counts the lines.
    pub fn log_case(&self, outcome: &str, test: &str, case: &str, millis: u128) {
        std::fs::create_dir_all(&self.folder).expect("create target/guest");
        let mut log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("cases.log"))
            .expect("open cases.log");
        // One write(2), so that lines of parallel tests do not mix.
        log.write_all(format!("{outcome} {test} {case} {millis} ms\n").as_bytes())
            .expect("write cases.log");
    }

    /// Waits until one more VM may run. The lock is released when the value is dropped or the
    /// process dies. It works across processes (nextest runs each test in its own).
    pub fn slot(&self) -> Flock<File> {
        let jobs = std::env::var("VUD_GUEST_JOBS")
            .ok()
            .and_then(|jobs| jobs.parse().ok())
            .unwrap_or_else(default_jobs)
            .max(1);
        let open = |index: u32| {
            File::create(self.folder.join(format!(".slot-{index}"))).expect("create a slot file")
        };
        for index in 0..jobs {
            if let Ok(lock) = Flock::lock(open(index), FlockArg::LockExclusiveNonblock) {
                return lock;
            }
        }
        Flock::lock(open(std::process::id() % jobs), FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .expect("wait for a slot")
    }
}

/// A guest under TCG uses about one core.
fn default_jobs() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    u32::try_from(cores.min(4)).unwrap_or(1)
}
