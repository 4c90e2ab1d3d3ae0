// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Crashes: kill -9 of the daemon, of QEMU, of both, and a power failure, while the guest syncs the
//! steps of a plan. Every acknowledged byte must be there: after a kill in the file system, which
//! stays in use, and in the images of the lossy disk that the host finds after a power failure.
//!
//! `VUD_CRASH_ROUNDS` is the number of rounds (default: 10), `VUD_CRASH_SEED` the random seed,
//! `VUD_CRASH_ROUND` the number of the only round to run; `ci/crash` sets them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::disk::Disk;
use crate::host_disk::{HostDisk, Kind, Mounted, Recovered, own_namespace};
use crate::images::Images;
use crate::lossy::Survivors;
use crate::machine::Options;
use crate::plan::{MAPPED_BYTES, RAW_BYTES, STREAMS, WRITES, byte, step};
use crate::share::Share;
use crate::vm::{Guest, Vm};

const PMEM_MIB: u64 = 64;
/// Range for the number of acknowledged steps before the kill or the power failure.
const ACKS: std::ops::Range<u64> = 5..120;
/// How long to wait for each acknowledgement that must not come. A longer time catches a broken
/// daemon more surely; a correct daemon never sends one.
const WRONG_ACK_WAIT: Duration = Duration::from_secs(1);
/// Largest number of wrong acknowledgements to wait for.
const MAX_WRONG_ACKS: u64 = 20;
/// Largest number of acknowledgements that were still in the guest's serial port at the kill.
const ACKS_IN_FLIGHT: u64 = 200;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Device {
    /// /dev/pmem0 itself.
    PmemRaw,
    /// ext4, mounted with -o dax, on /dev/pmem0.
    PmemExt4,
    Fs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum End {
    Daemon,
    Qemu,
    Both,
    Power,
}

#[derive(Debug, Clone, Copy)]
struct Round {
    number: u64,
    kind: Kind,
    device: Device,
    end: End,
    acks: u64,
    /// The only stream to run, if any. With both streams, a sync of one can hide that a sync of the
    /// other came too late.
    only: Option<u64>,
    coin: u64,
}

impl Round {
    /// Nine rounds cover each file system with each device; 36 rounds cover each end, too.
    fn new(number: u64, seed: u64) -> Self {
        let pick = |n: u64, of: u64| usize::try_from(n % of).unwrap();
        let random = scatter(seed.wrapping_add(number));
        Self {
            number,
            kind: Kind::ALL[pick(number, 3)],
            device: [Device::Fs, Device::PmemRaw, Device::PmemExt4][pick(number / 3, 3)],
            end: [End::Power, End::Daemon, End::Qemu, End::Both][pick(number % 9 + number / 9, 4)],
            acks: ACKS.start + random % (ACKS.end - ACKS.start),
            only: [None, Some(0), Some(1)][pick(number % 9 + number / 9, 3)],
            coin: scatter(random),
        }
    }
}

impl fmt::Display for Round {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, kind, device, end, acks, .. } = self;
        write!(f, "round {number}: {} {device:?}, {end:?} after {acks} acks", kind.name())
    }
}

fn scatter(n: u64) -> u64 {
    (n ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xd134_2543_de82_ef95).rotate_left(31)
        ^ (n.wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 27)
}

/// The last acknowledged step of each stream.
type Acked = [Option<u64>; STREAMS as usize];

fn count(acked: &Acked) -> u64 {
    acked.iter().map(|last| last.map_or(0, |last| last + 1)).sum()
}

fn record_ack(acked: &mut Acked, line: &str) -> bool {
    let Some((stream, n)) = line.strip_prefix("acked=").and_then(|ack| ack.split_once(',')) else {
        return false;
    };
    let (stream, n): (usize, u64) = (stream.parse().unwrap(), n.parse().unwrap());
    acked[stream] = Some(n);
    true
}

/// The bytes that each file must hold after the acknowledged steps of a stream.
fn expected(stream: u64, last: Option<u64>, raw: bool) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for n in 0..last.map_or(0, |last| last + 1) {
        let step = step(stream, n, raw);
        let file: &mut Vec<u8> = files.entry(step.file).or_default();
        let least = if stream == WRITES { 0 } else { MAPPED_BYTES };
        let end = (step.at + step.bytes).max(file.len()).max(if raw { 0 } else { least });
        file.resize(end, 0);
        for (at, to) in file[step.at..step.at + step.bytes].iter_mut().enumerate() {
            *to = byte(stream, n, step.at + at);
        }
    }
    files
}

/// Compares the bytes found with the expected ones. A byte of a later, unacknowledged step is
/// right, too. The error says which bytes are lost.
fn check_stream(place: &Path, raw: bool, stream: u64, last: Option<u64>) -> Result<(), String> {
    for (name, bytes) in expected(stream, last, raw) {
        let path = if raw { place.to_owned() } else { place.join(&name) };
        let found = std::fs::read(&path).map_err(|e| format!("LOST: {name}: {e}"))?;
        if found.len() < bytes.len() {
            return Err(format!("LOST: {name} has {} of {} bytes", found.len(), bytes.len()));
        }
        let behind = last.map_or(0, |last| last + 1);
        let later: Vec<_> = (behind..behind + ACKS_IN_FLIGHT)
            .map(|n| (n, step(stream, n, raw)))
            .filter(|(_, step)| step.file == name)
            .collect();
        let start = if raw { stream as usize * RAW_BYTES } else { 0 };
        let good = |at: usize| {
            found[at] == bytes[at]
                || later.iter().any(|(n, step)| {
                    (step.at..step.at + step.bytes).contains(&at)
                        && found[at] == byte(stream, *n, at)
                })
        };
        let lost: Vec<_> = (start..bytes.len()).filter(|at| !good(*at)).collect();
        if let (Some(first), Some(end)) = (lost.first(), lost.last()) {
            return Err(format!(
                "LOST: {} bytes of '{name}', stream {stream}, between {first} and {end}; \
                 acknowledged to step {last:?}",
                lost.len()
            ));
        }
    }
    Ok(())
}

fn check(place: &Path, raw: bool, acked: &Acked) -> Result<(), String> {
    (0..).zip(acked).try_for_each(|(stream, last)| check_stream(place, raw, stream, *last))
}

fn sync(path: &Path) {
    std::fs::File::open(path).and_then(|file| file.sync_all()).expect("sync");
}

/// The files of a round, inside the host's file system.
struct Place {
    pmem: Option<Disk>,
    inside: PathBuf,
}

impl Place {
    fn new(device: Device, host: &Path) -> Self {
        match device {
            Device::Fs => {
                std::fs::create_dir(host.join("share")).unwrap();
                sync(host);
                Self { pmem: None, inside: "share".into() }
            }
            Device::PmemRaw | Device::PmemExt4 => {
                let disk = Disk::below(host, PMEM_MIB);
                let inside = disk.path().strip_prefix(host).unwrap().to_owned();
                // The file exists before the daemon starts, allocated as the daemon allocates it:
                // its blocks are unwritten extents.
                let file = std::fs::File::create(disk.path()).unwrap();
                let bytes = (PMEM_MIB << 20) as i64;
                fallocate(&file, FallocateFlags::empty(), 0, bytes).unwrap();
                for path in [&disk.path(), disk.path().parent().unwrap(), host] {
                    sync(path);
                }
                Self { pmem: Some(disk), inside }
            }
        }
    }

    /// Checks that the host's file system at `host` holds everything that was acknowledged.
    fn check(&self, device: Device, host: &Path, acked: &Acked) -> Result<(), String> {
        let place = host.join(&self.inside);
        match device {
            Device::Fs => check(&place, false, acked),
            Device::PmemRaw => check(&place, true, acked),
            Device::PmemExt4 => {
                let mounted = Mounted::new(&place).map_err(|why| format!("LOST: {why}"))?;
                check(mounted.path(), false, acked)?;
                mounted.fsck(&place, Kind::Ext4.fsck())
            }
        }
    }
}

/// Boots a VM and runs the plan until the number of acknowledgements of the round is reached.
fn run_plan<'g>(guest: &'g Guest, round: &Round, place: &Place, host: &Path) -> (Vm<'g>, Acked) {
    let options = Options { tools: true, ..Options::default() };
    let mut vm = match &place.pmem {
        Some(disk) => guest.boot_with(&[disk], &options),
        None => {
            let share = Share::dax(&host.join(&place.inside), "crash");
            guest.boot_shares(&[share], &[], &options)
        }
    };
    let target = match round.device {
        Device::Fs => {
            vm.run("fs-mount", &["crash", "/mnt", "dax=always"]);
            "/mnt".to_owned()
        }
        Device::PmemRaw => vm.ready(0).0,
        Device::PmemExt4 => {
            let (dev, _) = vm.ready(0);
            vm.run("mkfs", &["ext4", &dev]);
            vm.run("mount", &["ext4", &dev, "/mnt"]);
            "/mnt".to_owned()
        }
    };
    let only = round.only.map(|stream| stream.to_string());
    let args: Vec<_> = ["crash", &target].into_iter().chain(only.as_deref()).collect();
    vm.start("mapio", &args);
    let mut acked = Acked::default();
    while count(&acked) < round.acks {
        let line = vm.case_line();
        if !record_ack(&mut acked, &line) {
            vm.fail(&format!("unexpected line of the workload: '{line}'"));
        }
    }
    (vm, acked)
}

fn kill(vm: &mut Vm<'_>, end: End) {
    if end != End::Qemu {
        vm.kill_daemon(0);
    }
    if end != End::Daemon {
        vm.kill_qemu();
    }
}

/// Returns the number of acknowledged steps.
fn run_round(guest: &Guest, round: &Round) -> Result<u64, String> {
    let host = HostDisk::new(round.kind)?;
    let place = Place::new(round.device, host.path());
    let (mut vm, mut acked) = run_plan(guest, round, &place, host.path());
    let of = |what: String| move |why: String| format!("{round}: {what}: {why}");
    let disk = if round.end == End::Power {
        host.disk().hold_syncs();
        // At most `MAX_WRONG_ACKS` lines: a broken daemon acknowledges without end.
        for line in (0..MAX_WRONG_ACKS).map_while(|_| vm.case_line_within(WRONG_ACK_WAIT)) {
            record_ack(&mut acked, &line);
        }
        host.disk().lose_power();
        kill(&mut vm, End::Both);
        None
    } else {
        kill(&mut vm, round.end);
        // The state of the disk if power failed now. It is copied first, because the checks of the
        // live file system make it sync.
        let disk = host.disk().copy().map_err(|why| format!("{round}: {why}"))?;
        if round.end == End::Daemon {
            // Nothing is acknowledged any more: the guest's requests hang or fail.
            vm.kill_qemu();
        }
        Some(disk)
    };
    for line in vm.last_lines() {
        record_ack(&mut acked, &line);
    }
    drop(vm);
    let disk = match disk {
        None => host.off(),
        Some(disk) => {
            place.check(round.device, host.path(), &acked).map_err(of("after the kill".into()))?;
            drop(host); // btrfs refuses to mount a second file system with the same UUID.
            disk
        }
    };
    let coin = round.coin;
    for survivors in [Survivors::None, Survivors::Some(coin), Survivors::Some(scatter(coin))] {
        let recovered = Recovered::of(&disk, survivors).map_err(of("recovery".into()))?;
        let said = format!("power lost, {survivors:?} of {} writes survived", disk.unsynced());
        place.check(round.device, &recovered.path(), &acked).map_err(of(said.clone()))?;
        recovered.fsck(round.kind).map_err(of(said))?;
    }
    Ok(count(&acked))
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().expect("a number"))
}

/// Whether this host allows a mount namespace for this thread, and FUSE mounts. If not, a line in
/// the log of cases says so.
fn has_host_disks(test: &str) -> bool {
    let has = own_namespace().is_ok() && Path::new("/dev/fuse").exists();
    if !has && let Some(images) = Images::find(test) {
        images.log_case("skip", test, "needs-root-namespaces-loop-fuse", 0);
    }
    has
}

/// Shows: no acknowledged byte is lost, on any file system and any device, at any end.
#[test]
fn crash_rounds() {
    if Guest::enter("crash_rounds").is_none() || !has_host_disks("crash_rounds") {
        return;
    }
    let rounds = number("VUD_CRASH_ROUNDS").unwrap_or(10);
    let seed = number("VUD_CRASH_SEED").unwrap_or(1);
    let only = number("VUD_CRASH_ROUND");
    let (next, table) = (AtomicU64::new(only.unwrap_or(0)), Mutex::new(BTreeMap::new()));
    let end = only.map_or(rounds, |only| only + 1);
    println!("crash: {rounds} rounds, VUD_CRASH_SEED={seed}");
    let failures: Vec<String> = std::thread::scope(|scope| {
        let work = || {
            own_namespace().unwrap();
            let guest = Guest::enter("crash_rounds").unwrap();
            let mut failures = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= end {
                    return failures;
                }
                let round = Round::new(number, seed);
                let done = run_round(&guest, &round);
                println!(
                    "{round}: {}",
                    match &done {
                        Ok(acks) => format!("{acks} steps acknowledged, none lost"),
                        Err(_) => "FAILED".into(),
                    }
                );
                let mut table = table.lock().unwrap();
                let entry = table.entry((round.kind.name(), round.device, round.end));
                let row: &mut Row = entry.or_default();
                row.rounds += 1;
                match done {
                    Ok(acks) => row.acks += acks,
                    Err(why) => {
                        row.lost += 1;
                        failures.push(why);
                    }
                }
            }
        };
        let workers = [scope.spawn(work), scope.spawn(work)];
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    print_table(&table.into_inner().unwrap());
    assert!(failures.is_empty(), "acknowledged bytes were lost:\n{}", failures.join("\n"));
}

/// Results of the rounds with one file system, one device and one end.
#[derive(Default)]
struct Row {
    rounds: u64,
    acks: u64,
    lost: u64,
}

fn print_table(table: &BTreeMap<(&str, Device, End), Row>) {
    println!(
        "\n  host    device    end      rounds  acknowledged  disks recovered  rounds with a loss"
    );
    let line = |what: &str, row: &Row| {
        let Row { rounds, acks, lost } = row;
        println!("  {what:<25}  {rounds:>6}  {acks:>12}  {:>15}  {lost:>18}", 3 * rounds);
    };
    let mut all = Row::default();
    for ((kind, device, end), row) in table {
        line(&format!("{kind:<6}  {:<8}  {:<7}", format!("{device:?}"), format!("{end:?}")), row);
        all.rounds += row.rounds;
        all.acks += row.acks;
        all.lost += row.lost;
    }
    line("all", &all);
}

/// Shows that the lossy disk loses as much as a real one: synced data is there, unsynced data is
/// lost.
#[test]
fn the_lossy_disk_loses_what_was_not_synced() {
    if !has_host_disks("the_lossy_disk") {
        return;
    }
    for kind in Kind::ALL {
        let host = HostDisk::new(kind).unwrap();
        let (kept, lost) = (vec![b'k'; 300_000], vec![b'l'; 300_000]);
        std::fs::write(host.path().join("kept"), &kept).unwrap();
        for name in ["kept", "."] {
            std::fs::File::open(host.path().join(name)).unwrap().sync_all().unwrap();
        }
        std::fs::write(host.path().join("lost"), &lost).unwrap();
        host.disk().lose_power();
        let written = std::fs::File::open(host.path().join("lost")).unwrap();
        assert!(
            written.sync_all().is_err(),
            "{}: a sync succeeded after the power failure",
            kind.name()
        );
        drop(written);
        let disk = host.off();
        for survivors in [Survivors::None, Survivors::Some(5), Survivors::All] {
            let recovered = Recovered::of(&disk, survivors).unwrap();
            let found = |name: &str| std::fs::read(recovered.path().join(name)).unwrap_or_default();
            assert!(found("kept") == kept, "{}, {survivors:?}: synced data is lost", kind.name());
            assert!(
                found("lost") != lost,
                "{}, {survivors:?}: unsynced data has survived",
                kind.name()
            );
        }
    }
}
