// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! User-mode Linux as the front-end: an independent implementation that shares no code with QEMU
//! and the vhost crates. It has no window. Its kernel is both front-end and guest.
//!
//! A test writes a script to a folder of the host; the guest reads it by hostfs (see
//! guest-tests/uml-init).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::daemon::Daemon;
use crate::disk::sha256;
use crate::output::Output;
use crate::report::CaseReport;
use crate::share::Share;
use crate::vm::Guest;

/// Time limit that tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(180);
const TAG: &str = "share";

/// A share whose tag comes from the daemon: this front-end has no option for it.
fn with_tag(share: Share) -> Share {
    if share.is_ours() { share } else { share.args(&["--tag", TAG]) }
}

/// A guest and user-mode Linux; `None`, with a line in the log of cases, if either is missing.
fn enter(test: &'static str) -> Option<(Guest, PathBuf)> {
    let guest = Guest::enter(test)?;
    let Some(uml) = guest.images().uml() else {
        eprintln!("SKIPPED {test}: images/uml found no user-mode Linux");
        guest.images().log_case("skip", test, "no-user-mode-linux", 0);
        return None;
    };
    Some((guest, uml))
}

/// The process of user-mode Linux, killed at drop.
struct Uml(Child);

impl Drop for Uml {
    fn drop(&mut self) {
        // Both fail if the process has ended already; that is no error.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The command line, as in docs/front-ends.md.
fn uml_command(uml: &Path, job: &Path, socket: &Path) -> Command {
    let mut command = Command::new("./linux");
    command.current_dir(uml).env("LD_LIBRARY_PATH", ".");
    command.args(["mem=256M", "initrd=initramfs.cpio", "con=null", "con0=null,fd:1"]);
    command.arg(format!("virtio_uml.device={}:26", socket.display()));
    command.arg(format!("uml_dir={}/", job.display())).arg(format!("job={}", job.display()));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

/// Boots, runs the script, and powers off. User-mode Linux, the script and the daemon must all end
/// with code 0. Returns the output of the script.
fn run(test: &'static str, share: &Share, script: &str) -> Option<CaseReport> {
    let (guest, uml) = enter(test)?;
    let job = TempDir::new().expect("make a folder for the job");
    fs::write(job.path().join("script"), format!("set -e\n{script}")).expect("write the script");
    let socket = job.path().join("sock");
    let began = Instant::now();
    let mut daemon = Daemon::serve(share, guest.images(), &socket, || ());
    let child = uml_command(&uml, job.path(), &socket).spawn();
    let mut child = Uml(child.expect("start user-mode Linux"));
    let console = Output::collect(child.0.stdout.take().expect("piped"), || ());
    let ended = console.wait_closed(HANG);
    let said = |name: &str| fs::read_to_string(job.path().join(name)).unwrap_or_default();
    let everything = || {
        let console = console.lines().join("\n");
        let (output, daemon) = (said("output"), daemon.log());
        format!("--- script\n{output}\n--- console\n{console}\n--- daemon\n{daemon}")
    };
    assert!(ended, "{test}: user-mode Linux hangs\n{}", everything());
    let status = child.0.wait().expect("wait for user-mode Linux");
    assert!(status.success(), "{test}: user-mode Linux ended with {status}\n{}", everything());
    assert_eq!(said("status"), "0\n", "{test}: the script failed\n{}", everything());
    for bad in ["WARNING:", "virtio-uml virtio-uml.0:"] {
        assert!(
            !said("console").contains(bad),
            "{test}: a kernel message has \"{bad}\"\n{}",
            everything()
        );
    }
    let status = daemon.wait();
    assert!(status.success(), "{test}: the daemon ended with {status}:\n{}", daemon.log());
    if share.is_ours() {
        check_session_line(&daemon.log());
    }
    guest.images().log_case("ok", test, "user-mode-linux", began.elapsed().as_millis());
    Some(CaseReport { lines: said("output").lines().map(str::to_owned).collect() })
}

/// Checks the line `session ended: requests=N errors=E malformed=0; window: ...`, and that nothing
/// was mapped.
fn check_session_line(log: &str) {
    let ended: Vec<&str> =
        log.lines().filter_map(|line| line.split_once("session ended: ")).map(|x| x.1).collect();
    let [line] = ended[..] else { panic!("not exactly one session:\n{log}") };
    let number = |key: &str| -> u64 {
        let words = line.split([' ', ';']).filter_map(|word| word.split_once('='));
        let value = words.filter(|(name, _)| *name == key).map(|(_, value)| value).next();
        value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {key}= in {line}"))
    };
    assert!(number("requests") > 50, "{line}");
    assert_eq!(number("malformed"), 0, "{line}");
    assert!(line.ends_with("window: none") || number("grants") == 0, "{line}");
    assert!(!log.contains(" error: "), "{log}");
}

/// Shows: 128 MiB that the guest writes and fsyncs are on the host, and a new mount reads them
/// back. A mount with `dax=always`, which this kernel lacks, is refused; `dax=inode` works without
/// DAX.
#[test]
fn uml_writes_and_reads() {
    let dir = TempDir::new().unwrap();
    let share = with_tag(Share::dax(dir.path(), TAG));
    let script = "
        if mount -t virtiofs -o dax=always share /mnt; then exit 1; fi
        mount -t virtiofs -o dax=inode share /mnt
        dd if=/dev/urandom of=/mnt/data bs=1M count=128 conv=fsync
        echo sum=data,$(stat -c %s /mnt/data),$(sha256sum </mnt/data | cut -d' ' -f1)
        umount /mnt
        mount -t virtiofs share /mnt
        echo sum=data,$(stat -c %s /mnt/data),$(sha256sum </mnt/data | cut -d' ' -f1)
        umount /mnt";
    let Some(report) = run("uml_writes_and_reads", &share, script) else { return };
    assert_eq!(report.values("sum").len(), 2, "{report:#?}");
    share.check_sums(&report);
    assert_eq!(fs::metadata(share.path("data")).unwrap().len(), 128 << 20);
}

/// Shows: names, links, modes and lengths are the same in the guest and on the host.
#[test]
fn uml_changes_names() {
    let dir = TempDir::new().unwrap();
    let share = with_tag(Share::plain(dir.path(), TAG));
    let script = "
        mount -t virtiofs share /mnt
        cd /mnt
        mkdir dir
        echo one >dir/a
        mv dir/a dir/b
        [ ! -e dir/a ]
        ln -s b dir/symbolic
        [ $(cat dir/symbolic) = one ]
        ln dir/b hard
        if rmdir dir; then exit 1; fi
        mv hard dir/hard
        rm dir/b
        [ $(cat dir/hard) = one ]
        if cat dir/symbolic; then exit 1; fi
        chmod 640 dir/hard
        echo two >>dir/hard
        truncate -s 5000 dir/long
        echo overwritten >target
        echo three >source
        mv source target
        echo gone >unlinked
        exec 3<unlinked
        rm unlinked
        [ $(cat <&3) = gone ]
        exec 3<&-
        sync
        cd /
        umount /mnt";
    if run("uml_changes_names", &share, script).is_none() {
        return;
    }
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let hard = fs::metadata(share.path("dir/hard")).unwrap();
    assert_eq!((hard.permissions().mode() & 0o777, hard.nlink()), (0o640, 1));
    assert_eq!(fs::read(share.path("dir/hard")).unwrap(), b"one\ntwo\n");
    assert_eq!(fs::read(share.path("dir/long")).unwrap(), [0; 5000]);
    assert_eq!(fs::read(share.path("target")).unwrap(), b"three\n");
    assert_eq!(names(&share.path("")), ["dir", "target"]);
    assert_eq!(names(&share.path("dir")), ["hard", "long", "symbolic"]);
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<String> = entries.map(|entry| name(entry.unwrap())).collect();
    names.sort();
    names
}

/// Shows: a directory of 1,000 files can be listed, read, copied and removed; the front-end starts
/// fewer request queues than the device has.
#[test]
fn uml_lists_a_thousand_files() {
    let dir = TempDir::new().unwrap();
    let share = with_tag(Share::plain(dir.path(), TAG).queues(4));
    fs::create_dir(share.path("host")).unwrap();
    let bytes = |number: usize| format!("file {number}\n").repeat(number).into_bytes();
    let mut all = Vec::new();
    for number in 0..1000 {
        fs::write(share.path(&format!("host/{number:04}")), bytes(number)).unwrap();
        all.extend(bytes(number));
    }
    let script = "
        mount -t virtiofs share /mnt
        cd /mnt
        [ $(ls host | wc -l) = 1000 ]
        echo all=$(cat host/* | sha256sum | cut -d' ' -f1)
        cp -r host guest
        [ $(ls -l guest | grep -c '^-') = 1000 ]
        rm -r host
        cd /
        umount /mnt";
    let Some(report) = run("uml_lists_a_thousand_files", &share, script) else { return };
    assert_eq!(report.get("all"), sha256(&all), "the guest has read other bytes");
    assert_eq!(names(&share.path("")), ["guest"]);
    assert_eq!(names(&share.path("guest")).len(), 1000);
    for number in 0..1000 {
        let copy = fs::read(share.path(&format!("guest/{number:04}"))).unwrap();
        assert_eq!(copy, bytes(number), "file {number}");
    }
}

/// Shows: the guest's driver is unbound and bound again, twice. This front-end sets up new rings
/// without a GET_VRING_BASE for the old ones, which QEMU always sends.
#[test]
fn uml_driver_unbind_and_bind() {
    let dir = TempDir::new().unwrap();
    let share = with_tag(Share::plain(dir.path(), TAG));
    if !share.is_ours() {
        eprintln!("SKIPPED uml_driver_unbind_and_bind: Debian's virtiofsd 1.13.2 hangs there");
        return;
    }
    let script = "
        driver=/sys/bus/virtio/drivers/virtiofs
        mkdir -p /sys
        mount -t sysfs sys /sys
        for round in 1 2 3; do
            mount -t virtiofs share /mnt
            head -c 3000000 /dev/urandom >/mnt/file-$round
            echo sum=file-$round,3000000,$(sha256sum </mnt/file-$round | cut -d' ' -f1)
            umount /mnt
            [ $round = 3 ] || echo virtio0 >$driver/unbind
            [ $round = 3 ] || echo virtio0 >$driver/bind
        done";
    let Some(report) = run("uml_driver_unbind_and_bind", &share, script) else { return };
    assert_eq!(report.values("sum").len(), 3, "{report:#?}");
    share.check_sums(&report);
}
