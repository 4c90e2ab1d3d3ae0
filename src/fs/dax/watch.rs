// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Watches mapped files by inotify for changes of their length by other processes on the host,
//! among them daemons of other VMs.
//!
//! The guest sees such a change late: it caches attributes, for a second or longer. Until then it
//! may access a page behind the new end of the file, which ends the VMM. So the watch thread unmaps
//! these pages at once. An access between the change and the unmap still ends the VMM.

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
    /// For each watch descriptor (the kernel has one for each file): the number of the last
    /// [`Watching`] that uses it, and the space.
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

/// The watched files of one engine.
pub(crate) struct Watch {
    shared: Arc<Shared>,
}

/// One watched file, until this is dropped.
pub(crate) struct Watching {
    shared: Arc<Shared>,
    descriptor: WatchDescriptor,
    number: u64,
}

impl Watch {
    /// Starts the watch thread.
    ///
    /// # Errors
    /// Those of inotify_init1(2), with advice, and of the thread's start.
    pub(crate) fn new(engine: Arc<Engine>) -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC).map_err(no_instance)?;
        let shared = Arc::new(Shared { inotify, watched: Mutex::default() });
        let theirs = shared.clone();
        // The thread ends with the process: a process has one device.
        Builder::new().name("watch".into()).spawn(move || listen(&theirs, &engine))?;
        Ok(Self { shared })
    }

    /// Watches `file`, whose space is `space`.
    ///
    /// # Errors
    /// ENOSPC if the user's watches are used up (fs.inotify.max_user_watches).
    pub(crate) fn add(&self, file: &File, space: &Arc<Space>) -> io::Result<Watching> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // The lock is held until the watch is in the table: the watch thread may read an event of
        // it at once.
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
        // A newer Watching of the same file may use the watch descriptor.
        if watched.files.get(&self.descriptor).is_some_and(|(number, _)| *number == self.number) {
            watched.files.remove(&self.descriptor);
            let _ = self.shared.inotify.rm_watch(self.descriptor);
        }
    }
}

/// The error of inotify_init1(2), with advice. The text of EMFILE does not name the limit of
/// inotify instances.
fn no_instance(errno: Errno) -> io::Error {
    let advice = match errno {
        Errno::EMFILE => {
            "this user's inotify instances are used up: raise the sysctl \
             fs.inotify.max_user_instances, or use --window-size 0"
        }
        _ => "inotify can't be used, which a window needs: use --window-size 0",
    };
    io::Error::other(format!("{advice} ({errno})"))
}

fn listen(shared: &Shared, engine: &Engine) {
    loop {
        let events = match shared.inotify.read_events() {
            Ok(events) => events,
            Err(Errno::EINTR) => continue,
            Err(e) => {
                return warn!(
                    "the watch thread has ended: if a file is made shorter on the host while the \
                     guest has it mapped, the VM may die: {e}"
                );
            }
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

/// Checks the length of each watched file, after a queue overflow.
fn look_at_all(shared: &Shared, engine: &Engine) {
    let all: Vec<_> =
        shared.lock().files.values().filter_map(|(_, space)| space.upgrade()).collect();
    all.iter().for_each(|space| look(engine, space));
}

fn look(engine: &Engine, space: &Arc<Space>) {
    if let Err(e) = engine.look_again(space) {
        warn!("a file's length was changed on the host, and its maps can't be adapted: {e}");
    }
}
