// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest with a virtio-fs driver: FUSE requests over its queues, well-formed as Linux sends them
//! or malformed, and its loads and stores through the window.

use vm_memory::{Bytes, GuestAddress};

use crate::fuse_abi::{self as abi, Arg, Attr, Entry, OUT_HEADER, in_header, op, u32_at, u64_at};
use crate::machine::WINDOW_ADDRESS;
use crate::memory::GuestMem;
use crate::queue::{Chain, Extern, Queue};
use crate::strict_vmm::{Ring, StrictVmm};
use crate::virtqueue::Offered;

/// The queue for FORGET and INTERRUPT.
pub const HIPRIO: usize = 0;
/// The first request queue.
pub const FIRST: usize = 1;

/// A request that was sent, and whose reply has not been read.
#[must_use]
#[derive(Debug, Clone, Copy)]
pub struct Pending {
    /// The number of its queue.
    pub queue: usize,
    offered: Offered,
    unique: u64,
}

/// The reply to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The chain was returned without a reply.
    Returned,
    /// A reply with an error: the positive errno.
    Error(i32),
    /// A success: the reply's body, as far as it lies in the request's own memory.
    Ok(Vec<u8>),
}

/// The fields of INIT's reply that tests read.
#[derive(Debug, Clone, Copy)]
pub struct InitReply {
    /// All 64 flags.
    pub flags: u64,
    /// log2 of the alignment of maps.
    pub map_alignment: u16,
    /// The largest WRITE, in bytes.
    pub max_write: u32,
}

/// A guest, and the VM in which it runs.
pub struct FsGuest<V = StrictVmm> {
    /// QEMU, or the front-end `V`. The first field, so that it is dropped first: that ends the
    /// session.
    pub vmm: V,
    /// The guest's RAM.
    pub ram: GuestMem,
    /// hiprio, then the request queues.
    pub queues: Vec<Queue>,
    /// Guest address of memory that tests may use.
    pub scratch: u64,
    /// The number of the queue for the next requests.
    pub on: usize,
    unique: u64,
}

type Result<T> = std::result::Result<T, i32>;

impl FsGuest {
    /// The guest address of window offset `at`.
    pub fn in_window(at: u64) -> u64 {
        WINDOW_ADDRESS + at
    }

    /// Starts the device, as at DRIVER_OK or QMP `cont`.
    pub fn start(&mut self) {
        let mut rings: Vec<&mut dyn Ring> =
            self.queues.iter_mut().map(|queue| queue as &mut dyn Ring).collect();
        self.vmm.start_all(&mut rings);
    }

    /// A virtio reset, and the start of a new driver without INIT.
    pub fn reset(&mut self) {
        self.vmm.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        self.start();
    }

    /// Like [`reset`](Self::reset), but enables only the ring `first`; [`enable`](Self::enable)
    /// enables further rings.
    pub fn reset_and_enable(&mut self, first: usize) {
        self.vmm.reset();
        self.queues.iter_mut().for_each(Queue::reset);
        let mut rings: Vec<&mut dyn Ring> =
            self.queues.iter_mut().map(|queue| queue as &mut dyn Ring).collect();
        self.vmm.try_set_up_all(&mut rings).unwrap();
        self.enable(first);
    }

    /// Enables a ring that has been set up.
    pub fn enable(&mut self, ring: usize) {
        self.vmm.try_enable(ring).unwrap();
    }

    /// Disconnects without a stop.
    pub fn kill(self) {
        self.vmm.kill();
    }

    /// Stops the device and disconnects, as QEMU does when it ends.
    pub fn power_off(mut self) {
        self.vmm.stop();
    }
}

impl<V> FsGuest<V> {
    /// A guest whose driver is not ready yet.
    pub fn new(vmm: V, ram: GuestMem, queues: Vec<Queue>, scratch: u64) -> Self {
        Self { vmm, ram, queues, scratch, on: FIRST, unique: 0 }
    }

    // --- requests of any kind ---

    /// Makes `chain` available on queue `queue`, unchanged.
    pub fn send_chain(&mut self, queue: usize, chain: &Chain, unique: u64) -> Pending {
        Pending { queue, offered: self.queues[queue].offer(chain), unique }
    }

    /// The `unique` of a new request.
    pub fn next_unique(&mut self) -> u64 {
        self.unique += 2;
        self.unique
    }

    /// Sends a request as Linux does: one descriptor each for the header, the argument, the reply's
    /// header, and the reply's body of at most `out` bytes.
    pub fn send(&mut self, opcode: u32, nodeid: u64, arg: &Arg, out: usize) -> Pending {
        self.send_with(opcode, nodeid, &[&arg.0], out, &[], &[])
    }

    /// Like [`send`](Self::send), with several parts of the argument, and with data in guest memory
    /// outside the slot.
    pub fn send_with(
        &mut self,
        opcode: u32,
        nodeid: u64,
        parts: &[&[u8]],
        out: usize,
        data_in: &[Extern],
        data_out: &[Extern],
    ) -> Pending {
        let unique = self.next_unique();
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let len = len as u32 + data_in.iter().map(|data| data.1).sum::<u32>();
        let mut input = vec![in_header(abi::IN_HEADER as u32 + len, opcode, unique, nodeid)];
        input.extend(parts.iter().filter(|part| !part.is_empty()).map(|part| part.to_vec()));
        let mut output = vec![OUT_HEADER];
        output.extend((out > 0).then_some(out));
        let chain =
            Chain { input, input_at: data_in.to_vec(), output, output_at: data_out.to_vec() };
        self.send_chain(self.on, &chain, unique)
    }

    /// Whether the request has been answered. Does not wait.
    pub fn is_answered(&mut self, pending: Pending) -> bool {
        self.queues[pending.queue].is_returned(pending.offered)
    }

    /// Waits until the chain is returned, and ignores its content.
    pub fn wait_returned(&mut self, pending: Pending) {
        let _ = self.queues[pending.queue].wait(pending.offered);
    }

    /// Waits for a reply and checks its form (struct fuse_out_header, and virtio 1.4 section
    /// 5.11.6.1).
    pub fn reply(&mut self, pending: Pending) -> Reply {
        let reply = self.reply_of(pending);
        reply.0
    }

    /// Like [`reply`](Self::reply), for a reply that, on success, has exactly `bytes` bytes of data
    /// outside the slot.
    pub fn reply_with_data(&mut self, pending: Pending, bytes: u32) -> Reply {
        let (reply, len) = self.reply_of(pending);
        assert!(!matches!(reply, Reply::Ok(_)) || len == OUT_HEADER as u32 + bytes, "{len}");
        reply
    }

    fn reply_of(&mut self, pending: Pending) -> (Reply, u32) {
        let back = self.queues[pending.queue].wait(pending.offered);
        assert!(!back.wrote_more, "more was written than the used length says: {}", back.len);
        if back.len == 0 {
            return (Reply::Returned, 0);
        }
        assert!(back.len as usize >= OUT_HEADER, "a reply of {} bytes", back.len);
        let len = u32_at(&back.output, 0);
        let error = u32_at(&back.output, 4) as i32;
        assert_eq!(len, back.len, "the header's length and the used length");
        assert_eq!(u64_at(&back.output, 8), pending.unique, "the reply is to another request");
        let reply = match error {
            0 => Reply::Ok(back.output[OUT_HEADER..].to_vec()),
            -4095..0 => {
                assert_eq!(len as usize, OUT_HEADER, "an error with a body");
                Reply::Error(-error)
            }
            _ => panic!("not an errno: {error}"),
        };
        (reply, len)
    }

    /// Waits for the reply to a request that must have one.
    pub fn result(&mut self, pending: Pending) -> Result<Vec<u8>> {
        match self.reply(pending) {
            Reply::Returned => panic!("a request was returned without an answer"),
            Reply::Error(errno) => Err(errno),
            Reply::Ok(body) => Ok(body),
        }
    }

    /// Sends a request and waits for its reply.
    pub fn call(&mut self, opcode: u32, nodeid: u64, arg: &Arg, out: usize) -> Result<Vec<u8>> {
        let pending = self.send(opcode, nodeid, arg, out);
        self.result(pending)
    }

    // --- well-formed requests ---

    /// INIT of a guest with DAX; it must succeed.
    pub fn init(&mut self) -> InitReply {
        self.init_with(abi::MAP_ALIGNMENT | abi::HAS_INODE_DAX)
    }

    /// INIT with `flags` beside the usual flags; it must succeed.
    pub fn init_with(&mut self, flags: u64) -> InitReply {
        let body = self.call(op::INIT, 0, &abi::init_with(flags), abi::INIT_OUT).unwrap();
        let flags = u64::from(u32_at(&body, 12)) | u64::from(u32_at(&body, 32)) << 32;
        let map_alignment = (u32_at(&body, 28) >> 16) as u16;
        InitReply { flags, map_alignment, max_write: u32_at(&body, 20) }
    }

    /// DESTROY. Linux waits for the chain, and ignores the reply.
    pub fn destroy(&mut self) {
        let pending = self.send(op::DESTROY, 0, &Arg::new(), 0);
        let reply = self.reply(pending);
        assert!(matches!(reply, Reply::Returned | Reply::Ok(_)), "{reply:?}");
    }

    /// LOOKUP
    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry> {
        let body = self.call(op::LOOKUP, parent, &Arg::new().name(name), abi::ENTRY_OUT)?;
        Ok(Entry::parse(&body))
    }

    /// LOOKUP in the root, which must succeed.
    pub fn node(&mut self, name: &str) -> u64 {
        self.lookup(abi::ROOT, name).unwrap().nodeid
    }

    /// FORGET: it has no reply, but its chain is returned.
    pub fn forget(&mut self, nodeid: u64, count: u64) {
        let unique = self.next_unique();
        let arg = Arg::new().u64s(&[count]).0;
        let input = vec![in_header(48, op::FORGET, unique, nodeid), arg];
        let chain = Chain { input, ..Chain::default() };
        let pending = self.send_chain(HIPRIO, &chain, unique);
        assert_eq!(self.reply(pending), Reply::Returned);
    }

    /// GETATTR
    pub fn getattr(&mut self, nodeid: u64) -> Result<Attr> {
        let body = self.call(op::GETATTR, nodeid, &abi::getattr(), abi::ATTR_OUT)?;
        Ok(Attr::parse(&body[16..]))
    }

    /// SETATTR of the size.
    pub fn set_size(&mut self, nodeid: u64, size: u64) -> Result<Attr> {
        let body = self.call(op::SETATTR, nodeid, &abi::set_size(size), abi::ATTR_OUT)?;
        Ok(Attr::parse(&body[16..]))
    }

    /// OPEN
    pub fn open(&mut self, nodeid: u64, flags: i32) -> Result<u64> {
        let body = self.call(op::OPEN, nodeid, &abi::open(flags), abi::OPEN_OUT)?;
        Ok(u64_at(&body, 0))
    }

    /// LOOKUP in the root and OPEN for reading and writing, which must succeed: node and handle.
    pub fn opened(&mut self, name: &str) -> (u64, u64) {
        let node = self.node(name);
        (node, self.open(node, libc::O_RDWR).unwrap())
    }

    /// CREATE in the root, for reading and writing: node and handle.
    pub fn create(&mut self, name: &str) -> Result<(u64, u64)> {
        let flags = libc::O_RDWR | libc::O_CREAT;
        let arg = abi::create(name, flags, 0o644);
        let body = self.call(op::CREATE, abi::ROOT, &arg, abi::ENTRY_OUT + abi::OPEN_OUT)?;
        Ok((Entry::parse(&body).nodeid, u64_at(&body, abi::ENTRY_OUT)))
    }

    /// READ
    pub fn read(&mut self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>> {
        self.call(op::READ, nodeid, &abi::read(fh, offset, size), size as usize)
    }

    /// WRITE; returns the number of bytes written.
    pub fn write(&mut self, nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32> {
        let arg = abi::write(fh, offset, data.len() as u32);
        let pending = self.send_with(op::WRITE, nodeid, &[&arg.0, data], 8, &[], &[]);
        Ok(u32_at(&self.result(pending)?, 0))
    }

    /// FALLOCATE
    pub fn fallocate(&mut self, nodeid: u64, fh: u64, at: u64, len: u64, mode: i32) -> Result<()> {
        self.call(op::FALLOCATE, nodeid, &abi::fallocate(fh, at, len, mode), 0).map(drop)
    }

    /// Sends FSYNC, and does not wait for its reply.
    pub fn send_fsync(&mut self, nodeid: u64, fh: u64) -> Pending {
        self.send(op::FSYNC, nodeid, &abi::fsync(fh, false), 0)
    }

    /// FSYNC
    pub fn fsync(&mut self, nodeid: u64, fh: u64) -> Result<()> {
        let pending = self.send_fsync(nodeid, fh);
        self.result(pending).map(drop)
    }

    /// FLUSH
    pub fn flush(&mut self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(op::FLUSH, nodeid, &abi::flush(fh), 0).map(drop)
    }

    /// RELEASE
    pub fn release(&mut self, nodeid: u64, fh: u64) -> Result<()> {
        self.call(op::RELEASE, nodeid, &abi::release(fh), 0).map(drop)
    }

    /// UNLINK in the root.
    pub fn unlink(&mut self, name: &str) -> Result<()> {
        self.call(op::UNLINK, abi::ROOT, &Arg::new().name(name), 0).map(drop)
    }

    /// RENAME in the root.
    pub fn rename(&mut self, old: &str, new: &str) -> Result<()> {
        self.call(op::RENAME, abi::ROOT, &abi::rename(old, abi::ROOT, new), 0).map(drop)
    }

    /// STATFS; returns f_blocks.
    pub fn statfs(&mut self) -> Result<u64> {
        Ok(u64_at(&self.call(op::STATFS, abi::ROOT, &Arg::new(), 80)?, 0))
    }

    /// Sends SYNCFS, and does not wait for its reply.
    pub fn send_syncfs(&mut self) -> Pending {
        self.send(op::SYNCFS, abi::ROOT, &Arg::new().u64s(&[0]), 0)
    }

    /// The names and node ids of the root's entries, by one READDIRPLUS.
    pub fn names(&mut self) -> Result<Vec<(String, u64)>> {
        let body = self.call(op::OPENDIR, abi::ROOT, &abi::open(0), abi::OPEN_OUT)?;
        let fh = u64_at(&body, 0);
        let mut names = Vec::new();
        let body = self.call(op::READDIRPLUS, abi::ROOT, &abi::read(fh, 0, 65536), 65536)?;
        names.extend(abi::direntplus_names(&body));
        self.call(op::RELEASEDIR, abi::ROOT, &abi::release(fh), 0)?;
        Ok(names)
    }

    /// Sends SETUPMAPPING, and does not wait for its reply.
    pub fn send_setup(&mut self, nodeid: u64, from: u64, len: u64, flags: u64, at: u64) -> Pending {
        self.send(op::SETUPMAPPING, nodeid, &abi::setupmapping(from, len, flags, at), 0)
    }

    /// SETUPMAPPING. Fails the test at EAGAIN, at which Linux would repeat the page fault for ever.
    pub fn setup(&mut self, nodeid: u64, from: u64, len: u64, flags: u64, at: u64) -> Result<()> {
        let pending = self.send_setup(nodeid, from, len, flags, at);
        let result = self.result(pending).map(drop);
        assert_ne!(result, Err(libc::EAGAIN), "SETUPMAPPING answers EAGAIN");
        result
    }

    /// REMOVEMAPPING
    pub fn remove(&mut self, ranges: &[(u64, u64)]) -> Result<()> {
        self.call(op::REMOVEMAPPING, 0, &abi::removemapping(ranges), 0).map(drop)
    }

    // --- the guest's memory ---

    /// Writes to the guest's RAM.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    }

    /// Reads the guest's RAM.
    pub fn peek(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0u8; bytes];
        self.ram.read_slice(&mut buffer, GuestAddress(at)).unwrap();
        buffer
    }
}
