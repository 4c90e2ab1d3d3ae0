// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line of `vhost-user-dax pmem`.

use std::path::PathBuf;

use clap::Args;

use vhost_user_dax::pmem::{PmemFileSpec, PmemSize};
use vhost_user_dax::session::config::PmemConfig;

use super::{Common, OnOff};

/// Serve a host file to one VM as persistent memory (virtio-pmem).
///
/// The guest gets /dev/pmem0: make a file system on it, mount it with '-o dax', and programs in
/// the guest load and store in the host's page cache directly. An fsync in the guest is an
/// fdatasync of the file on the host.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct PmemArgs {
    #[command(flatten)]
    pub common: Common,

    /// The file to serve, or a device-DAX node (/dev/dax0.0); its size must be a multiple of 2 MiB
    #[arg(long, value_name = "PATH", required_unless_present = "print_capabilities")]
    file: Option<PathBuf>,

    /// Create the file with this size if it is missing, else check that it has this size
    #[arg(long, value_name = "SIZE")]
    size: Option<PmemSize>,

    /// Leave holes in a new file, and accept them in an old one; a full disk then kills the VM
    #[arg(long)]
    sparse: bool,

    /// Let the front-end send its memory table piece by piece: 'on' in a VM that has an fs device,
    /// too
    #[arg(long, value_name = "on|off", default_value = "off")]
    mem_slots: OnOff,
}

const EXAMPLES: &str = "\
Example:
  vhost-user-dax pmem --socket-path /run/pmem0.sock --file /srv/pmem0.img --size 1G &
  qemu-system-x86_64 ... \\
    -object memory-backend-memfd,id=mem,size=2G,share=on -numa node,memdev=mem \\
    -chardev socket,id=c0,path=/run/pmem0.sock \\
    -device vhost-user-test-device-pci,chardev=c0,virtio-id=27,num_vqs=1,vq_size=128,config_size=16
  guest# mkfs.ext4 -b 4096 /dev/pmem0 && mount -o dax /dev/pmem0 /mnt

QEMU must be 11.1 or newer.
Exit codes: 0 the VM has gone, or SIGTERM or SIGINT came; 1 a session or the start failed;
2 a bad option.";

/// `{"type": ...}` of QEMU's back-end program conventions (docs/interop/vhost-user.json).
pub const CAPABILITIES: &str = r#"{"type": "pmem", "features": []}"#;

impl PmemArgs {
    /// None if something is missing that clap asks for.
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
