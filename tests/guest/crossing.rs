// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Q1 of docs/front-ends.md: QEMU crashes when it handles SHMEM_MAP or SHMEM_UNMAP for a device
//! that it has stopped. These tests send maps and unmaps all the time while the VM is stopped and
//! continued.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use serde_json::json;
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Backend, VhostUserFrontendReqHandler};
use vhost_user_dax::window::{
    FileOffset, MapError, Mapper, ShmemMapper, WindowBytes, WindowOffset,
};

use crate::machine::Options;
use crate::script::{MakeMapper, Script};
use crate::vm::{Guest, Vm};

/// The mapper that the daemon uses.
const OURS: MakeMapper = |channel, started| Arc::new(ShmemMapper::new(channel, started));

/// A naive mapper: it only checks just before sendmsg(2) whether the device is started.
const NAIVE: MakeMapper = |channel, started| Arc::new(NaiveMapper { channel, started });

struct NaiveMapper {
    channel: Backend,
    started: Box<dyn Fn() -> bool + Send + Sync>,
}

struct AtLastMoment<'a>(&'a NaiveMapper, RawFd);

impl AsRawFd for AtLastMoment<'_> {
    fn as_raw_fd(&self) -> RawFd {
        if (self.0.started)() { self.1 } else { -1 }
    }
}

impl NaiveMapper {
    fn sort(&self, sent: io::Result<u64>) -> Result<(), MapError> {
        match sent {
            Ok(_) => Ok(()),
            Err(_) if !(self.started)() => Err(MapError::Stopped),
            Err(_) => Err(MapError::Refused),
        }
    }
}

fn message(at: WindowOffset, from: FileOffset, bytes: WindowBytes) -> VhostUserMMap {
    let (fd_offset, shm_offset, len) = (from.0, at.0, bytes.0);
    let flags = VhostUserMMapFlags::WRITABLE.bits();
    VhostUserMMap { shmid: 0, padding: [0; 7], fd_offset, shm_offset, len, flags }
}

impl Mapper for NaiveMapper {
    fn map(
        &self,
        at: WindowOffset,
        file: &std::fs::File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        let file = AtLastMoment(self, file.as_raw_fd());
        self.sort(self.channel.shmem_map(&message(at, from, bytes), &file))
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        if !(self.started)() {
            return Err(MapError::Stopped);
        }
        self.sort(self.channel.shmem_unmap(&message(at, FileOffset(0), bytes)))
    }
}

/// Number of requests by result, and the flag that ends the test.
#[derive(Default)]
struct Counts {
    done: AtomicU64,
    stopped: AtomicU64,
    failed: AtomicU64,
    over: AtomicBool,
}

impl Counts {
    fn get(count: &AtomicU64) -> u64 {
        count.load(Ordering::Relaxed)
    }
}

/// Maps and unmaps one range all the time. A request that found the device stopped is repeated. It
/// was not carried out, and the earlier ones last, so a refusal of any request is an error.
fn storm(script: &Script, counts: &Counts) {
    let mapper = script.mapper();
    let again = |request: &dyn Fn() -> Result<(), MapError>| {
        while !counts.over.load(Ordering::Relaxed) {
            match request() {
                Ok(()) => {
                    counts.done.fetch_add(1, Ordering::Relaxed);
                    return;
                }
                Err(MapError::Stopped) => {
                    counts.stopped.fetch_add(1, Ordering::Relaxed);
                    thread::yield_now();
                }
                Err(_) => {
                    counts.failed.fetch_add(1, Ordering::Relaxed);
                    return;
                }
            }
        }
    };
    while !counts.over.load(Ordering::Relaxed) && Counts::get(&counts.failed) == 0 {
        again(&|| script.map(&*mapper, 0));
        again(&|| script.unmap(&*mapper, 0));
    }
}

/// Least number of requests that the storm must have done; the pauses go on until then.
const STORM: u64 = 100;

/// Stops and continues the VM until there were `times` pauses and the storm has done `STORM`
/// requests, or until QEMU has ended. Returns the number of pauses.
fn pauses(vm: &mut Vm<'_>, counts: &Counts, times: usize) -> usize {
    let pause = |vm: &mut Vm<'_>| {
        vm.qmp("stop", json!({}));
        vm.qmp("cont", json!({}));
    };
    let is_over = |done: usize| {
        done >= times && (Counts::get(&counts.done) > STORM || Counts::get(&counts.failed) > 0)
    };
    let mut done = 0;
    while !is_over(done) && catch_unwind(AssertUnwindSafe(|| pause(vm))).is_ok() {
        done += 1;
    }
    done
}

/// Boots a VM with the scripted device and pauses it `times` times during the storm.
fn cross(test: &'static str, make: MakeMapper, times: usize) -> Option<(usize, Counts)> {
    let guest = Guest::enter(test)?;
    let script = Script::start(make);
    let options = Options { qemu: script.qemu_arguments(), ..Options::default() };
    let mut vm = guest.boot_with(&[], &options);
    let counts = Counts::default();
    let began = Instant::now();
    let survived = thread::scope(|scope| {
        scope.spawn(|| storm(&script, &counts));
        let survived = pauses(&mut vm, &counts, times);
        counts.over.store(true, Ordering::Relaxed);
        survived
    });
    println!(
        "{survived} of {times} pauses in {:.1} s; requests: {} done, {} stopped, {} failed",
        began.elapsed().as_secs_f64(),
        Counts::get(&counts.done),
        Counts::get(&counts.stopped),
        Counts::get(&counts.failed)
    );
    vm.print_end();
    Some((survived, counts))
}

/// Shows: maps and unmaps go on across stops; none is lost and none is done twice.
#[test]
fn stops_cross_maps() {
    let Some((survived, counts)) = cross("stops_cross_maps", OURS, 300) else { return };
    assert!(survived >= 300, "QEMU has ended");
    assert_eq!(Counts::get(&counts.failed), 0);
    assert!(Counts::get(&counts.done) > STORM, "the storm sent too few requests");
}

/// As `stops_cross_maps`, with the naive mapper. Shows that the test detects the crash that
/// `window/channel/` prevents.
#[test]
#[ignore = "shows how QEMU crashes; run by hand"]
fn stops_cross_maps_of_a_naive_mapper() {
    let name = "stops_cross_maps_of_a_naive_mapper";
    let Some((survived, _)) = cross(name, NAIVE, 3000) else { return };
    assert!(survived < 3000, "QEMU survived");
}

/// Measures the duration of a map and of an unmap with 32 live maps, for both mappers.
#[test]
#[ignore = "a measurement; run by hand"]
fn cost_of_a_map() {
    for (name, make) in [("naive", NAIVE), ("ours", OURS), ("naive", NAIVE), ("ours", OURS)] {
        let Some(guest) = Guest::enter("cost_of_a_map") else { return };
        let script = Script::start(make);
        let options = Options { qemu: script.qemu_arguments(), ..Options::default() };
        let _vm = guest.boot_with(&[], &options);
        let mapper = script.mapper();
        for i in 0..32 {
            script.map(&*mapper, i).unwrap();
        }
        let timed = |request: &dyn Fn() -> Result<(), MapError>| {
            let began = Instant::now();
            request().unwrap();
            began.elapsed().as_micros()
        };
        let times = (0..400).map(|_| {
            let map = timed(&|| script.map(&*mapper, 32));
            (map, timed(&|| script.unmap(&*mapper, 32)))
        });
        let (mut maps, mut unmaps): (Vec<_>, Vec<_>) = times.unzip();
        maps.sort_unstable();
        unmaps.sort_unstable();
        let (p50, p95) = (maps.len() / 2, maps.len() * 95 / 100);
        println!(
            "{name}: map median {} us, 95 % {} us; unmap median {} us, 95 % {} us",
            maps[p50], maps[p95], unmaps[p50], unmaps[p95]
        );
    }
}
