// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Tests of a ring whose device is a double that the test controls.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vhost_user_backend::VringT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::device::request::Request;
use crate::device::{Drained, InlineWork, SessionWindow};
use crate::window::WindowBytes;

/// The queue's size, in descriptors.
const SIZE: u16 = 16;
/// Guest addresses: available ring, used ring, replies. The descriptor table is at 0.
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const REPLIES: u64 = 0x1_0000;
/// Bytes of a reply; more than the limit on what is stored under the ring's lock.
const REPLY: u32 = 0x4000;

/// Sends each request to the test, and returns from `handle` when the test sends `go`.
struct Double {
    policy: InflightPolicy,
    taken: Mutex<Sender<Request>>,
    go: Mutex<Receiver<()>>,
}

impl Device for Double {
    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> usize {
        1
    }

    fn inflight_policy(&self) -> InflightPolicy {
        self.policy
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn window_bytes(&self) -> WindowBytes {
        WindowBytes(0)
    }

    fn mem_slots(&self) -> bool {
        false
    }

    fn use_instead(&self) -> &str {
        ""
    }

    fn open_window(&self) -> Arc<dyn SessionWindow> {
        unreachable!("the test opens no session")
    }

    fn handle(&self, request: Request, _: Drained) -> Option<InlineWork> {
        self.taken.lock().unwrap().send(request).unwrap();
        self.go.lock().unwrap().recv().unwrap();
        None
    }

    fn report(&self) {}

    fn shutdown(&self) {}
}

/// A running ring, its memory, and the two channels of its device.
struct Bench {
    ring: Arc<Ring>,
    vring: Vring,
    mem: GuestMemoryAtomic<GuestMemoryMmap>,
    taken: Receiver<Request>,
    go: Sender<()>,
}

impl Bench {
    fn new(policy: InflightPolicy) -> Self {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let mem = GuestMemoryAtomic::new(ram);
        let memory = Memory::new(mem.clone());
        memory.table_came();
        let ((taken_by, taken), (go, goes)) = (channel(), channel());
        let device = Double { policy, taken: Mutex::new(taken_by), go: Mutex::new(goes) };
        let ring = Ring::new(Arc::new(device), 0, memory, Arc::default());
        let vring = Vring::new(mem.clone(), SIZE).unwrap();
        vring.set_queue_size(SIZE);
        vring.set_queue_info(0, AVAIL, USED).unwrap();
        vring.set_enabled(true);
        vring.set_queue_ready(true);
        Self { ring, vring, mem, taken, go }
    }

    fn ram(&self) -> vm_memory::GuestMemoryLoadGuard<GuestMemoryMmap> {
        vm_memory::GuestAddressSpace::memory(&self.mem)
    }

    /// Makes chains `0..until` available, each with one writable descriptor.
    fn offer(&self, until: u16) {
        let ram = self.ram();
        for head in 0..until {
            let at = REPLIES + u64::from(head) * u64::from(REPLY);
            let desc = u64::from(head) * 16;
            ram.write_obj(at, GuestAddress(desc)).unwrap();
            ram.write_obj(REPLY, GuestAddress(desc + 8)).unwrap();
            ram.write_obj(2u32, GuestAddress(desc + 12)).unwrap(); // VIRTQ_DESC_F_WRITE
            ram.write_obj(head, GuestAddress(AVAIL + 4 + u64::from(head) * 2)).unwrap();
        }
        ram.write_obj(until, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn used(&self) -> u16 {
        self.ram().read_obj(GuestAddress(USED + 2)).unwrap()
    }

    /// Starts a thread that does what the ring's thread does at a kick: starts the ring if it is
    /// stopped, else drains it.
    fn kick(&self) -> thread::JoinHandle<()> {
        let (ring, vring) = (self.ring.clone(), self.vring.clone());
        thread::spawn(move || match ring.start(&vring) {
            Some(started) => ring.release(started.epoch, true),
            None => ring.drain(),
        })
    }

    /// Starts a thread that does what the front-end thread does at GET_VRING_BASE.
    fn stop(&self) -> thread::JoinHandle<u16> {
        let (ring, vring) = (self.ring.clone(), self.vring.clone());
        thread::spawn(move || {
            vring.set_queue_ready(false);
            ring.stop();
            vring.queue_next_avail()
        })
    }

    /// Waits until a thread waits for the ring to change.
    fn stop_waits(&self) {
        while self.ring.lock().waiting == 0 {
            thread::yield_now();
        }
    }
}

/// Shows: `Device::handle` is called without the ring's lock and the vring's lock, so it may
/// complete its request at once. A second thread that drains the ring meanwhile takes no chain, and
/// does not block.
#[test]
fn the_device_is_called_without_a_lock() {
    let bench = Bench::new(InflightPolicy::Retain);
    bench.offer(2);
    let ring = bench.kick();
    let first = bench.taken.recv().unwrap();
    bench.ring.drain(); // Returns at once, and takes no chain.
    assert!(bench.taken.recv_timeout(Duration::ZERO).is_err());
    let next = bench.vring.queue_next_avail(); // Takes the vring's lock.
    assert_eq!(next, 1);
    first.complete_with(None, vec![1; REPLY as usize], 0);
    assert_eq!(bench.used(), 1);
    bench.go.send(()).unwrap();
    let second = bench.taken.recv().unwrap();
    bench.go.send(()).unwrap();
    ring.join().unwrap();
    second.complete_with(None, vec![2; REPLY as usize], 0);
    assert_eq!(bench.used(), 2);
    let last: u8 = bench.ram().read_obj(GuestAddress(REPLIES + 2 * u64::from(REPLY) - 1)).unwrap();
    assert_eq!(last, 2, "the whole reply was stored");
}

/// Shows: a stop waits while `Device::handle` runs, so that the device reads the memory of the
/// driver that sent the request. No further chain is taken then. The next start continues where the
/// ring was stopped, whether or not the open requests have been completed.
#[test]
fn a_stop_during_a_hand_over() {
    for (policy, base) in [(InflightPolicy::Retain, 1), (InflightPolicy::Resubmit, 0)] {
        let bench = Bench::new(policy);
        bench.offer(2);
        let ring = bench.kick();
        let first = bench.taken.recv().unwrap();
        let stop = bench.stop();
        bench.stop_waits();
        bench.go.send(()).unwrap();
        assert_eq!(stop.join().unwrap(), base, "{policy:?}");
        ring.join().unwrap();
        assert!(!bench.ring.is_started());
        first.complete_with(None, vec![1; REPLY as usize], 0);
        assert_eq!(bench.used(), 0, "a stopped ring was written");
        bench.vring.set_queue_ready(true);
        let ring = bench.kick();
        for _ in base..2 {
            let again = bench.taken.recv().unwrap();
            bench.go.send(()).unwrap();
            again.complete_with(None, Vec::new(), 0);
        }
        ring.join().unwrap();
        assert_eq!(bench.used(), 2, "{policy:?}");
    }
}

/// Shows: a request that waits for a stopped ring is woken when the process ends, and a later `pin`
/// of that request does not wait.
#[test]
fn close_wakes_requests_that_wait() {
    let bench = Bench::new(InflightPolicy::Retain);
    bench.offer(1);
    let ring = bench.kick();
    let mut request = bench.taken.recv().unwrap();
    bench.go.send(()).unwrap();
    ring.join().unwrap();
    bench.stop().join().unwrap();
    let waits = thread::spawn(move || {
        let pinned = request.pin();
        (request, pinned)
    });
    bench.stop_waits();
    bench.ring.close();
    let (mut request, pinned) = waits.join().unwrap();
    assert!(!pinned && !request.pin());
}

/// Shows: a start that no thread has seen before the next stop changes nothing: the ring goes on
/// where it was stopped first, and its window is kept.
#[test]
fn a_stop_of_a_stopped_ring() {
    for policy in [InflightPolicy::Retain, InflightPolicy::Resubmit] {
        let bench = Bench::new(policy);
        bench.offer(1);
        let ring = bench.kick();
        let request = bench.taken.recv().unwrap();
        request.complete_with(None, Vec::new(), 0);
        bench.go.send(()).unwrap();
        ring.join().unwrap();
        for _pause in 0..2 {
            assert_eq!(bench.stop().join().unwrap(), 1);
            bench.vring.set_queue_ready(true);
        }
        let started = bench.ring.start(&bench.vring).unwrap();
        assert_eq!(started.start, RingStart::Resumed, "{policy:?}");
    }
}
