// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! SETUPMAPPING and REMOVEMAPPING (virtio 1.4 section 5.11.6.4).

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::fuse::{self, RemovemappingOne, SetupmappingIn};

use crate::dax::engine::Space;
use crate::dax::extent::Access;
use crate::support::lock::lock;
use crate::support::units::PMD_BYTES;
use crate::window::{FileOffset, FileRange, WindowBytes, WindowOffset};

use crate::fs::dax::times::Occasion;
use crate::fs::dax::{Dax, MOST_MAPPED, guest_error};
use crate::fs::lives::Life;
use crate::fs::message::{Args, Reply, invalid};
use crate::fs::server::Server;

/// Flags of SETUPMAPPING: FUSE_SETUPMAPPING_FLAG_WRITE and FUSE_SETUPMAPPING_FLAG_READ.
const FLAG_WRITE: u64 = 1 << 0;
const FLAG_READ: u64 = 1 << 1;

/// Largest number of removals in one REMOVEMAPPING: FUSE_REMOVEMAPPING_MAX_ENTRY, one page of them.
const MAX_REMOVALS: u32 = 256;

/// Whether a file can't be mapped because the daemon can't open it for writing: a running program
/// of the host, an immutable file, or a file system that is mounted read-only.
fn is_for_readers(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ETXTBSY | libc::EPERM | libc::EACCES | libc::EROFS))
}

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(in crate::fs) fn setup_mapping(
        &self,
        life: Life,
        ctx: Context,
        nodeid: u64,
        args: &mut Args<'_>,
    ) -> io::Result<Reply> {
        let dax = self.dax.as_deref().filter(|dax| dax.can_map()).ok_or(Errno::ENOSYS)?;
        let asked: fuse::SetupmappingIn = args.take()?;
        // `fh` is always -1: the node id identifies the file.
        let is_current = || self.lives.is_mounted(life);
        let done = dax.setup(nodeid, &asked, is_current, || self.writable_file(ctx, nodeid));
        if done.as_ref().is_err_and(is_for_readers)
            && let Ok((attr, _)) = self.fs.getattr(ctx, nodeid, None)
        {
            dax.note_for_readers(attr.ino);
        }
        done.and(Reply::DONE)
    }

    pub(in crate::fs) fn remove_mapping(&self, args: &mut Args<'_>) -> io::Result<Reply> {
        let dax = self.dax.as_deref().filter(|dax| dax.can_map()).ok_or(Errno::ENOSYS)?;
        let fuse::RemovemappingIn { count } = args.take()?;
        if count > MAX_REMOVALS {
            return Err(invalid());
        }
        let removals: io::Result<Vec<_>> =
            (0..count).map(|_| args.take::<fuse::RemovemappingOne>()).collect();
        dax.remove(&removals?).and(Reply::DONE)
    }
}

impl Dax {
    /// SETUPMAPPING. `open` opens the file for reading and writing. `is_current`, which is called
    /// while no other thread can grant, returns whether the driver still has the file system
    /// mounted.
    ///
    /// # Errors
    /// EINVAL and the errno of [`guest_error`]; EAGAIN only from `open`.
    fn setup(
        &self,
        nodeid: u64,
        asked: &SetupmappingIn,
        is_current: impl Fn() -> bool,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<()> {
        let access = match asked.flags {
            FLAG_READ => Access::Read,
            flags if flags & !FLAG_READ == FLAG_WRITE => Access::Write,
            _ => return Err(invalid()),
        };
        if !asked.foffset.is_multiple_of(PMD_BYTES) || !asked.moffset.is_multiple_of(PMD_BYTES) {
            return Err(invalid());
        }
        let span = self.engine.span(WindowOffset(asked.moffset), WindowBytes(asked.len));
        let span = span.map_err(|e| guest_error(&e))?;
        let node = self.nodes.get_or_make(nodeid, open).map_err(|e| match e.raw_os_error() {
            Some(_) => e,
            None => Errno::EIO.into(),
        })?;
        lock(&self.for_readers).remove(&node.id.ino);
        if self.flags_wanted.load(Ordering::Relaxed) {
            let mut mapped = lock(&self.mapped);
            if mapped.len() < MOST_MAPPED {
                mapped.insert(nodeid);
            }
        }
        let replaced = self.engine.written_in(&[span]);
        let from = FileOffset(asked.foffset);
        let granted = self.engine.grant(&node.space, from, span, access, is_current);
        if granted.is_ok() && access == Access::Write {
            node.times.granted();
        }
        drop(node);
        self.removed(&replaced);
        // After a success, too: the grant may have replaced the last grant of another file.
        self.drop_idle();
        granted.map_err(|e| guest_error(&e))
    }

    /// REMOVEMAPPING. Checks all ranges before it removes any.
    ///
    /// # Errors
    /// The errno of [`guest_error`].
    fn remove(&self, removals: &[RemovemappingOne]) -> io::Result<()> {
        let spans: Result<Vec<_>, _> = removals
            .iter()
            .map(|one| self.engine.span(WindowOffset(one.moffset), WindowBytes(one.len)))
            .collect();
        let spans = spans.map_err(|e| guest_error(&e))?;
        let written = self.engine.written_in(&spans);
        let done = self.engine.revoke(&spans);
        self.removals.add(removals.len() as u64);
        self.removed(&written);
        self.drop_idle();
        done.map_err(|e| guest_error(&e))
    }

    /// Notes stores to ranges that were granted for writing and were revoked.
    pub(super) fn removed(&self, written: &[(Arc<Space>, FileRange)]) {
        if written.is_empty() {
            return;
        }
        let nodes = self.nodes.all();
        for (space, bytes) in written {
            if let Some(node) = nodes.iter().find(|node| Arc::ptr_eq(&node.space, space)) {
                node.times.removed(*bytes);
            }
        }
    }

    /// Settles and drops the files that no longer have a grant or a user.
    fn drop_idle(&self) {
        for node in self.nodes.idle() {
            node.times.settle(&self.engine, &node.space, Occasion::Close);
        }
        self.nodes.drop_idle();
    }
}
