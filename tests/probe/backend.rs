// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A back-end that answers every message, counts the messages, and sends requests at any time a row
//! asks for. It has no guest memory and serves no ring: no row needs that.

use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::AsFd;

use crate::HANG;
use crate::wire::{self, Message, Range, back_end, front_end};

/// VHOST_USER_F_PROTOCOL_FEATURES.
const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// VIRTIO_F_VERSION_1.
const F_VERSION_1: u64 = 1 << 32;

/// Protocol features: MQ, REPLY_ACK, BACKEND_REQ, CONFIG, BACKEND_SEND_FD, SHMEM.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 10 | P_SHMEM;
const P_RESET_DEVICE: u64 = 1 << 13;
const P_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
const P_SHMEM: u64 = 1 << 22;

/// Above the limit of every front-end, so that a row meets the front-end's limit.
const MAX_MEM_SLOTS: u64 = 4096;

/// Size of the window, unless a row sets another one, in bytes.
pub const WINDOW_BYTES: u64 = 64 << 20;

/// How the back-end differs from the default one.
#[derive(Clone)]
pub struct Options {
    /// Offers CONFIGURE_MEM_SLOTS.
    pub mem_slots: bool,
    /// Offers RESET_DEVICE.
    pub reset_device: bool,
    /// The sizes in the answer to GET_SHMEM_CONFIG, in bytes.
    pub windows: Vec<u64>,
}

impl Options {
    pub fn new(mem_slots: bool) -> Self {
        Self { mem_slots, reset_device: false, windows: vec![WINDOW_BYTES] }
    }
}

/// A function that runs when the next message of this kind has arrived, before it is answered.
pub struct Hook {
    pub request: u32,
    pub run: Box<dyn FnOnce(&UnixStream) + Send>,
}

#[derive(Default)]
struct State {
    /// The request numbers of the messages that have arrived, in order.
    log: Vec<u32>,
    /// Protocol features that the front-end has set.
    protocol: u64,
    channel: Option<Arc<UnixStream>>,
    hook: Option<Hook>,
    main: Option<UnixStream>,
    ended: bool,
}

struct Shared {
    options: Options,
    state: Mutex<State>,
    changed: Condvar,
}

/// The front-end's answer to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Done,
    Refused,
}

#[derive(Clone)]
pub struct Backend(Arc<Shared>);

impl Backend {
    /// Listens on `path`, and serves the first front-end that connects.
    pub fn listen(path: &Path, options: Options) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        Ok(Self::spawn(options, move || Ok(listener.accept()?.0)))
    }

    /// Connects to a front-end that listens on `path`.
    pub fn connect(path: &Path, options: Options) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        Ok(Self::spawn(options, move || Ok(stream)))
    }

    fn spawn(
        options: Options,
        connect: impl FnOnce() -> io::Result<UnixStream> + Send + 'static,
    ) -> Self {
        let shared = Shared { options, state: Mutex::default(), changed: Condvar::new() };
        let backend = Self(Arc::new(shared));
        let server = backend.clone();
        // The thread is not joined: it ends with its front-end or with the process.
        thread::spawn(move || {
            if let Ok(stream) = connect() {
                let _ = server.serve(stream);
            }
            server.change(|state| {
                state.ended = true;
                state.channel = None;
            });
        });
        backend
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.0.changed.notify_all();
    }

    fn serve(&self, mut stream: UnixStream) -> io::Result<()> {
        let main = stream.try_clone()?;
        self.change(|state| state.main = Some(main));
        loop {
            let mut message = wire::receive(&stream)?;
            let due = self.note(&mut message);
            if let Some((hook, channel)) = due {
                (hook.run)(&channel);
            }
            if let Some(payload) = self.answer(&message) {
                wire::send_reply(&mut stream, message.request, &payload)?;
            }
        }
    }

    /// Records the message, and takes the features or the descriptor in it. Returns the hook if
    /// this message triggers it.
    fn note(&self, message: &mut Message) -> Option<(Hook, Arc<UnixStream>)> {
        let mut state = self.state();
        state.log.push(message.request);
        match message.request {
            front_end::SET_PROTOCOL_FEATURES => state.protocol = message.u64_at(0),
            front_end::SET_BACKEND_REQ_FD => {
                state.channel = message.fds.pop().map(|fd| Arc::new(UnixStream::from(fd)));
            }
            _ => {}
        }
        let channel = state.channel.clone();
        let due = state.hook.take_if(|hook| hook.request == message.request);
        drop(state);
        self.0.changed.notify_all();
        due.zip(channel)
    }

    fn answer(&self, message: &Message) -> Option<Vec<u8>> {
        let number = |n: u64| Some(n.to_le_bytes().to_vec());
        match message.request {
            front_end::GET_FEATURES => number(F_VERSION_1 | F_PROTOCOL_FEATURES | 1),
            front_end::GET_PROTOCOL_FEATURES => {
                let slots = if self.0.options.mem_slots { P_CONFIGURE_MEM_SLOTS } else { 0 };
                let reset = if self.0.options.reset_device { P_RESET_DEVICE } else { 0 };
                number(PROTOCOL | reset | slots)
            }
            front_end::GET_QUEUE_NUM => number(1),
            front_end::GET_MAX_MEM_SLOTS => number(MAX_MEM_SLOTS),
            // {index, num}: the ring's position, which stays 0.
            front_end::GET_VRING_BASE => number(u64::from(message.u32_at(0))),
            // Offset, size, flags and as many bytes as the request asks for.
            front_end::GET_CONFIG => Some(message.payload.clone()),
            front_end::GET_SHMEM_CONFIG => Some(shmem_config(&self.0.options.windows)),
            _ if message.needs_reply() => number(0),
            _ => None,
        }
    }

    /// Waits until `done` returns true; false if the front-end has disconnected before.
    fn wait(&self, done: impl Fn(&State) -> bool) -> bool {
        let stop = |state: &mut State| !done(state) && !state.ended;
        let (state, _) = self.0.changed.wait_timeout_while(self.state(), HANG, stop).unwrap();
        done(&state)
    }

    /// Waits for a message of this kind; false if the front-end has disconnected without sending
    /// one.
    pub fn wait_for(&self, request: u32) -> bool {
        self.wait(|state| state.log.contains(&request))
    }

    /// The reason why this front-end can't be probed, if there is one.
    pub fn lacks(&self) -> Option<&'static str> {
        if !self.wait(|state| state.log.contains(&front_end::SET_PROTOCOL_FEATURES)) {
            return Some("it did not connect, or did not negotiate protocol features");
        }
        let protocol = self.state().protocol;
        (protocol & P_SHMEM == 0).then_some("it lacks protocol feature SHMEM (bit 22)")
    }

    /// Number of messages of this kind that have arrived.
    pub fn count(&self, request: u32) -> usize {
        self.state().log.iter().filter(|seen| **seen == request).count()
    }

    /// Number of memory updates that have arrived, of any kind.
    pub fn memory_updates(&self) -> usize {
        [front_end::SET_MEM_TABLE, front_end::ADD_MEM_REG, front_end::REM_MEM_REG]
            .iter()
            .map(|request| self.count(*request))
            .sum()
    }

    pub fn set_hook(&self, request: u32, run: impl FnOnce(&UnixStream) + Send + 'static) {
        self.change(|state| state.hook = Some(Hook { request, run: Box::new(run) }));
    }

    /// The back-end channel, for requests that this type has no method for.
    pub fn channel(&self) -> io::Result<Arc<UnixStream>> {
        self.state().channel.clone().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Sends SHMEM_MAP and waits for the answer.
    pub fn map(&self, range: Range, file: &File) -> io::Result<Answer> {
        let channel = self.channel()?;
        send_map(&channel, range, file, true)?;
        read_answer(&channel)
    }

    /// Sends SHMEM_UNMAP and waits for the answer.
    pub fn unmap(&self, range: Range) -> io::Result<Answer> {
        let channel = self.channel()?;
        wire::send_request(&channel, back_end::SHMEM_UNMAP, true, &range.payload(), None)?;
        read_answer(&channel)
    }

    /// Shuts both connections down without a message, as a killed back-end does.
    pub fn vanish(&self) {
        self.change(|state| {
            for stream in [state.main.as_ref(), state.channel.as_deref()].into_iter().flatten() {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        self.wait(|state| state.ended);
    }
}

pub fn send_map(
    channel: &UnixStream,
    range: Range,
    file: &File,
    need_reply: bool,
) -> io::Result<()> {
    wire::send_request(channel, back_end::SHMEM_MAP, need_reply, &range.payload(), Some(file))
}

pub fn read_answer(channel: &UnixStream) -> io::Result<Answer> {
    let answer = wire::receive(channel)?;
    Ok(if answer.u64_at(0) == 0 { Answer::Done } else { Answer::Refused })
}

/// Whether the channel has a message from the front-end that was not read yet.
pub fn has_answer(channel: &UnixStream) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Encodes `{nregions: u32, padding: u32, memory_sizes: [u64; 256]}`.
fn shmem_config(windows: &[u64]) -> Vec<u8> {
    let mut words = vec![windows.len() as u64];
    words.extend_from_slice(windows);
    words.resize(257, 0);
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
