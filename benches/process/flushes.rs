// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Flushes per second of a virtio-pmem device with a constant number of flushes in flight, each
//! after a write to a page of its own. The peer is one thread per waiter that calls fdatasync(2),
//! as QEMU's own virtio-pmem device does.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::figures::{Better, Figures, How};
use crate::peer::{Daemon, pmem_command};
use testkit::driver::{Answer, Driver, DriverOptions};
use testkit::memory::guest_ram;
use testkit::strict_vmm::{StrictVmm, VmmOptions};

const FILE_BYTES: u64 = 64 << 20;
const PAGE: u64 = 4096;
const OURS: usize = 0;
const EACH: usize = 1;

/// Measures and prints the figures.
pub fn run(quick: bool) {
    let (rounds, time) = if quick { (1, 50) } else { (7, 500) };
    let time = Duration::from_millis(time);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pmem");
    let file = File::create(&path).unwrap();
    (0..FILE_BYTES >> 20).for_each(|i| file.write_all_at(&[1; 1 << 20], i << 20).unwrap());
    file.sync_all().unwrap();
    let daemon = Daemon::start(dir.path(), |socket| pmem_command(socket, &path));
    let ram = guest_ram(1);
    let mut vmm = StrictVmm::connect(&daemon.socket, &ram, VmmOptions::default()).unwrap();
    let mut driver = Driver::new(ram, DriverOptions::default());
    vmm.start(&mut driver);
    let peers = vec!["ours".into(), "an fdatasync each".into()];
    let mut figures = Figures::new("flushes", "Flushes of a pmem device, in process", peers);
    println!("  {rounds} rounds with 1, 8 and 32 waiting");
    for waiting in [1, 8, 32] {
        let what = format!("{waiting} waiting");
        for _ in 0..rounds {
            let ours = ours(&mut driver, &file, waiting, time);
            figures.add(&what, "/s", Better::More, OURS, ours);
            let each = an_fdatasync_each(&file, waiting, time);
            figures.add(&what, "/s", Better::More, EACH, each);
        }
    }
    figures.show(OURS, &[EACH], &How::new("ci/bench process", rounds));
}

/// Writes the page of waiter `i`.
fn dirty(file: &File, i: usize, round: usize) {
    file.write_all_at(&[round as u8; PAGE as usize], i as u64 * PAGE).unwrap();
}

fn ours(driver: &mut Driver, file: &File, waiting: usize, time: Duration) -> f64 {
    let began = Instant::now();
    let mut flush = |i, round| {
        dirty(file, i, round);
        driver.add_flush()
    };
    let mut open: Vec<_> = (0..waiting).map(|i| flush(i, 0)).collect();
    driver.kick();
    let mut done = 0;
    while began.elapsed() < time {
        // The oldest flush in flight; later ones may be answered by the same sync.
        assert_eq!(driver.wait(open[done % waiting]), Answer::OK);
        loop {
            let i = done % waiting;
            dirty(file, i, done);
            open[i] = driver.add_flush();
            done += 1;
            let next = open[done % waiting];
            if !driver.is_answered(next) {
                break;
            }
            assert_eq!(driver.wait(next), Answer::OK);
        }
        driver.kick();
    }
    let rate = done as f64 / began.elapsed().as_secs_f64();
    for i in done..done + waiting {
        assert_eq!(driver.wait(open[i % waiting]), Answer::OK);
    }
    rate
}

fn an_fdatasync_each(file: &File, waiting: usize, time: Duration) -> f64 {
    let began = Instant::now();
    let done: usize = thread::scope(|scope| {
        let threads: Vec<_> = (0..waiting)
            .map(|i| {
                scope.spawn(move || {
                    let mut done = 0;
                    while began.elapsed() < time {
                        dirty(file, i, done);
                        file.sync_data().unwrap();
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    done as f64 / began.elapsed().as_secs_f64()
}
