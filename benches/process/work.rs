// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The load of the benchmark: a stream of requests for each slot. A request may need values from
//! the reply to the one before it.

use std::thread;
use std::time::{Duration, Instant};

use testkit::fuse_abi::{self as abi, Arg, op};

use super::peer::{DATA, DATA_BYTES, FILES, Peer, file};
use super::place::{Place, stay_on};
use super::queue::{DEPTH, QueueDriver, Request};

/// A kind of request, or of a short sequence of requests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Op {
    Lookup,
    Getattr,
    OpenRelease,
    Read(u32),
    Write(u32),
    Readdirplus,
    CreateUnlink,
}

/// All operations, in the order of the tables' rows.
pub const OPS: [Op; 9] = [
    Op::Lookup,
    Op::Getattr,
    Op::OpenRelease,
    Op::Read(4 << 10),
    Op::Write(4 << 10),
    Op::Read(1 << 20),
    Op::Write(1 << 20),
    Op::Readdirplus,
    Op::CreateUnlink,
];

impl Op {
    /// The operation's name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lookup => "lookup",
            Self::Getattr => "getattr",
            Self::OpenRelease => "open, release",
            Self::Read(4096) => "read 4 KiB",
            Self::Read(_) => "read 1 MiB",
            Self::Write(4096) => "write 4 KiB",
            Self::Write(_) => "write 1 MiB",
            Self::Readdirplus => "readdirplus",
            Self::CreateUnlink => "create, unlink",
        }
    }
}

/// The nodes and file handles that requests refer to.
pub struct Names {
    nodes: Vec<u64>,
    data: (u64, u64),
    dirs: Vec<u64>,
}

impl Names {
    /// Looks the files up, and opens the files and directories that requests need open.
    pub fn of(peer: &mut Peer) -> Self {
        let nodes = (0..FILES).map(|i| peer.node(&file(i))).collect();
        let data = peer.node(DATA);
        let dirs = 0..DEPTH * peer.kind.queues();
        Self {
            nodes,
            data: (data, peer.open(op::OPEN, data, libc::O_RDWR)),
            dirs: dirs.map(|_| peer.open(op::OPENDIR, abi::ROOT, 0)).collect(),
        }
    }
}

/// The state of a slot's stream of requests.
#[derive(Clone, Copy, Default)]
struct At {
    step: usize,
    random: u64,
    fh: u64,
    nodeid: u64,
}

impl At {
    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % below
    }
}

impl Op {
    fn next(self, names: &Names, slot: usize, at: &mut At) -> Request {
        let any = at.random(names.nodes.len() as u64) as usize;
        let (node, fh) = names.data;
        match self {
            Self::Lookup => {
                let args = Arg::new().name(&file(any)).0;
                Request::new(op::LOOKUP, abi::ROOT, args, abi::ENTRY_OUT)
            }
            Self::Getattr => {
                Request::new(op::GETATTR, names.nodes[any], abi::getattr().0, abi::ATTR_OUT)
            }
            Self::OpenRelease if at.step.is_multiple_of(2) => {
                at.nodeid = names.nodes[any];
                Request::new(op::OPEN, at.nodeid, abi::open(libc::O_RDWR).0, abi::OPEN_OUT)
            }
            Self::OpenRelease => Request::new(op::RELEASE, at.nodeid, abi::release(at.fh).0, 0),
            Self::Read(bytes) => {
                let from = at.random(DATA_BYTES / u64::from(bytes)) * u64::from(bytes);
                let request = Request::new(op::READ, node, abi::read(fh, from, bytes).0, 0);
                Request { data_out: bytes, ..request }
            }
            Self::Write(bytes) => {
                let from = at.random(DATA_BYTES / u64::from(bytes)) * u64::from(bytes);
                let request = Request::new(op::WRITE, node, abi::write(fh, from, bytes).0, 8);
                Request { data_in: bytes, ..request }
            }
            Self::Readdirplus => {
                let args = abi::read(names.dirs[slot], 0, 32 << 10).0;
                let request = Request::new(op::READDIRPLUS, abi::ROOT, args, 0);
                Request { data_out: 32 << 10, ..request }
            }
            Self::CreateUnlink => {
                let name = format!("new-{slot}");
                match at.step % 4 {
                    0 => {
                        let args = abi::create(&name, libc::O_RDWR | libc::O_CREAT, 0o644).0;
                        Request::new(op::CREATE, abi::ROOT, args, abi::ENTRY_OUT + abi::OPEN_OUT)
                    }
                    1 => Request::new(op::RELEASE, at.nodeid, abi::release(at.fh).0, 0),
                    2 => Request::new(op::UNLINK, abi::ROOT, Arg::new().name(&name).0, 0),
                    _ => {
                        let args = Arg::new().u64s(&[1]).0;
                        let forget = Request::new(op::FORGET, at.nodeid, args, 0);
                        Request { body: None, ..forget }
                    }
                }
            }
        }
    }

    /// Takes the values that the next request needs from a reply, or checks the reply for an error.
    fn learn(self, queue: &QueueDriver, slot: usize, at: &mut At) {
        match (self, at.step % 4) {
            (Self::OpenRelease, 0 | 2) => {
                at.fh = abi::u64_at(&queue.body(slot, abi::OPEN_OUT), 0);
            }
            (Self::CreateUnlink, 0) => {
                let body = queue.body(slot, abi::ENTRY_OUT + abi::OPEN_OUT);
                (at.nodeid, at.fh) = (abi::u64_at(&body, 0), abi::u64_at(&body, abi::ENTRY_OUT));
            }
            (Self::CreateUnlink, 3) => {}
            _ => queue.check(slot),
        }
        at.step += 1;
    }

    /// Whether a stream may end at this step, with every file closed.
    fn may_end(self, step: usize) -> bool {
        match self {
            Self::OpenRelease => step.is_multiple_of(2),
            Self::CreateUnlink => step.is_multiple_of(4),
            _ => true,
        }
    }
}

/// Results of one queue, or of all queues together.
#[derive(Default)]
pub struct Done {
    /// Requests per second.
    pub per_second: f64,
    /// Latency of each request, in nanoseconds.
    pub latencies: Vec<u64>,
}

impl Done {
    /// The percentile `percent` of the latencies, in microseconds.
    pub fn percentile(&mut self, percent: usize) -> f64 {
        self.latencies.sort_unstable();
        let last = self.latencies.len().saturating_sub(1);
        self.latencies.get(last * percent / 100).map_or(f64::NAN, |nanos| *nanos as f64 / 1e3)
    }
}

/// The number of requests in flight on each queue, and the cores of driver and daemon.
#[derive(Clone, Copy)]
pub struct Load {
    pub depth: usize,
    pub place: Place,
}

/// Runs `op` on all request queues for `time`.
pub fn run(peer: &mut Peer, names: &Names, op: Op, load: Load, time: Duration) -> Done {
    load.place.put(peer.pid());
    thread::scope(|scope| {
        let drivers = peer.drivers[1..].iter_mut().enumerate();
        let threads: Vec<_> = drivers
            .map(|(i, queue)| {
                scope.spawn(move || run_queue(queue, names, op, i * DEPTH, load, time))
            })
            .collect();
        let mut all = Done::default();
        for thread in threads {
            let done = thread.join().unwrap();
            all.per_second += done.per_second;
            all.latencies.extend(done.latencies);
        }
        all
    })
}

fn run_queue(
    queue: &mut QueueDriver,
    names: &Names,
    op: Op,
    first: usize,
    Load { depth, place }: Load,
    time: Duration,
) -> Done {
    stay_on(place.driver());
    let began = Instant::now();
    let mut streams = [At::default(); DEPTH];
    let mut posted = [began; DEPTH];
    let mut latencies = Vec::with_capacity(1 << 16);
    for (slot, stream) in streams.iter_mut().enumerate().take(depth) {
        stream.random = (first + slot) as u64;
        queue.post(slot, &op.next(names, first + slot, stream));
    }
    queue.kick();
    let (mut open, mut slots) = (depth, Vec::new());
    while open > 0 {
        queue.reap(&mut slots);
        let now = Instant::now();
        let over = now - began >= time;
        for &slot in &slots {
            latencies.push((now - posted[slot]).as_nanos() as u64);
            op.learn(queue, slot, &mut streams[slot]);
            if over && op.may_end(streams[slot].step) {
                open -= 1;
                continue;
            }
            posted[slot] = Instant::now();
            queue.post(slot, &op.next(names, first + slot, &mut streams[slot]));
        }
        queue.kick();
    }
    Done { per_second: latencies.len() as f64 / began.elapsed().as_secs_f64(), latencies }
}
