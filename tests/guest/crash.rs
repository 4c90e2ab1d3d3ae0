// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Crashes: kill -9 of the daemon, of QEMU, of both, and a loss of power, while the guest syncs
//! step after step of a plan. Every byte that was acknowledged must be there: in the file system as
//! it goes on after a kill, and in what a disk that loses what was not synced holds afterwards.
//!
//! `VUD_CRASH_ROUNDS` is the number of rounds (10 unless set), `VUD_CRASH_SEED` their random seed,
//! `VUD_CRASH_ROUND` the one round to run; `ci/crash` sets them.

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
/// Acknowledged before the end comes.
const ACKS: std::ops::Range<u64> = 5..120;
/// How long to listen for an acknowledgement that must not come. A broken daemon is the more surely
/// caught, the longer this is; a good one is never blamed.
const LIE: Duration = Duration::from_secs(1);
const LIES: u64 = 20;
/// Acknowledgements on their way in the guest's serial port when it dies.
const UNHEARD: u64 = 200;

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
    /// One stream alone: no sync of the other's covers for one that comes too late.
    only: Option<u64>,
    coin: u64,
}

impl Round {
    /// Nine rounds meet each file system with each device; thirty-six with each end, too.
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

/// What the guest was told is durable: the last step of each stream.
type Acked = [Option<u64>; STREAMS as usize];

fn count(acked: &Acked) -> u64 {
    acked.iter().map(|last| last.map_or(0, |last| last + 1)).sum()
}

fn hear(acked: &mut Acked, line: &str) -> bool {
    let Some((stream, n)) = line.strip_prefix("acked=").and_then(|ack| ack.split_once(',')) else {
        return false;
    };
    let (stream, n): (usize, u64) = (stream.parse().unwrap(), n.parse().unwrap());
    acked[stream] = Some(n);
    true
}

/// What one file must hold, byte by byte, after the acknowledged steps of a stream.
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

/// Compares what is there with what must be. A byte that a later, unacknowledged step has put there
/// is as good. Says what is lost.
fn check_stream(place: &Path, raw: bool, stream: u64, last: Option<u64>) -> Result<(), String> {
    for (name, bytes) in expected(stream, last, raw) {
        let path = if raw { place.to_owned() } else { place.join(&name) };
        let found = std::fs::read(&path).map_err(|e| format!("LOST: {name}: {e}"))?;
        if found.len() < bytes.len() {
            return Err(format!("LOST: {name} has {} of {} bytes", found.len(), bytes.len()));
        }
        let behind = last.map_or(0, |last| last + 1);
        let later: Vec<_> = (behind..behind + UNHEARD)
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

/// Where the round's files are, inside the host's file system.
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
                // It is there before all else, as the daemon makes it: blocks that nobody has
                // written.
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

    /// What of the host's file system at `host` holds all that was acknowledged.
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

/// Boots, and runs the plan until it has acknowledged enough.
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
        if !hear(&mut acked, &line) {
            vm.fail(&format!("the workload said '{line}'"));
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

/// Returns how many steps were acknowledged.
fn run_round(guest: &Guest, round: &Round) -> Result<u64, String> {
    let host = HostDisk::new(round.kind)?;
    let place = Place::new(round.device, host.path());
    let (mut vm, mut acked) = run_plan(guest, round, &place, host.path());
    let of = |what: String| move |why: String| format!("{round}: {what}: {why}");
    let disk = if round.end == End::Power {
        host.disk().hold_syncs();
        // A broken daemon would lie for ever.
        for line in (0..LIES).map_while(|_| vm.case_line_within(LIE)) {
            hear(&mut acked, &line);
        }
        host.disk().lose_power();
        kill(&mut vm, End::Both);
        None
    } else {
        kill(&mut vm, round.end);
        // As if power were lost right now: what follows looks at the live file system, which makes
        // it sync.
        let disk = host.disk().copy().map_err(|why| format!("{round}: {why}"))?;
        if round.end == End::Daemon {
            // Nothing is acknowledged any more: it hangs, or has errors.
            vm.kill_qemu();
        }
        Some(disk)
    };
    for line in vm.last_lines() {
        hear(&mut acked, &line);
    }
    drop(vm);
    let disk = match disk {
        None => host.off(),
        Some(disk) => {
            place.check(round.device, host.path(), &acked).map_err(of("after the kill".into()))?;
            drop(host); // btrfs mounts no second disk of the same name.
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

/// Whether this host can be given disks, in a namespace of this thread's own; the log of cases says
/// so if not.
fn has_host_disks(test: &str) -> bool {
    let has = own_namespace().is_ok() && Path::new("/dev/fuse").exists();
    if !has && let Some(images) = Images::find(test) {
        images.log_case("skip", test, "needs-root-namespaces-loop-fuse", 0);
    }
    has
}

/// Shows: no acknowledged byte is lost, on any of the file systems and devices, at any of the ends.
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
                        Ok(acks) => format!("{acks} acknowledged, all there"),
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

/// What came of the rounds of one kind.
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

/// Shows that the disk is no kinder than a real one: what was synced is there, what was not is
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
        assert!(written.sync_all().is_err(), "{}: a sync without power", kind.name());
        drop(written);
        let disk = host.off();
        for survivors in [Survivors::None, Survivors::Some(5), Survivors::All] {
            let recovered = Recovered::of(&disk, survivors).unwrap();
            let found = |name: &str| std::fs::read(recovered.path().join(name)).unwrap_or_default();
            assert!(found("kept") == kept, "{}, {survivors:?}: lost", kind.name());
            assert!(found("lost") != lost, "{}, {survivors:?}: too kind", kind.name());
        }
    }
}
