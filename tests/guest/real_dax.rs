// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The crate's own tests, and the daemon with the in-process front-end, in a guest whose kernel
//! believes to have persistent memory: two emulated NVDIMMs, one with a DAX file system, one as a
//! device-DAX node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

/// Where the crate's build folder is on the host, and in the guest: the tests know the daemon by
/// its path.
fn build_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target")
}

/// The tests that run there, with their arguments. Left out: tests of the ring, the command line
/// and the front-end's rules, which no file system has a part in; what is about a page cache that
/// DAX has not; and what strace does, which the guest does not have.
const TESTS: &[(&str, &[&str])] = &[
    ("process", &["direct_access::", "--include-ignored"]),
    // TCG's CLWB touches no memory, and so meets no page that is gone.
    ("vhost_user_dax", &["persist::", "extent::", "--skip", "cut_off"]),
    // A store to a hole of a DAX file gets 2 MiB at once, not 4 KiB.
    ("engine", &["rows::real_files", "rows::lines", "--skip", "row_06"]),
    (
        "fs",
        &[
            "buffers::a_file_into_its_own_window",
            "coherence::an_upgrade",
            "coherence::one_file_twice",
        ],
    ),
    ("frontend", &["flush::"]),
];

/// The NVDIMMs. Less their labels of 2 MiB: what xfs asks for, and a part of it.
fn nvdimms() -> Vec<String> {
    let mut qemu: Vec<String> = ["-machine", "nvdimm=on", "-m", "512M,slots=4,maxmem=4G"]
        .into_iter()
        .chain(["-cpu", "qemu64,+rdrand,+clflushopt,+clwb"])
        .map(str::to_owned)
        .collect();
    for (n, size) in ["386M", "66M"].into_iter().enumerate() {
        qemu.extend(["-object".into(), format!("memory-backend-ram,id=nv{n},size={size}")]);
        qemu.extend(["-device".into(), format!("nvdimm,memdev=nv{n},id=n{n},label-size=2M")]);
    }
    qemu
}

/// A guest that has the build folder, and can run the crate's tests.
pub struct TestGuest<'g> {
    pub vm: Vm<'g>,
    programs: BTreeMap<String, PathBuf>,
    libraries: PathBuf,
}

impl<'g> TestGuest<'g> {
    pub fn boot(guest: &'g Guest, options: &Options<'_>) -> Self {
        let build = build_folder();
        let share = [Share::plain(&build, "build")];
        let mut vm = guest.boot_shares(&share, &[], options);
        vm.mount(&share[0], &build.display().to_string(), "rw");
        let programs = programs();
        let daemon = PathBuf::from(env!("CARGO_BIN_EXE_vhost-user-dax"));
        let libraries = libraries(programs.values().chain([&daemon]));
        Self { vm, programs, libraries }
    }

    /// One with NVDIMMs, and the device of the first.
    fn with_nvdimms(guest: &'g Guest) -> (Self, String) {
        let mut inside = Self::boot(guest, &Options { qemu: nvdimms(), ..Options::default() });
        let device = inside.vm.run("dax-ready", &[]).get("dev").to_owned();
        (inside, device)
    }

    /// Makes a file system, and mounts it as `/mnt`.
    fn mount_new(&mut self, kind: &str, device: &str) {
        self.vm.run("mkfs", &[kind, device]);
        self.vm.run("mount", &[kind, device, "/mnt"]);
    }

    /// Runs a test program of this crate in `/mnt`.
    pub fn run(&mut self, program: &str, args: &[&str]) {
        let path = self.programs.get(program).unwrap_or_else(|| panic!("no test '{program}'"));
        let [libraries, path] = [&self.libraries, path].map(|path| path.display().to_string());
        let settings = ["ORACLE_SEED", "ORACLE_PATTERNS"];
        let settings: Vec<_> = settings
            .iter()
            .filter_map(|name| Some(format!("{name}={}", std::env::var(name).ok()?)))
            .collect();
        let words: Vec<&str> = ["/mnt", libraries.as_str()]
            .into_iter()
            .chain(settings.iter().map(String::as_str))
            .chain([path.as_str()])
            .chain(args.iter().copied())
            .collect();
        let report = self.vm.run("host-test", &words);
        let said = |line: &&String| {
            ["test result:", "judged:", "  listed:"].iter().any(|word| line.starts_with(word))
        };
        report.lines.iter().filter(said).for_each(|line| println!("{program}: {line}"));
    }
}

/// The crate's test programs, by their names: cargo knows where they are, and builds what is old.
fn programs() -> BTreeMap<String, PathBuf> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["test", "--no-run", "--locked", "--message-format=json", "--quiet"]);
    cargo.args(["--lib", "--bins", "--test", "*"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = cargo.output().expect("run cargo");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines = String::from_utf8(output.stdout).expect("JSON");
    let program = |line: &str| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let name = message["target"]["name"].as_str()?.to_owned();
        (message["profile"]["test"] == true).then_some(())?;
        Some((name, message["executable"].as_str()?.into()))
    };
    lines.lines().filter_map(program).collect()
}

/// The libraries that the guest lacks, in a folder that it sees.
fn libraries<'a>(programs: impl Iterator<Item = &'a PathBuf>) -> PathBuf {
    let folder = build_folder().join("guest/host-lib");
    std::fs::create_dir_all(&folder).expect("make a folder");
    for program in programs {
        let output = Command::new("ldd").arg(program).output().expect("run ldd");
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some(path) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                continue;
            };
            let name = Path::new(path).file_name().expect("a name");
            // The guest's C library is its own, and newer.
            let own = ["ld-linux", "libc.so", "libm.so", "libpthread", "libdl"];
            if !own.iter().any(|own| name.to_string_lossy().starts_with(own)) {
                std::fs::copy(path, folder.join(name)).expect("copy a library");
            }
        }
    }
    folder
}

/// Shows: a disk that fails once, a device-mapper target and not a double, is told of then and ever
/// after.
#[test]
fn a_disk_that_fails_once() {
    let Some(guest) = Guest::enter("a_disk_that_fails_once") else { return };
    let folder = tempfile::tempdir().expect("make a folder");
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).and_then(|file| file.set_len(512 << 20)).expect("make a disk");
    let options = Options { scratch: Some(disk), ..Options::default() };
    let mut inside = TestGuest::boot(&guest, &options);
    for kind in ["ext4", "xfs"] {
        inside.vm.run("dm-ready", &[kind, "/mnt"]);
        inside.run("process", &["bad_disk::", "--include-ignored", "--test-threads=1"]);
        inside.vm.run("umount", &["/mnt"]);
    }
    inside.vm.poweroff();
}

/// Shows: the engine decides as the guest's kernel does, on both file systems.
#[test]
fn the_kernel_judges() {
    let Some(guest) = Guest::enter("the_kernel_judges") else { return };
    let (mut inside, device) = TestGuest::with_nvdimms(&guest);
    for kind in ["ext4", "xfs"] {
        inside.mount_new(kind, &device);
        inside.run("engine", &["oracle::", "--include-ignored", "--nocapture", "--test-threads=1"]);
        inside.vm.run("umount", &["/mnt"]);
    }
    inside.vm.poweroff();
}

fn tests_on(test: &'static str, kind: &str) {
    let Some(guest) = Guest::enter(test) else { return };
    let (mut inside, device) = TestGuest::with_nvdimms(&guest);
    inside.mount_new(kind, &device);
    for (program, args) in TESTS {
        inside.run(program, args);
    }
    inside.vm.poweroff();
}

#[test]
fn the_crates_tests_on_ext4_dax() {
    tests_on("the_crates_tests_on_ext4_dax", "ext4");
}

#[test]
fn the_crates_tests_on_xfs_dax() {
    tests_on("the_crates_tests_on_xfs_dax", "xfs");
}
