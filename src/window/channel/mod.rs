// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Step 5 of 6: the mapper that a front-end carries out: SHMEM_MAP and SHMEM_UNMAP on the back-end
//! channel. Knows no device, only whether it is started.

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

/// The region's id; both virtio-pmem and virtio-fs have only region 0.
const SHMID: u8 = 0;

/// No descriptor: the kernel refuses to send it, and with it the message.
const NO_FD: RawFd = -1;

/// The UUID of a shared object that nobody adds.
const UNKNOWN_OBJECT: &[u8; 16] = b"vhost-user-dax\0?";

/// How soon a request that waits for the answer to our first question sees that the device stopped.
const GLANCE: Duration = Duration::from_millis(1);

/// Sends SHMEM_MAP (back-end message 9) and SHMEM_UNMAP (10), and waits for the acks.
pub struct ShmemMapper {
    shared: Arc<Shared>,
}

/// Whether an ack from this front-end is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acks {
    /// It answers (REPLY_ACK).
    Real,
    /// It does not, and the library takes each message for done as soon as it is sent.
    Missing,
    /// It can't be asked.
    Unknown,
}

/// What is shared with the channel's thread, which asks, and may send.
struct Shared {
    started: Box<dyn Fn() -> bool + Send + Sync>,
    /// `None` until the front-end has been asked. A leaf; held for moments only.
    asked: Mutex<Option<Asked>>,
    answered: Condvar,
    closed: AtomicBool,
}

#[derive(Clone)]
struct Asked {
    acks: Acks,
    route: Route,
}

/// How a request goes.
#[derive(Clone)]
enum Route {
    /// No stop can cross it.
    Committed(Arc<CommittedChannel>),
    /// The channel's thread sends by the library, which nothing interrupts. A stop may come between
    /// that thread's last look and QEMU's reading it.
    Library(mpsc::Sender<Order>),
    /// Not at all.
    Lost,
}

impl Route {
    /// The library's channel ends with its last order.
    fn close(self) {
        if let Self::Committed(channel) = self {
            channel.close();
        }
    }
}

/// A request that the channel's thread sends: a map if there is a file. It may outlast its caller.
struct Order {
    body: VhostUserMMap,
    file: Option<File>,
    done: mpsc::Sender<Result<(), MapError>>,
}

impl ShmemMapper {
    /// A mapper over the back-end channel, of which `channel` must be the only handle. `started`
    /// says whether the device is started now; it must be false before the stop is answered. A
    /// request may outlast a stop and be made after the next start: who minds must say false then,
    /// too.
    ///
    /// In a thread of its own, the front-end is asked whether it acks; a map waits for the answer,
    /// so this is best called long before the first one. The front-end answers only when the
    /// caller, its message thread, is done (Q3). The thread ends with the channel. A front-end that
    /// leaves a message unanswered holds only that thread after the session's end, until it closes
    /// its own end.
    pub fn new(channel: Backend, started: impl Fn() -> bool + Send + Sync + 'static) -> Self {
        let shared = Arc::new(Shared {
            started: Box::new(started),
            asked: Mutex::new(None),
            answered: Condvar::new(),
            closed: AtomicBool::new(false),
        });
        // Not cloned: the thread needs the only handle.
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
                warn!("the back-end channel can't be used, so nothing is mapped: {e}");
                shared.answer(Acks::Unknown, Route::Lost);
            }
        }
        Self { shared }
    }

    /// Finds out whether the front-end answers: the library does not tell. It is asked to forget a
    /// shared object that never was, which it must refuse; QEMU does so silently, and at any time.
    /// Blocks like a map, also while the device is not started.
    pub fn probe_acks(&self) -> Acks {
        self.shared.wait(&|| true).map_or(Acks::Unknown, |asked| asked.acks)
    }

    /// The same, but only while the device is started.
    pub(super) fn acks(&self) -> Result<Acks, MapError> {
        Ok(self.shared.wait(&*self.shared.started)?.acks)
    }

    /// Whether the device is started, by the session's word. A request is sent only then: this is
    /// for a thread whose request was not sent, and that waits for the start.
    pub(crate) fn is_started(&self) -> bool {
        (self.shared.started)()
    }

    /// The session is over: whatever waits for the front-end returns [`MapError::Broken`], now and
    /// from now on.
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
        // The channel's thread may outlive us.
        self.close();
    }
}

impl Shared {
    /// The channel's thread: asks the front-end, takes the channel over if it can, and sends by the
    /// library if it can't.
    fn run(&self, library: Backend) {
        let acks = match sort(library.shared_object_remove(&unknown_object())) {
            Ok(()) => Acks::Missing,
            Err(MapError::Refused) => Acks::Real,
            Err(_) => Acks::Unknown,
        };
        let committed = if acks == Acks::Real && !self.is_closed() && knows_shmem(&library) {
            self.commit(library)
        } else {
            debug!("the library's channel is used as it is (acks: {acks:?})");
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

    /// The channel taken over; the error gives the library's channel back, unless it is lost.
    fn commit(&self, library: Backend) -> Result<CommittedChannel, Option<Backend>> {
        take_over(library, &unknown_object()).map(CommittedChannel::new).map_err(|failed| {
            if !self.is_closed() {
                let why = failed.why;
                warn!(
                    "the back-end channel's socket can't be had ({why}): a map that a stop \
                       crosses may kill QEMU"
                );
            }
            failed.library
        })
    }

    fn answer(&self, acks: Acks, route: Route) {
        let mut asked = self.lock();
        // Under the lock: a close() that comes later finds the route, one that came before is seen.
        let route = if self.is_closed() {
            route.close();
            Route::Lost
        } else {
            route
        };
        *asked = Some(Asked { acks, route });
        self.answered.notify_all();
    }

    /// Sends one order after the other, until the channel is closed.
    fn send(&self, library: &Backend, orders: mpsc::Receiver<Order>) {
        for Order { body, file, done } in orders {
            let sent = self.send_by(library, &body, file.as_ref());
            let asked = self.lock();
            // An error: the caller has gone.
            let _ = done.send(sent);
            drop(asked);
            self.answered.notify_all();
        }
    }

    /// Looks at the device's state right before the system call: a map must not reach a stopped
    /// device (Q1), and this order may have waited long for another one.
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

    /// Has the channel's thread send a request, and waits for its answer or for the channel's end.
    fn order(
        &self,
        orders: &mpsc::Sender<Order>,
        body: &VhostUserMMap,
        file: Option<&File>,
    ) -> Result<(), MapError> {
        let file = file.map(File::try_clone).transpose().map_err(MapError::Broken)?;
        let (done, answer) = mpsc::channel();
        // An error: the thread has ended, and `done` with it.
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

    /// Waits for the answer as long as it makes sense.
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
            // Not under our lock, which is a leaf.
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
    MapError::Broken(io::Error::new(io::ErrorKind::NotConnected, "the session is over"))
}

fn unknown_object() -> VhostUserSharedMsg {
    let mut unknown_object = VhostUserSharedMsg::default();
    unknown_object.as_mut_slice().copy_from_slice(UNKNOWN_OBJECT);
    unknown_object
}

/// Whether SHMEM was negotiated. Nothing is sent.
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

/// The library hides its error in an `io::Error`; one without it is its own "not negotiated".
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

    /// A front-end of the library's own make: refuses the unknown object, and answers as told.
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

    /// What was negotiated.
    #[derive(Clone, Copy)]
    struct Negotiated {
        acks: bool,
        objects: bool,
        shmem: bool,
    }

    const ALL: Negotiated = Negotiated { acks: true, objects: true, shmem: true };

    /// A mapper whose front-end is a thread.
    fn served(has: Negotiated, answer: fn() -> io::Result<u64>) -> (ShmemMapper, Arc<Front>) {
        let front = Arc::new(Front { answer, maps: AtomicUsize::new(0) });
        let mut handler = FrontendReqHandler::new(front.clone()).unwrap();
        handler.set_reply_ack_flag(has.acks);
        let ours = crate::window::channel::raw::duplicate(handler.get_tx_raw_fd()).unwrap();
        thread::spawn(move || {
            use Error::{Disconnected, PartialMessage, SocketBroken};
            // The handler keeps our end open, too: it never sees us go.
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

    /// Shows: with a front-end that can all, requests go the safe way, and its answers arrive.
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

    /// Shows: what a front-end lacks is told as before, and nothing is taken over then.
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

    fn deaf(started: bool) -> (ShmemMapper, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Backend::from_stream(ours);
        channel.set_reply_ack_flag(true);
        channel.set_shared_object_flag(true);
        channel.set_shmem_flag(true);
        (ShmemMapper::new(channel, move || started), theirs)
    }

    /// Shows: nothing of a map goes to the front-end of a stopped device (Q1).
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

    /// Shows: the same for the library's way, by a look of the thread that sends.
    #[test]
    fn the_library_looks_in_the_last_moment() {
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

    /// Shows: a front-end that never answers the question holds no map beyond the session's end.
    #[test]
    fn a_question_without_an_answer() {
        let (mapper, _theirs) = deaf(true);
        let mapper = Arc::new(mapper);
        let waiting = mapper.clone();
        let mapping = thread::spawn(move || map(&waiting));
        mapper.close();
        assert!(matches!(mapping.join().unwrap(), Err(MapError::Broken(_))));
        assert!(matches!(map(&mapper), Err(MapError::Broken(_))));
        assert_eq!(mapper.probe_acks(), Acks::Unknown);
    }

    /// Shows: the session's end returns the caller of a request by the library that is never
    /// answered, and the caller whose request waits behind it.
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
        // The answer comes too late: the channel's thread ends, and sends nothing else.
        drop(mapper);
        theirs.write_all(&[0; 20]).unwrap();
        assert_eq!(theirs.read_to_end(&mut Vec::new()).unwrap(), 0);
    }

    /// Shows: after the session's end the channel is closed, whichever of the two came first.
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
