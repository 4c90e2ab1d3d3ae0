// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: the mapper that sends SHMEM_MAP and SHMEM_UNMAP on the back-end channel. Knows no
//! device, only whether it is started.

mod committed;
mod extract_socket;
mod raw;

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::Builder;
use std::time::Duration;

use log::{debug, warn};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags, VhostUserSharedMsg};
use vhost::vhost_user::{Backend, Error, VhostUserFrontendReqHandler};
use vm_memory::ByteValued;

use super::channel::committed::{CommittedChannel, Request};
use super::channel::extract_socket::take_over;
use super::{FileOffset, MapError, Mapper, WindowBytes, WindowOffset};
use crate::support::lock::{Condvar, Mutex, MutexGuard, lock};

/// The id of the shared memory region: the window of virtio-pmem and of virtio-fs is region 0.
const SHMID: u8 = 0;

/// No descriptor: the kernel refuses to send it, and with it the whole message.
const NO_FD: RawFd = -1;

/// The UUID of a shared object that no device adds.
const UNKNOWN_OBJECT: &[u8; 16] = b"vhost-user-dax\0?";

/// Interval at which a request that waits for the probe of the front-end's acks checks whether the
/// device was stopped.
const GLANCE: Duration = Duration::from_millis(1);

/// Sends SHMEM_MAP (back-end message 9) and SHMEM_UNMAP (10), and waits for the acks.
pub struct ShmemMapper {
    shared: Arc<Shared>,
}

/// Whether the front-end acks back-end requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// It acks (protocol feature REPLY_ACK).
    Real,
    /// It does not ack: the library returns success for each message once it is sent.
    Missing,
    /// It can't be probed: it lacks protocol feature SHARED_OBJECT, or the channel has failed.
    Unknown,
}

/// The state that requests share with the channel thread.
struct Shared {
    /// Whether the device is started.
    started: Box<dyn Fn() -> bool + Send + Sync>,
    /// `None` until the front-end was probed. Of rank `Rank::Leaf`: held over no blocking call.
    asked: Mutex<Option<Asked>>,
    /// Notified when the probe or an order is answered, and on close.
    answered: Condvar,
    closed: AtomicBool,
}

/// The result of the probe.
#[derive(Clone)]
struct Asked {
    acks: Acks,
    route: Route,
}

/// How requests are sent.
#[derive(Clone)]
enum Route {
    /// In two parts, so that QEMU handles none for a stopped device (see `committed.rs`).
    Committed(Arc<CommittedChannel>),
    /// By the channel thread through the library, in one part. Race: the channel thread sees the
    /// device started and sends; then the front-end thread stops the device; then QEMU reads the
    /// request for a stopped device, and crashes (docs/front-ends.md Q1).
    Library(mpsc::Sender<Order>),
    /// Not at all: the channel is closed or lost.
    Lost,
}

impl Route {
    /// Closes a committed channel. The library's channel closes when the last sender of orders is
    /// dropped.
    fn close(self) {
        if let Self::Committed(channel) = self {
            channel.close();
        }
    }
}

/// A request that the channel thread sends through the library. The calling thread may stop waiting
/// for it (on close) before it is done.
struct Order {
    body: VhostUserMMap,
    /// The file of a map. None for an unmap.
    file: Option<File>,
    /// Where the channel thread sends the result.
    done: mpsc::Sender<Result<(), MapError>>,
}

impl ShmemMapper {
    /// A mapper over the back-end channel; `channel` must be the only handle to it. `started`
    /// returns whether the device is started now, and must return false before the stop is
    /// answered. A request that waits during a stop is sent after the next start. If that is wrong
    /// for the caller, its `started` must return false after the next start too.
    ///
    /// The channel thread, which this starts, probes whether the front-end acks. A map waits for
    /// the probe, so call this long before the first map. The front-end answers the probe only
    /// after the caller, the front-end thread, has answered its message (docs/front-ends.md Q3).
    /// The channel thread ends with the channel. If the front-end leaves a message unanswered, only
    /// the channel thread stays after the session's end, until the front-end closes its end.
    pub fn new(channel: Backend, started: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            started: Box::new(started),
            asked: Mutex::new(None),
            answered: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        // Moved to the thread by a queue, so that the handle is still here if the thread can't be
        // started. It can't be cloned: the thread needs the only handle.
        let (hand, over) = mpsc::channel();
        let theirs = shared.clone();
        let thread = Builder::new().name("channel".into()).spawn(move || {
            if let Ok(channel) = over.recv() {
                theirs.run(channel);
            }
        });
        match thread {
            Ok(_) => drop(hand.send(channel)),
            Err(e) => {
                warn!("no thread for the back-end channel, so no file can be mapped: {e}");
                shared.answer(Acks::Unknown, Route::Lost);
            }
        }
        Self { shared }
    }

    /// Whether the front-end acks; the library does not report that. The probe is a
    /// SHARED_OBJECT_REMOVE of an unknown object, which the front-end must refuse; QEMU does so at
    /// any time and logs nothing. Waits for the probe, also while the device is not started.
    pub fn probe_acks(&self) -> Acks {
        self.shared.wait(&|| true).map_or(Acks::Unknown, |asked| asked.acks)
    }

    /// Like [`probe_acks`](Self::probe_acks), but waits only while the device is started.
    ///
    /// # Errors
    /// [`MapError::Stopped`] if the device was stopped; [`MapError::Broken`] after
    /// [`close`](Self::close).
    pub(super) fn acks(&self) -> Result<Acks, MapError> {
        Ok(self.shared.wait(&*self.shared.started)?.acks)
    }

    /// Whether the device is started, by the session's `started`. A request is sent only then. For
    /// a thread whose request was not sent because of a stop, and which waits for the start.
    pub(crate) fn is_started(&self) -> bool {
        (self.shared.started)()
    }

    /// Closes the channel at the session's end: waiting and later requests return
    /// [`MapError::Broken`].
    pub fn close(&self) {
        self.shared.close();
    }

    fn request(
        &self,
        request: Request,
        body: &VhostUserMMap,
        file: Option<&File>,
    ) -> Result<(), MapError> {
        let started = &*self.shared.started;
        match self.shared.wait(started)?.route {
            Route::Committed(channel) => channel.request(request, body, file, started),
            Route::Library(orders) => self.shared.order(&orders, body, file),
            Route::Lost => Err(closed()),
        }
    }
}

impl Drop for ShmemMapper {
    fn drop(&mut self) {
        // The channel thread may outlive the mapper.
        self.close();
    }
}

impl Shared {
    /// The channel thread: probes the front-end, extracts the channel's socket if it can, and else
    /// sends requests through the library.
    fn run(&self, library: Backend) {
        let acks = match sort(library.shared_object_remove(&unknown_object())) {
            Ok(()) => Acks::Missing,
            Err(MapError::Refused) => Acks::Real,
            Err(_) => Acks::Unknown,
        };
        let committed = if acks == Acks::Real && !self.is_closed() && knows_shmem(&library) {
            self.commit(library)
        } else {
            debug!("maps are sent through the vhost library (acks: {acks:?})");
            Err(Some(library))
        };
        match committed {
            Ok(channel) => self.answer(acks, Route::Committed(Arc::new(channel))),
            Err(None) => self.answer(acks, Route::Lost),
            Err(Some(library)) => {
                let (orders, theirs) = mpsc::channel();
                self.answer(acks, Route::Library(orders));
                self.send(&library, theirs);
            }
        }
    }

    /// Extracts the channel's socket.
    ///
    /// # Errors
    /// The library's channel, or None if it was closed.
    fn commit(&self, library: Backend) -> Result<CommittedChannel, Option<Backend>> {
        take_over(library, &unknown_object()).map(CommittedChannel::new).map_err(|failed| {
            if !self.is_closed() {
                let why = failed.why;
                warn!(
                    "the back-end channel's socket can't be extracted from the vhost library \
                     ({why}): a stop of the device during a map may crash QEMU"
                );
            }
            failed.library
        })
    }

    fn answer(&self, acks: Acks, route: Route) {
        let mut asked = self.lock();
        // Under the lock, so that a close() by another thread either came before, and is seen here,
        // or comes later, and finds the route.
        let route = if self.is_closed() {
            route.close();
            Route::Lost
        } else {
            route
        };
        *asked = Some(Asked { acks, route });
        self.answered.notify_all();
    }

    /// Sends orders through the library, one at a time, until all senders of orders are dropped.
    fn send(&self, library: &Backend, orders: mpsc::Receiver<Order>) {
        for Order { body, file, done } in orders {
            let sent = self.send_by(library, &body, file.as_ref());
            let asked = self.lock();
            // An error: the calling thread has stopped waiting.
            let _ = done.send(sent);
            drop(asked);
            self.answered.notify_all();
        }
    }

    /// Sends one order. Checks the device's state right before the system call: a map must not
    /// reach a stopped device (docs/front-ends.md Q1), and the order may have waited for others.
    fn send_by(
        &self,
        library: &Backend,
        body: &VhostUserMMap,
        file: Option<&File>,
    ) -> Result<(), MapError> {
        if self.is_closed() {
            return Err(closed());
        }
        if !(self.started)() {
            return Err(MapError::Stopped);
        }
        sort(match file {
            Some(file) => library.shmem_map(body, file),
            None => library.shmem_unmap(body),
        })
    }

    /// Passes a request to the channel thread, and waits for its result or for the channel's close.
    fn order(
        &self,
        orders: &mpsc::Sender<Order>,
        body: &VhostUserMMap,
        file: Option<&File>,
    ) -> Result<(), MapError> {
        let file = file.map(File::try_clone).transpose().map_err(MapError::Broken)?;
        let (done, answer) = mpsc::channel();
        // An error: the channel thread has ended. Then `done` is dropped, and `answer` reports it.
        let _ = orders.send(Order { body: *body, file, done });
        let mut asked = self.lock();
        loop {
            match answer.try_recv() {
                Ok(done) => return done,
                Err(mpsc::TryRecvError::Empty) if !self.is_closed() => {}
                Err(_) => return Err(closed()),
            }
            asked = self.answered.wait(asked);
        }
    }

    /// Waits for the result of the probe, until the channel is closed or `started` returns false.
    fn wait(&self, started: &dyn Fn() -> bool) -> Result<Asked, MapError> {
        let mut asked = self.lock();
        loop {
            if self.is_closed() {
                return Err(closed());
            }
            if let Some(asked) = &*asked {
                return Ok(asked.clone());
            }
            drop(self.answered.wait_timeout(asked, GLANCE));
            // Called without the lock: no lock may be taken under a `Rank::Leaf`.
            if !started() {
                return Err(MapError::Stopped);
            }
            asked = self.lock();
        }
    }

    fn close(&self) {
        let mut asked = self.lock();
        self.closed.store(true, Ordering::Relaxed);
        if let Some(asked) = &mut *asked {
            std::mem::replace(&mut asked.route, Route::Lost).close();
        }
        self.answered.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Asked>> {
        lock(&self.asked)
    }
}

fn closed() -> MapError {
    MapError::Broken(io::Error::new(io::ErrorKind::NotConnected, "the session has ended"))
}

fn unknown_object() -> VhostUserSharedMsg {
    let mut unknown_object = VhostUserSharedMsg::default();
    unknown_object.as_mut_slice().copy_from_slice(UNKNOWN_OBJECT);
    unknown_object
}

/// Whether protocol feature SHMEM was negotiated. Sends no message: the library checks the feature
/// first, and the kernel refuses the invalid descriptor.
fn knows_shmem(library: &Backend) -> bool {
    let asked = library.shmem_map(&VhostUserMMap::default(), &NO_FD);
    !matches!(sort(asked), Err(MapError::Unsupported(_)))
}

fn message(at: WindowOffset, from: FileOffset, bytes: WindowBytes) -> VhostUserMMap {
    VhostUserMMap {
        shmid: SHMID,
        padding: [0; 7],
        fd_offset: from.0,
        shm_offset: at.0,
        len: bytes.0,
        flags: VhostUserMMapFlags::WRITABLE.bits(),
    }
}

/// The result of a library call as a [`MapError`]. The library wraps its errors in an `io::Error`;
/// its `io::Error` without one of them inside means "feature not negotiated".
fn sort(result: io::Result<u64>) -> Result<(), MapError> {
    let Err(e) = result else { return Ok(()) };
    Err(match e.get_ref().map(|inner| inner.downcast_ref::<Error>()) {
        Some(Some(Error::FrontendInternalError)) => MapError::Refused,
        Some(None) => MapError::Unsupported("protocol feature SHMEM"),
        _ => MapError::Broken(e),
    })
}

impl Mapper for ShmemMapper {
    fn map(
        &self,
        at: WindowOffset,
        file: &File,
        from: FileOffset,
        bytes: WindowBytes,
    ) -> Result<(), MapError> {
        self.request(Request::Map, &message(at, from, bytes), Some(file))
    }

    fn unmap(&self, at: WindowOffset, bytes: WindowBytes) -> Result<(), MapError> {
        self.request(Request::Unmap, &message(at, FileOffset(0), bytes), None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    use vhost::vhost_user::FrontendReqHandler;

    use super::*;

    const AT: WindowOffset = WindowOffset(0);
    const BYTES: WindowBytes = WindowBytes(4096);

    /// A front-end of the vhost library, which refuses the unknown object. Maps and unmaps are
    /// answered by `answer`.
    struct Front {
        answer: fn() -> io::Result<u64>,
        maps: AtomicUsize,
    }

    impl VhostUserFrontendReqHandler for Front {
        fn shmem_map(&self, req: &VhostUserMMap, fd: &dyn AsRawFd) -> io::Result<u64> {
            assert!(fd.as_raw_fd() >= 0 && req.len == BYTES.0);
            self.maps.fetch_add(1, Ordering::Relaxed);
            (self.answer)()
        }

        fn shmem_unmap(&self, _req: &VhostUserMMap) -> io::Result<u64> {
            (self.answer)()
        }
    }

    /// The negotiated protocol features: REPLY_ACK, SHARED_OBJECT, SHMEM.
    #[derive(Clone, Copy)]
    struct Negotiated {
        acks: bool,
        objects: bool,
        shmem: bool,
    }

    const ALL: Negotiated = Negotiated { acks: true, objects: true, shmem: true };

    /// A mapper, and its front-end, which runs in a thread.
    fn served(has: Negotiated, answer: fn() -> io::Result<u64>) -> (ShmemMapper, Arc<Front>) {
        let front = Arc::new(Front { answer, maps: AtomicUsize::new(0) });
        let mut handler = FrontendReqHandler::new(front.clone()).unwrap();
        handler.set_reply_ack_flag(has.acks);
        let ours = crate::window::channel::raw::duplicate(handler.get_tx_raw_fd()).unwrap();
        thread::spawn(move || {
            use Error::{Disconnected, PartialMessage, SocketBroken};
            // The handler keeps a duplicate of the mapper's end open, so it never sees the mapper
            // close the channel.
            while !matches!(
                handler.handle_request(),
                Err(Disconnected | PartialMessage | SocketBroken(_))
            ) {}
        });
        let channel = Backend::from_stream(UnixStream::from(ours));
        channel.set_reply_ack_flag(has.acks);
        channel.set_shared_object_flag(has.objects);
        channel.set_shmem_flag(has.shmem);
        (ShmemMapper::new(channel, || true), front)
    }

    fn map(mapper: &ShmemMapper) -> Result<(), MapError> {
        mapper.map(AT, &tempfile::tempfile().unwrap(), FileOffset(0), BYTES)
    }

    fn route(mapper: &ShmemMapper) -> Route {
        mapper.shared.wait(&|| true).unwrap().route
    }

    /// Shows: with a front-end that has all three features, requests are sent in two parts, and its
    /// acks arrive.
    #[test]
    fn requests_are_committed() {
        let (mapper, front) = served(ALL, || Ok(0));
        assert_eq!(mapper.probe_acks(), Acks::Real);
        assert!(matches!(route(&mapper), Route::Committed(_)));
        map(&mapper).unwrap();
        mapper.unmap(AT, BYTES).unwrap();
        assert_eq!(front.maps.load(Ordering::Relaxed), 1);
        let (mapper, _) = served(ALL, || Err(io::ErrorKind::Other.into()));
        assert!(matches!(map(&mapper), Err(MapError::Refused)));
    }

    /// Shows: the result of the probe and of a map for a front-end that lacks a feature. Then the
    /// socket is not extracted.
    #[test]
    fn what_a_front_end_lacks() {
        let (mapper, front) = served(Negotiated { shmem: false, ..ALL }, || Ok(0));
        assert_eq!(mapper.probe_acks(), Acks::Real);
        assert!(matches!(map(&mapper), Err(MapError::Unsupported(_))));
        assert!(matches!(mapper.unmap(AT, BYTES), Err(MapError::Unsupported(_))));
        assert_eq!(front.maps.load(Ordering::Relaxed), 0);

        let (mapper, _) = served(Negotiated { acks: false, ..ALL }, || Ok(0));
        assert_eq!(mapper.probe_acks(), Acks::Missing);
        let (mapper, _) = served(Negotiated { objects: false, ..ALL }, || Ok(0));
        assert_eq!(mapper.probe_acks(), Acks::Unknown);
        assert!(matches!(route(&mapper), Route::Library(_)));
        map(&mapper).unwrap();
    }

    /// A mapper whose front-end does not answer; the test has the front-end's end of the channel.
    fn deaf(started: bool) -> (ShmemMapper, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Backend::from_stream(ours);
        channel.set_reply_ack_flag(true);
        channel.set_shared_object_flag(true);
        channel.set_shmem_flag(true);
        (ShmemMapper::new(channel, move || started), theirs)
    }

    /// Shows: no map or unmap is sent for a stopped device (Q1).
    #[test]
    fn nothing_is_sent_to_a_stopped_device() {
        let (mapper, mut theirs) = deaf(false);
        assert!(matches!(map(&mapper), Err(MapError::Stopped)));
        assert!(matches!(mapper.unmap(AT, BYTES), Err(MapError::Stopped)));
        let mut question = [0; 28];
        theirs.read_exact(&mut question).unwrap();
        assert_eq!(question[0], 7, "SHARED_OBJECT_REMOVE");
        theirs.set_nonblocking(true).unwrap();
        assert_eq!(theirs.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    /// Shows: the channel thread checks that the device is started before it sends an order.
    #[test]
    fn the_channel_thread_checks_the_device_before_an_order() {
        let looks = Arc::new(AtomicUsize::new(0));
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Backend::from_stream(ours);
        channel.set_shmem_flag(true);
        let count = looks.clone();
        let mapper = ShmemMapper::new(channel, move || count.fetch_add(1, Ordering::Relaxed) > 0);
        assert_eq!(mapper.shared.wait(&|| true).unwrap().acks, Acks::Unknown);
        assert!(matches!(map(&mapper), Err(MapError::Stopped)));
        assert_eq!(looks.load(Ordering::Relaxed), 1);
        drop(mapper);
        assert_eq!(theirs.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    /// Shows: if the front-end never answers the probe, close() ends a waiting map.
    #[test]
    fn a_probe_without_an_answer() {
        let (mapper, _theirs) = deaf(true);
        let mapper = Arc::new(mapper);
        let waiting = mapper.clone();
        let mapping = thread::spawn(move || map(&waiting));
        mapper.close();
        assert!(matches!(mapping.join().unwrap(), Err(MapError::Broken(_))));
        assert!(matches!(map(&mapper), Err(MapError::Broken(_))));
        assert_eq!(mapper.probe_acks(), Acks::Unknown);
    }

    /// Shows: close() ends an order that is sent and never answered, and an order that waits behind
    /// it.
    #[test]
    fn an_order_without_an_answer() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let channel = Backend::from_stream(ours);
        channel.set_reply_ack_flag(true);
        channel.set_shmem_flag(true);
        let mapper = Arc::new(ShmemMapper::new(channel, || true));
        assert!(matches!(route(&mapper), Route::Library(_)));
        let ask = || {
            let mapper = mapper.clone();
            thread::spawn(move || mapper.unmap(AT, BYTES))
        };
        let sent = ask();
        // Header and body.
        theirs.read_exact(&mut [0; 52]).unwrap();
        let waits = ask();
        mapper.close();
        for asked in [sent, waits] {
            assert!(matches!(asked.join().unwrap(), Err(MapError::Broken(_))));
        }
        // After a late answer the channel thread ends, and sends no other request.
        drop(mapper);
        theirs.write_all(&[0; 20]).unwrap();
        assert_eq!(theirs.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    /// Shows: after close() maps fail, whether it came before the end of the probe or after it.
    #[test]
    fn close_before_the_answer_and_after_it() {
        for wait in [false, true] {
            let (mapper, _front) = served(ALL, || Ok(0));
            if wait {
                map(&mapper).unwrap();
            }
            mapper.close();
            assert!(matches!(map(&mapper), Err(MapError::Broken(_))));
        }
    }
}
