// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! INIT and DESTROY: what a driver mounts, and what it leaves when it begins anew.

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

/// What we can do by ourselves, whatever the file system wants: what virtiofsd offers, too.
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
            return Ok(Reply::object(out)); // It comes back with ours.
        }
        if asked.major < fuse::KERNEL_VERSION || asked.minor < fuse::MIN_KERNEL_MINOR_VERSION {
            warn!("the guest's FUSE {}.{} is too old", asked.major, asked.minor);
            return Err(Errno::EPROTO.into());
        }
        // A guest that was reset, or is hostile, may have left grants and open files.
        let life = self.forget_guest(life).ok_or(Errno::EIO)?;
        let dax_options = self.dax_options();
        // virtiofsd's code writes to stderr by itself where a guest knows no submounts: see
        // `without_submounts`.
        let mut offered = FsOptions::from_bits_truncate(capable) | FsOptions::SUBMOUNTS;
        if capable & dax_options != 0 {
            // A guest that collects writes keeps mtime by itself, and takes none from us: those of
            // its stores through the window it would never see.
            offered.remove(FsOptions::WRITEBACK_CACHE);
        }
        // An INIT of an old driver that is still at it must not meet this one in the file system.
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
        let there = self.dax.as_deref().is_some_and(Dax::is_there);
        if there { MAP_ALIGNMENT | HAS_INODE_DAX } else { 0 }
    }

    /// Takes away what the guest has mounted in `life`. Returns the life that follows; none, and
    /// nothing is done, if `life` is over and another driver has mounted.
    fn forget_guest(&self, life: Life) -> Option<Life> {
        let life = self.lives.unmount(life)?;
        if let Some(dax) = &self.dax {
            // It may take a disk's time, and so more than the driver's.
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

    /// Undoes by `undo` what a request of `life` has just made for the guest, if `life` was over by
    /// then: nobody else would. What ends a life throws away what was made before.
    ///
    /// # Errors
    /// EIO if it was.
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
