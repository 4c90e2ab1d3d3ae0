// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of `vhost-user-dax pmem`.

use std::path::PathBuf;

use clap::Args;

use vhost_user_dax::pmem::{PmemFileSpec, PmemSize};
use vhost_user_dax::session::config::PmemConfig;

use super::{Common, OnOff};

/// Serve a host file to one VM as persistent memory (virtio-pmem)
///
/// The guest has the file as the block device /dev/pmem0. A file system on it that is mounted with
/// `-o dax` lets the guest's programs load and store in the host's page cache directly. An fsync in
/// the guest returns after an fdatasync of the file on the host.
#[derive(Args)]
#[command(after_help = EXAMPLES, override_usage = USAGE)]
pub struct PmemArgs {
    #[command(flatten)]
    pub common: Common,

    /// Host file or device-DAX node that is served; required
    ///
    /// Its size must be a multiple of 2 MiB. It must be neither the socket nor the socket's lock
    /// file (the path of the socket with .lock behind it). The daemon locks the file: one file
    /// serves one VM.
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    file: Option<PathBuf>,

    /// Size of the file, a multiple of 2 MiB: creates a missing file, checks an existing one
    ///
    /// A size is a number and a unit: 512M, 1G, 1T, in powers of 1024. A new file gets all its disk
    /// blocks at once. A file whose creation was interrupted is 1 byte short, and is refused.
    /// Without --size the file must exist.
    #[arg(long, value_name = "SIZE")]
    size: Option<PmemSize>,

    /// Create the file without disk blocks, and accept holes in an existing file without a warning
    ///
    /// A store of the guest to a hole needs a block. If the disk is full, that store is a SIGBUS in
    /// QEMU, and the VM is lost. Without --sparse a new file has no holes, and an existing file
    /// with holes is served with a warning.
    #[arg(long)]
    sparse: bool,

    /// Protocol feature CONFIGURE_MEM_SLOTS: the front-end sends its memory table region by region
    ///
    /// In a VM that also has an fs device, pauses work with `on` for both devices; start QEMU with
    /// `-action reboot=shutdown` then. docs/front-ends.md has a table of what each value survives.
    #[arg(long, value_name = "on|off", default_value = "off")]
    mem_slots: OnOff,
}

const USAGE: &str = "vhost-user-dax pmem --socket-path <PATH> --file <PATH> [OPTIONS]";

const EXAMPLES: &str = "\
Example:
  vhost-user-dax pmem --socket-path /run/pmem0.sock --file /srv/pmem0.img --size 1G &
  qemu-system-x86_64 ... \\
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/run/pmem0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16
  guest# modprobe -a virtio_pmem nd_pmem
  guest# mkfs.ext4 -b 4096 /dev/pmem0 && mount -o dax /dev/pmem0 /mnt

QEMU must be 11.1 or newer, and Linux in the guest 6.9 or newer.
Exit codes: 0 the VM has ended, or SIGTERM or SIGINT came; 1 the session failed, or the system
refused a thread or a system call at start; 2 a bad option.";

/// `{"type": ...}` of QEMU's back-end program conventions (docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{"type": "pmem", "features": []}"#;

impl PmemArgs {
    /// None if a required option is missing; clap has refused such a command line before.
    pub fn config(self) -> Option<PmemConfig> {
        let socket = self.common.socket()?;
        let file = PmemFileSpec { path: self.file?, size: self.size, sparse: self.sparse };
        let mem_slots = self.mem_slots == OnOff::On;
        Some(PmemConfig {
            socket,
            file,
            persist: self.common.persist.into(),
            mem_slots,
            sandbox: (&self.common.sandbox).into(),
            keep_listening: self.common.keep_listening,
        })
    }
}
