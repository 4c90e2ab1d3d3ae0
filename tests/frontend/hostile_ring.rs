// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings of a hostile driver: each malformed chain is answered or returned, and counted once, and
//! the ring works afterwards.

use testkit::driver::{
    Answer, Desc, Driver, DriverOptions, INDIRECT, NEXT, Offered, SCRATCH, UNANSWERED, WRITE,
};
use testkit::memory::RAM_REGION_BYTES;
use testkit::{Guest, Host, eventually};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 16;
const OPTIONS: DriverOptions = DriverOptions { size: SIZE, event_idx: true, indirect: true };

/// Offers one chain of the queue's own descriptor table. `make` gets the request and the reply of
/// [`Driver::flush_buffers`], and returns the chain's descriptors.
fn chain(driver: &mut Driver, make: impl Fn([Desc; 2]) -> Vec<Desc>) -> Offered {
    let probe = driver.take_descs(1);
    let buffers = driver.flush_buffers(probe[0]);
    let mut descs = make(buffers);
    let mut indices = probe;
    indices.extend(driver.take_descs(descs.len() - 1));
    let last = descs.len() - 1;
    for (i, desc) in descs.iter_mut().enumerate() {
        if i < last {
            desc.flags |= NEXT;
            desc.next = indices[i + 1];
        }
        driver.set_desc(indices[i], *desc);
    }
    driver.offer(indices)
}

/// Offers one descriptor of an indirect table at SCRATCH, which has `entries`. `name` may change
/// that descriptor.
fn table(driver: &mut Driver, entries: &[Desc], name: impl Fn(Desc) -> Desc) -> Offered {
    for (i, desc) in entries.iter().enumerate() {
        driver.set_desc_in(SCRATCH, i as u16, *desc);
    }
    let descs = driver.take_descs(1);
    driver.flush_buffers(descs[0]);
    let len = entries.len() as u32 * 16;
    let desc = name(Desc { addr: SCRATCH, len, flags: INDIRECT, next: 0 });
    driver.set_desc(descs[0], desc);
    driver.offer(descs)
}

/// A request and a reply behind the table at SCRATCH, for indirect tables.
fn scratch_buffers(driver: &Driver) -> [Desc; 2] {
    let at = SCRATCH + 0x1_0000;
    driver.mem.write_obj(0u32, GuestAddress(at)).unwrap();
    driver.mem.write_obj(UNANSWERED, GuestAddress(at + 16)).unwrap();
    [
        Desc { addr: at, len: 4, flags: NEXT, next: 1 },
        Desc { addr: at + 16, len: 4, flags: WRITE, next: 0 },
    ]
}

/// A malformed chain: its name, how it is offered, and its expected answer.
type Case = (&'static str, fn(&mut Driver) -> Offered, Answer);

/// Malformed chains of the queue's own descriptor table.
const DIRECT: &[Case] = &[
    ("request of 3 bytes", |d| chain(d, |[r, w]| vec![Desc { len: 3, ..r }, w]), Answer::FAILED),
    ("request of 0 bytes", |d| chain(d, |[r, w]| vec![Desc { len: 0, ..r }, w]), Answer::FAILED),
    ("no request", |d| chain(d, |[_, w]| vec![w]), Answer::FAILED),
    ("unknown type", |d| chain(d, |[r, w]| vec![Desc { addr: w.addr, ..r }, w]), Answer::FAILED),
    ("no reply", |d| chain(d, |[r, _]| vec![Desc { flags: 0, ..r }]), Answer::RETURNED),
    ("reply of 3 bytes", |d| chain(d, |[r, w]| vec![r, Desc { len: 3, ..w }]), Answer::RETURNED),
    ("reply of 0 bytes", |d| chain(d, |[r, w]| vec![r, Desc { len: 0, ..w }]), Answer::RETURNED),
    (
        "request outside memory",
        |d| chain(d, |[r, w]| vec![Desc { addr: RAM_REGION_BYTES, ..r }, w]),
        Answer::RETURNED,
    ),
    (
        "request half outside memory",
        |d| chain(d, |[r, w]| vec![Desc { addr: RAM_REGION_BYTES - 2, ..r }, w]),
        Answer::RETURNED,
    ),
    (
        "reply outside memory",
        |d| chain(d, |[r, w]| vec![r, Desc { addr: 1 << 50, ..w }]),
        Answer::RETURNED,
    ),
    (
        "reply half outside memory",
        |d| chain(d, |[r, w]| vec![r, Desc { addr: RAM_REGION_BYTES - 2, ..w }]),
        Answer::RETURNED,
    ),
    (
        "reply at the end of all addresses",
        |d| chain(d, |[r, w]| vec![r, Desc { addr: u64::MAX - 1, ..w }]),
        Answer::RETURNED,
    ),
    (
        "request behind the reply",
        |d| chain(d, |[r, w]| vec![w, Desc { flags: 0, ..r }]),
        Answer::FAILED,
    ),
    (
        "a readable part behind the reply",
        |d| chain(d, |[r, w]| vec![r, w, Desc { flags: 0, ..r }]),
        Answer::FAILED,
    ),
    ("loop of requests", request_loop, Answer::RETURNED),
    ("loop of replies", reply_loop, Answer::FAILED),
    ("next outside the table", next_outside, Answer::RETURNED),
];

fn request_loop(driver: &mut Driver) -> Offered {
    let descs = driver.take_descs(2);
    let [request, _] = driver.flush_buffers(descs[0]);
    driver.set_desc(descs[0], Desc { next: descs[1], ..request });
    driver.set_desc(descs[1], Desc { next: descs[0], ..request });
    driver.offer(descs)
}

fn reply_loop(driver: &mut Driver) -> Offered {
    let descs = driver.take_descs(2);
    let [request, reply] = driver.flush_buffers(descs[0]);
    driver.set_desc(descs[0], Desc { next: descs[1], ..request });
    driver.set_desc(descs[1], Desc { next: descs[1], flags: WRITE | NEXT, ..reply });
    driver.offer(descs)
}

fn next_outside(driver: &mut Driver) -> Offered {
    let descs = driver.take_descs(1);
    let [request, _] = driver.flush_buffers(descs[0]);
    driver.set_desc(descs[0], Desc { next: 9999, ..request });
    driver.offer(descs)
}

/// Malformed indirect tables. The reply, if any, is behind SCRATCH, where the driver does not read
/// it: only the used length is compared.
const INDIRECTS: &[Case] = &[
    (
        "table outside memory",
        |d| table(d, &[], |t| Desc { addr: 1 << 50, len: 32, ..t }),
        Answer::RETURNED,
    ),
    ("table of 0 bytes", |d| table(d, &[], |t| t), Answer::RETURNED),
    (
        "table of one and a half descriptors",
        |d| {
            let buffers = scratch_buffers(d);
            table(d, &buffers, |t| Desc { len: 24, ..t })
        },
        Answer::RETURNED,
    ),
    (
        "table in a table",
        |d| {
            let inner = Desc { addr: SCRATCH + 0x2_0000, len: 32, flags: INDIRECT, next: 0 };
            table(d, &[inner], |t| t)
        },
        Answer::RETURNED,
    ),
    (
        "next outside its table",
        |d| {
            let [request, _] = scratch_buffers(d);
            table(d, &[Desc { next: 7, ..request }], |t| t)
        },
        Answer::RETURNED,
    ),
    (
        "longer than the queue",
        |d| {
            let [request, reply] = scratch_buffers(d);
            let empty = |i| Desc { len: 0, next: i + 1, ..request };
            let mut entries: Vec<_> = (0..SIZE).map(empty).collect();
            entries.extend([Desc { next: SIZE + 1, ..request }, reply]);
            table(d, &entries, |t| t)
        },
        Answer::RETURNED,
    ),
];

fn run_table(cases: &[Case]) {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    for (i, (name, offer, expected)) in cases.iter().enumerate() {
        let offered = offer(&mut guest.driver);
        guest.driver.kick();
        assert_eq!(guest.driver.wait(offered), *expected, "{name}");
        assert_eq!(host.pmem.counters().malformed, i as u64 + 1, "{name}");
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK, "after {name}");
    }
    assert_eq!(host.pmem.counters().flushes, cases.len() as u64);
    assert_eq!(guest.driver.outstanding(), 0);
    guest.power_off();
}

/// Shows that each malformed chain of the queue's own table has the expected answer and is counted
/// once, and that the next flush works.
#[test]
fn malformed_chains() {
    run_table(DIRECT);
}

/// Shows that each malformed indirect table has the expected answer and is counted once, and that
/// the next flush works.
#[test]
fn malformed_indirect_tables() {
    run_table(INDIRECTS);
}

/// Shows that a malformed chain between flushes is answered in the order of the ring, and that a
/// stop during a sync moves the ring's base back before all of them.
#[test]
fn malformed_chains_keep_the_order() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    host.gate.hold();
    let first = guest.driver.flush();
    host.gate.wait_begun(1);
    let bad = chain(&mut guest.driver, |[_, w]| vec![w]);
    guest.driver.kick();
    let second = guest.driver.flush();
    guest.driver.wait_taken();
    assert!(!guest.driver.is_answered(bad));
    guest.vmm.stop();
    assert_eq!(guest.vmm.base(), 0);
    guest.start();
    host.gate.open();
    assert_eq!(guest.driver.wait(second), Answer::OK);
    assert!(guest.driver.is_answered(bad) && guest.driver.is_answered(first));
    assert_eq!(guest.driver.wait(bad), Answer::FAILED);
    guest.power_off();
}

/// Shows that a request and a reply in descriptors of one byte each are well-formed.
#[test]
fn split_request_and_reply_are_well_formed() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    let split = |part: Desc| {
        (0..4).map(move |i| Desc { addr: part.addr + i, len: 1, flags: part.flags, next: 0 })
    };
    let offered = chain(&mut guest.driver, |[r, w]| split(r).chain(split(w)).collect());
    guest.driver.kick();
    assert_eq!(guest.driver.wait(offered), Answer::OK);
    assert_eq!(host.pmem.counters().malformed, 0);
    guest.power_off();
}

/// Shows that a head outside the descriptor table is counted as malformed and does not appear in
/// the used ring, and that flushes work on.
#[test]
fn head_outside_the_table_is_skipped() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    // More heads than the ring has descriptors: none may stay counted as in flight.
    for round in 0..3 * u64::from(SIZE) {
        guest.driver.offer_untracked(if round % 2 == 0 { SIZE } else { u16::MAX });
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
        assert_eq!(host.pmem.counters().malformed, round + 1);
        assert_eq!(u64::from(guest.driver.used_idx()), round + 1);
    }
    guest.power_off();
}

fn assert_dead_until_reset(guest: &mut Guest, jump: u16) {
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    let (used, idx) = (guest.driver.used_idx(), guest.driver.avail_idx());
    guest.driver.publish_avail_idx(idx.wrapping_add(jump));
    for _ in 0..100 {
        guest.driver.force_kick();
    }
    // The stop waits until the ring's thread is idle; the start drains the ring again.
    guest.vmm.stop();
    guest.start();
    guest.driver.force_kick();
    guest.vmm.stop();
    assert_eq!((guest.driver.used_idx(), guest.vmm.base()), (used, idx), "jump of {jump}");
    guest.start();
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
}

/// Shows that a ring whose available index is ahead by more than the ring's size is ignored until
/// the next reset.
#[test]
fn available_index_that_jumps() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    for jump in [SIZE + 1, 2 * SIZE, 0x7fff, 0x8000, u16::MAX] {
        assert_dead_until_reset(&mut guest, jump);
    }
    guest.power_off();
}

/// Shows that each chain of a ring with random content is counted, and that flushes work after a
/// reset.
#[test]
fn ring_full_of_garbage() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    let mut random = 88_172_645_463_325_252u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let taken = |host: &Host| {
        let counters = host.pmem.counters();
        counters.malformed + counters.flushes
    };
    for _ in 0..300 {
        let before = taken(&host);
        for i in 0..SIZE {
            // Half of the addresses are in memory, but none is in the rings.
            let r = next();
            let addr = if r & 1 == 0 { SCRATCH + (r >> 8) % 0x8_0000 } else { next() };
            let len = if r & 2 == 0 { (r >> 40) as u32 % 64 } else { next() as u32 };
            let (flags, link) = ((r >> 4) as u16 % 8, (r >> 32) as u16 % (SIZE + 4));
            guest.driver.set_desc(i, Desc { addr, len, flags, next: link });
        }
        for _ in 0..SIZE {
            guest.driver.offer_untracked(next() as u16 % (SIZE + 2));
        }
        guest.driver.force_kick();
        eventually("the garbage to be taken", || taken(&host) == before + u64::from(SIZE));
        guest.vmm.reset();
        guest.driver.reset(OPTIONS);
        guest.start();
        guest.vmm.wait_live(1);
        assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    }
    guest.power_off();
}

/// Shows that a guest that offers heads again before they are answered has at most one request per
/// descriptor of its ring in flight.
#[test]
fn guest_that_adds_without_waiting_is_bounded() {
    let host = Host::new();
    let mut guest = host.boot_with(OPTIONS);
    host.gate.hold();
    let heads: Vec<u16> = (0..SIZE).collect();
    for &head in &heads {
        let [request, reply] = guest.driver.flush_buffers(head);
        let at = SCRATCH + u64::from(head) * 32;
        guest.driver.set_desc_in(at, 0, Desc { next: 1, ..request });
        guest.driver.set_desc_in(at, 1, reply);
        guest.driver.set_desc(head, Desc { addr: at, len: 32, flags: INDIRECT, next: 0 });
    }
    let size = u64::from(SIZE);
    // Each head is offered twice, the second time while it is in flight.
    for _ in 0..2 {
        heads.iter().for_each(|&head| guest.driver.offer_untracked(head));
        guest.driver.force_kick();
        eventually("the ring to be taken", || host.pmem.counters().flushes == size);
        host.gate.wait_begun(1);
    }
    for _ in 0..100 {
        guest.driver.force_kick();
        guest.vmm.get_config();
    }
    assert_eq!(host.pmem.counters().flushes, size);
    host.gate.open();
    eventually("all answers", || guest.driver.used_idx() == 2 * SIZE);
    assert_eq!(host.pmem.counters().flushes, 2 * size);
    guest.vmm.reboot(&mut guest.driver);
    assert_eq!(guest.driver.flush_and_wait(), Answer::OK);
    guest.power_off();
}
