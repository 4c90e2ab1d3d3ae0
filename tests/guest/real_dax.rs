// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Runs the crate's own test programs, among them those that start the daemon with the in-process
//! front-end, in a guest with emulated persistent memory: two NVDIMMs, one with a DAX file system
//! and one as a device-DAX node.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::machine::Options;
use crate::share::Share;
use crate::vm::{Guest, Vm};

/// The build folder, at the same path on the host and in the guest: the tests contain the daemon's
/// path.
fn build_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target")
}

/// The test programs that run there, with their arguments. Left out are the tests of the ring, of
/// the command line and of front-end messages, which use no file system; the tests of the page
/// cache, which DAX does not have; and the tests that need strace, which the guest lacks.
const TESTS: &[(&str, &[&str])] = &[
    ("process", &["direct_access::", "--include-ignored"]),
    // TCG's CLWB does not access memory, so it raises no SIGBUS at a truncated page.
    ("vhost_user_dax", &["persist::", "extent::", "--skip", "cut_off"]),
    // A store to a hole of a DAX file allocates 2 MiB at once, not 4 KiB.
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

/// The NVDIMMs, with labels of 2 MiB each: the first has the least size that mkfs.xfs accepts.
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

/// A guest that has the build folder mounted and can run the crate's tests.
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

    /// Boots a guest with NVDIMMs. Returns also the device of the first one.
    fn with_nvdimms(guest: &'g Guest) -> (Self, String) {
        let mut inside = Self::boot(guest, &Options { qemu: nvdimms(), ..Options::default() });
        let device = inside.vm.run("dax-ready", &[]).get("dev").to_owned();
        (inside, device)
    }

    /// Makes a file system and mounts it on `/mnt`.
    fn mount_new(&mut self, kind: &str, device: &str) {
        self.vm.run("mkfs", &[kind, device]);
        self.vm.run("mount", &[kind, device, "/mnt"]);
    }

    /// Runs a test program of this crate in the folder `/mnt`.
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

/// The crate's test programs, by name: cargo builds them if needed, and reports their paths.
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

/// Copies the libraries that the guest lacks to a folder that the guest can see.
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
            // The guest's C library is newer than the host's.
            let own = ["ld-linux", "libc.so", "libm.so", "libpthread", "libdl"];
            if !own.iter().any(|own| name.to_string_lossy().starts_with(own)) {
                std::fs::copy(path, folder.join(name)).expect("copy a library");
            }
        }
    }
    folder
}

/// Shows: a disk that fails once (a device-mapper target, not a double) makes that flush and every
/// later one fail.
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

/// Shows: the engine decides as the guest's kernel does, on ext4 and on xfs.
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
