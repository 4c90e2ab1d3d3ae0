// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hears of it when somebody on the host, or the daemon of another VM, changes the length of a file
//! that is in the window.
//!
//! Such a change reaches the guest late: it believes what it knows for a second or longer. Until
//! then it may touch a page behind the new end, and the VMM would die of it. So the window lets go
//! of these pages at once. (What is left is the moment between the change and our hearing of it.)

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};
use std::thread::Builder;

use log::warn;
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::dax::engine::{Engine, Space};
use crate::support::lock::{Mutex, MutexGuard, lock};

#[derive(Default)]
struct Watched {
    /// By the kernel's number, which is the file's: who watches it last, and for which space.
    files: HashMap<WatchDescriptor, (u64, Weak<Space>)>,
    added: u64,
}

struct Shared {
    inotify: Inotify,
    watched: Mutex<Watched>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        lock(&self.watched)
    }
}

/// The files that are watched for one engine.
pub(crate) struct Watch {
    shared: Arc<Shared>,
}

/// One file that is watched, until this is dropped.
pub(crate) struct Watching {
    shared: Arc<Shared>,
    descriptor: WatchDescriptor,
    number: u64,
}

impl Watch {
    /// # Errors
    /// The system's, with what to do about it.
    pub(crate) fn new(engine: Arc<Engine>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(no_instance)?;
        let shared = Arc::new(Shared { inotify, watched: Mutex::default() });
        let theirs = shared.clone();
        // It ends with the process: there is one for each device, and nothing to be had of ending
        // it.
        Builder::new().name("watch".into()).spawn(move || listen(&theirs, &engine))?;
        Ok(Self { shared })
    }

    /// Watches `file`, which is `space`'s.
    ///
    /// # Errors
    /// The system's: its watches may be used up (fs.inotify.max_user_watches).
    pub(crate) fn add(&self, file: &File, space: &Arc<Space>) -> io::Result<Watching> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // Under the lock: an event may come before the next line.
        let mut watched = self.shared.lock();
        let descriptor = self.shared.inotify.add_watch(&*path, AddWatchFlags::IN_MODIFY)?;
        watched.added += 1;
        let number = watched.added;
        watched.files.insert(descriptor, (number, Arc::downgrade(space)));
        drop(watched);
        Ok(Watching { shared: self.shared.clone(), descriptor, number })
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut watched = self.shared.lock();
        // The same file may be watched anew already.
        if watched.files.get(&self.descriptor).is_some_and(|(number, _)| *number == self.number) {
            watched.files.remove(&self.descriptor);
            let _ = self.shared.inotify.rm_watch(self.descriptor);
        }
    }
}

/// The number of inotify instances of a user is limited; the text of EMFILE does not mention them.
fn no_instance(errno: Errno) -> io::Error {
    let advice = match errno {
        Errno::EMFILE => {
            "this user's inotify instances are used up: raise the sysctl fs.inotify.max_user_instances, or \
             go without a window (--window-size 0)"
        }
        _ => "inotify can't be used, and no window can do without: take --window-size 0",
    };
    io::Error::other(format!("{advice} ({errno})"))
}

fn listen(shared: &Shared, engine: &Engine) {
    loop {
        let events = match shared.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EINTR) => continue,
            Err(e) => return warn!("files are not watched any more: {e}"),
        };
        for event in events {
            let space = shared.lock().files.get(&event.wd).and_then(|(_, space)| space.upgrade());
            if let Some(space) = space {
                look(engine, &space);
            }
            if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                look_at_all(shared, engine);
            }
        }
    }
}

/// Events were lost.
fn look_at_all(shared: &Shared, engine: &Engine) {
    let all: Vec<_> =
        shared.lock().files.values().filter_map(|(_, space)| space.upgrade()).collect();
    all.iter().for_each(|space| look(engine, space));
}

fn look(engine: &Engine, space: &Arc<Space>) {
    if let Err(e) = engine.look_again(space) {
        warn!("a file has changed its length, and the window can't follow: {e}");
    }
}
