// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's command line: the machine, its devices, and their PCI slots.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::disk::Disk;
use crate::images::Images;
use crate::share::Share;

/// The PCI slot of the first disk; the other disks follow.
pub const FIRST_DISK: usize = 0x10;
/// The PCI slot of the first share; the other shares follow.
pub const FIRST_SHARE: usize = 0x18;

/// The devices with a daemon of their own.
pub struct Parts<'a> {
    pub disks: &'a [&'a Disk],
    pub shares: &'a [Share],
}

/// Kernel parameters for an emulated processor. tsc=reliable: on a busy host the kernel's clock
/// watchdog marks QEMU's TSC as unstable and patches running code; under TCG with two processors
/// this once ended in an invalid opcode in `sched_clock_idle_wakeup_event`. mitigations=off: TCG does
/// not speculate, and retpolines cost time. no_timer_check: a busy host delivers timer interrupts
/// late; the kernel once panicked with "IO-APIC + timer doesn't work!".
const UNDER_TCG: &str = "tsc=reliable no_timer_check mitigations=off";

/// How a VM differs from the default one.
#[derive(Default)]
pub struct Options<'a> {
    /// Arguments of strace for the daemon of each disk; empty: the daemons run without strace.
    pub strace: &'a [&'a str],
    pub kernel: Option<PathBuf>,
    /// Whether the VM has the disk with the test programs even if it has no shares.
    pub tools: bool,
    /// A file that the guest sees as an ordinary virtio-blk disk.
    pub scratch: Option<PathBuf>,
    /// Additional arguments for QEMU.
    pub qemu: Vec<String>,
    /// Whether devices can be unplugged. Each device is then behind a root port of its own, on bus
    /// 01, 02, ..., disks first.
    pub hotplug: bool,
}

pub fn qemu_command(
    images: &Images,
    folder: &Path,
    parts: &Parts<'_>,
    options: &Options<'_>,
) -> Command {
    let path = |name: &str| folder.join(name).display().to_string();
    let kernel = options.kernel.clone().unwrap_or_else(|| images.kernel());
    let mut command = Command::new(images.qemu());
    command
        .args(["-accel", &std::env::var("VUD_ACCEL").unwrap_or_else(|_| "tcg".into())])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35"])
        // Without RDRAND the guest's entropy pool needs minutes, and mkfs waits for it.
        .args(["-cpu", "qemu64,+rdrand", "-smp", "2", "-m", "512M"])
        .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
        .args(["-numa", "node,memdev=mem"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(images.initramfs())
        .args(["-append", &format!("console=ttyS0 quiet oops=panic panic=-1 {UNDER_TCG}")])
        .args(["-serial", &format!("file:{}", path("console"))])
        .args(["-chardev", &format!("socket,id=agent,path={}", path("agent"))])
        .args(["-serial", "chardev:agent"])
        .args(["-qmp", &format!("unix:{},server=off", path("qmp"))])
        // A guest that panics resets the machine; with this option QEMU ends then, and the test
        // fails.
        .args(["-action", "reboot=shutdown"]);
    for (index, (device, slot)) in devices(parts).into_iter().enumerate() {
        if options.hotplug {
            // The firmware puts devices behind root ports at the end of the physical address space.
            // With 40 address bits that range overlaps AMD's HyperTransport hole, and the guest
            // kernel finds no other place for a window.
            command.args(["-cpu", "qemu64,+rdrand,phys-bits=42"]);
            command.args(["-device", &port(index)]);
        }
        let place = if options.hotplug { behind_port(index) } else { format!("addr=0x{slot:02x}") };
        command.args(["-chardev", &chardev(&path(&format!("vhost-{index}")), index)]);
        command.args(["-device", &format!("{device},chardev=vhost{index},{place}")]);
    }
    if let Some(tools) = images.tools().filter(|_| options.tools || !parts.shares.is_empty()) {
        add_drive(&mut command, "tools", &tools, true);
    }
    if let Some(scratch) = &options.scratch {
        add_drive(&mut command, "scratch", scratch, false);
    }
    command.args(&options.qemu);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// The `-device` argument for each daemon, and its PCI slot.
pub fn devices(parts: &Parts<'_>) -> Vec<(String, usize)> {
    let pmem = "vhost-user-test-device-pci,virtio-id=27,num_vqs=1,vq_size=128,config_size=16";
    let disks = (0..parts.disks.len()).map(|index| (pmem.to_owned(), FIRST_DISK + index));
    let shares = parts.shares.iter().zip(FIRST_SHARE..).map(|(share, slot)| (share.device(), slot));
    disks.chain(shares).collect()
}

fn chardev(socket: &str, index: usize) -> String {
    format!("socket,id=vhost{index},path={socket}")
}

/// The root port reserves address space for the largest window of the tests.
fn port(index: usize) -> String {
    let chassis = index + 1;
    format!(
        "pcie-root-port,id=port{index},chassis={chassis},addr=0x{:02x},pref64-reserve=512M",
        FIRST_DISK + index
    )
}

/// The bus of a device behind a root port, and the id by which it is unplugged.
fn behind_port(index: usize) -> String {
    format!("bus=port{index},id=dev{index}")
}

/// Adds a virtio-blk disk. Its serial number is `name`, by which the guest finds it.
fn add_drive(command: &mut Command, name: &str, file: &Path, read_only: bool) {
    let read_only = if read_only { "on" } else { "off" };
    let file = file.display();
    command.args([
        "-drive",
        &format!("if=none,id={name},format=raw,file={file},readonly={read_only},file.locking=off"),
    ]);
    command.args(["-device", &format!("virtio-blk-pci,drive={name},serial={name}")]);
}
