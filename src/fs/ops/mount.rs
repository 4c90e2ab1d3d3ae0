// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! INIT and DESTROY: FUSE options, and dropping the state of the last mount.

use std::io;
use std::sync::atomic::Ordering;

use log::{info, warn};
use nix::errno::Errno;
use virtiofsd::filesystem::FileSystem;
use virtiofsd::fuse::{self, FsOptions};

use crate::fs::dax::{Dax, MAP_ALIGNMENT_LOG2};
use crate::fs::lives::Life;
use crate::fs::message::{Args, MAX_DATA_BYTES, Reply};
use crate::fs::server::Server;

/// FUSE_MAP_ALIGNMENT and FUSE_HAS_INODE_DAX.
const MAP_ALIGNMENT: u64 = 1 << 26;
const HAS_INODE_DAX: u64 = 1 << 33;

/// Options that the daemon supports whatever the file system wants: those of virtiofsd.
const SUPPORTED: [FsOptions; 12] = [
    FsOptions::ASYNC_READ,
    FsOptions::PARALLEL_DIROPS,
    FsOptions::BIG_WRITES,
    FsOptions::AUTO_INVAL_DATA,
    FsOptions::ASYNC_DIO,
    FsOptions::HAS_IOCTL_DIR,
    FsOptions::ATOMIC_O_TRUNC,
    FsOptions::MAX_PAGES,
    FsOptions::SUBMOUNTS,
    FsOptions::INIT_EXT,
    FsOptions::CREATE_SUPP_GROUP,
    FsOptions::ALLOW_IDMAP,
];

impl<F> Server<F>
where
    F: FileSystem<Inode = u64, Handle = u64> + Send + Sync,
{
    pub(super) fn init(&self, life: Life, args: &mut Args<'_>) -> io::Result<Reply> {
        let asked: fuse::InitInCompat = args.take()?;
        let mut capable = u64::from(asked.flags);
        if capable & FsOptions::INIT_EXT.bits() != 0 {
            capable |= u64::from(args.take::<fuse::InitInExt>()?.flags2) << 32;
        }
        let mut out = fuse::InitOut {
            major: fuse::KERNEL_VERSION,
            minor: fuse::KERNEL_MINOR_VERSION,
            ..fuse::InitOut::default()
        };
        if asked.major > fuse::KERNEL_VERSION {
            return Ok(Reply::object(out)); // The guest sends INIT again, with this version.
        }
        if asked.major < fuse::KERNEL_VERSION || asked.minor < fuse::MIN_KERNEL_MINOR_VERSION {
            warn!("the guest's FUSE {}.{} is too old", asked.major, asked.minor);
            return Err(Errno::EPROTO.into());
        }
        // A guest that was reset, or that is hostile, may have left grants and open files.
        let life = self.forget_guest(life).ok_or(Errno::EIO)?;
        let dax_options = self.dax_options();
        // Without this option virtiofsd's code writes a warning to stderr by itself. A guest that
        // did not enable it gets no submounts: see `without_submounts`.
        let mut offered = FsOptions::from_bits_truncate(capable) | FsOptions::SUBMOUNTS;
        if capable & dax_options != 0 {
            // With a writeback cache the guest keeps mtime itself and ignores the daemon's: it
            // would never see the mtime of its stores through the window.
            offered.remove(FsOptions::WRITEBACK_CACHE);
        }
        // An INIT of an ended life may still run. It must not run in the file system together with
        // this one.
        let wanted = self.lives.while_current(life, || self.fs.init(offered));
        let wanted = wanted.ok_or(Errno::EIO)??;
        let supported = SUPPORTED.iter().fold(wanted.bits(), |all, one| all | one.bits());
        let enabled = capable & (supported | dax_options);
        let dax = enabled & (MAP_ALIGNMENT | HAS_INODE_DAX);
        if let Some(window) = &self.dax {
            window.agree(dax_options != 0, enabled & HAS_INODE_DAX != 0);
        }
        self.options.store(enabled, Ordering::Relaxed);
        self.lives.mount(life);
        info!("mounted; the guest {}", if dax != 0 { "may map files" } else { "maps no files" });
        out.max_readahead = asked.max_readahead;
        (out.flags, out.flags2) = (enabled as u32, (enabled >> 32) as u32);
        (out.max_background, out.congestion_threshold) = (u16::MAX, u16::MAX / 4 * 3);
        out.max_write = MAX_DATA_BYTES;
        out.max_pages = (MAX_DATA_BYTES / 4096) as u16;
        out.time_gran = 1;
        out.map_alignment = if dax == 0 { 0 } else { MAP_ALIGNMENT_LOG2 };
        Ok(Reply::object(out))
    }

    fn dax_options(&self) -> u64 {
        let can_map = self.dax.as_deref().is_some_and(Dax::can_map);
        if can_map { MAP_ALIGNMENT | HAS_INODE_DAX } else { 0 }
    }

    /// Drops what the guest has mounted and opened in `life`, and ends `life`. Returns the next
    /// life. None if `life` had ended before; nothing is dropped then.
    fn forget_guest(&self, life: Life) -> Option<Life> {
        let life = self.lives.unmount(life)?;
        if let Some(dax) = &self.dax {
            // Waits for a disk, possibly longer than this driver's life.
            dax.release_all(|| self.lives.is_current(life));
        }
        self.lives.while_current(life, || {
            if let Some(dax) = &self.dax {
                dax.clear_nodes();
            }
            self.opened.clear();
            self.fs.destroy();
            self.inodes.clear();
            self.descriptors.guest_has_none();
        });
        Some(life)
    }

    /// Calls `undo` if `life` has ended since a request of `life` created state for the guest. The
    /// end of a life drops only what was created before it, so the request itself must undo the
    /// rest.
    ///
    /// # Errors
    /// EIO if `life` has ended.
    pub(super) fn unless_over(&self, life: Life, undo: impl FnOnce()) -> io::Result<()> {
        if self.lives.is_mounted(life) {
            return Ok(());
        }
        undo();
        Err(Errno::EIO.into())
    }

    pub(super) fn destroy(&self, life: Life) -> io::Result<Reply> {
        if self.forget_guest(life).is_some() {
            info!("unmounted");
        }
        Reply::DONE
    }
}
