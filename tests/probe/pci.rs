// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A minimal virtio-pci driver: it finds the device's registers and its window, starts the device
//! with one empty ring, and resets it. Virtio 1.2, section 4.1.

use crate::qemu::{ProbeError, Qemu, Res};

/// Addresses for BARs, far above the small RAM. No firmware runs, so nothing else is there.
const BARS_32_BIT: u64 = 0xc000_0000;
const BARS_64_BIT: u64 = 0x10_0000_0000;
/// Distance between the 32-bit BARs of two devices, in bytes.
const STRIDE: u64 = 0x1000_0000;

/// Address of the rings, in RAM.
const RING: u64 = 0x10_0000;
const RING_SIZE: u64 = 128;

const COMMAND: u64 = 4;
const COMMAND_MEMORY_AND_MASTER: u64 = 6;
const CAPABILITIES: u64 = 0x34;
const CAPABILITY_VENDOR: u64 = 9;
const CFG_COMMON: u64 = 1;
const CFG_SHARED_MEMORY: u64 = 8;

/// Fields of virtio_pci_common_cfg.
mod common {
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DEVICE_STATUS: u64 = 20;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_DESC: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

const ACKNOWLEDGE: u64 = 1;
const DRIVER: u64 = 2;
const DRIVER_OK: u64 = 4;
const FEATURES_OK: u64 = 8;

#[derive(Clone)]
pub struct Driver {
    slot: u64,
    index: u64,
    common: u64,
    window: u64,
    ring: u64,
}

impl Driver {
    /// Finds the device in a PCI slot; `index` is the device's number, which selects its addresses.
    pub fn find(qemu: &mut Qemu, slot: u64, index: u64) -> Res<Self> {
        let ring = RING + index * 0x1_0000;
        let mut driver = Self { slot, index, common: 0, window: 0, ring };
        driver.set_up(qemu)?;
        Ok(driver)
    }

    /// Sets the BARs' addresses, as firmware does after each reset of the machine.
    pub fn set_up(&mut self, qemu: &mut Qemu) -> Res<()> {
        let bars = self.place_bars(qemu)?;
        self.config_write(qemu, COMMAND, 2, COMMAND_MEMORY_AND_MASTER)?;
        let mut at = self.config_read(qemu, CAPABILITIES, 1)?;
        while at != 0 {
            if self.config_read(qemu, at, 1)? == CAPABILITY_VENDOR {
                let bar = self.config_read(qemu, at + 4, 1)? as usize;
                let address =
                    bars.get(bar).copied().unwrap_or(0) + self.config_read(qemu, at + 8, 4)?;
                match self.config_read(qemu, at + 3, 1)? {
                    CFG_COMMON => self.common = address,
                    CFG_SHARED_MEMORY if self.window == 0 => self.window = address,
                    _ => {}
                }
            }
            at = self.config_read(qemu, at + 1, 1)?;
        }
        match (self.common, self.window) {
            (0, _) => Err(ProbeError::Other("no virtio device in the slot".into())),
            (_, 0) => Err(ProbeError::Other("the device has no shared memory region".into())),
            _ => Ok(()),
        }
    }

    fn place_bars(&self, qemu: &mut Qemu) -> Res<Vec<u64>> {
        let mut next_32 = BARS_32_BIT + self.index * STRIDE;
        let next_64 = BARS_64_BIT * (1 + self.index);
        let mut bars = vec![0; 6];
        let mut bar = 0;
        while bar < 6 {
            let register = 0x10 + 4 * bar as u64;
            self.config_write(qemu, register, 4, 0xffff_ffff)?;
            let mask = self.config_read(qemu, register, 4)?;
            let wide = mask & 6 == 4;
            if mask == 0 {
            } else if wide {
                // A 64-bit BAR can be large, so each gets a range of its own; 32-bit BARs are
                // small.
                bars[bar] = next_64 + BARS_64_BIT / 4 * bar as u64 / 2;
                self.config_write(qemu, register, 4, bars[bar] & 0xffff_ffff)?;
                self.config_write(qemu, register + 4, 4, bars[bar] >> 32)?;
            } else {
                bars[bar] = next_32;
                next_32 += 0x10_0000;
                self.config_write(qemu, register, 4, bars[bar])?;
            }
            bar += if wide { 2 } else { 1 };
        }
        Ok(bars)
    }

    fn select(&self, qemu: &mut Qemu, register: u64) -> Res<()> {
        let address = 0x8000_0000 | self.slot << 11 | register & !3;
        qemu.qtest(&format!("outl 0xcf8 {address:#x}")).map(|_| ())
    }

    fn config_read(&self, qemu: &mut Qemu, register: u64, bytes: u64) -> Res<u64> {
        self.select(qemu, register)?;
        let word = qemu.qtest_number("inl 0xcfc")? >> (8 * (register & 3));
        Ok(word & (u64::MAX >> (64 - 8 * bytes)))
    }

    fn config_write(&self, qemu: &mut Qemu, register: u64, bytes: u64, value: u64) -> Res<()> {
        self.select(qemu, register)?;
        let out = if bytes == 2 { "outw" } else { "outl" };
        let port = 0xcfc + (register & 3);
        qemu.qtest(&format!("{out} {port:#x} {value:#x}")).map(|_| ())
    }

    fn write(&self, qemu: &mut Qemu, field: u64, bytes: u64, value: u64) -> Res<()> {
        let address = self.common + field;
        let letter = match bytes {
            1 => 'b',
            2 => 'w',
            _ => 'l',
        };
        qemu.qtest(&format!("write{letter} {address:#x} {value:#x}")).map(|_| ())
    }

    fn write_u64(&self, qemu: &mut Qemu, field: u64, value: u64) -> Res<()> {
        self.write(qemu, field, 4, value & 0xffff_ffff)?;
        self.write(qemu, field + 4, 4, value >> 32)
    }

    fn set_status(&self, qemu: &mut Qemu, status: u64) -> Res<()> {
        self.write(qemu, common::DEVICE_STATUS, 1, status)
    }

    /// Initializes the device as a driver does, up to DRIVER_OK.
    pub fn start(&self, qemu: &mut Qemu) -> Res<()> {
        self.set_status(qemu, 0)?;
        self.set_status(qemu, ACKNOWLEDGE | DRIVER)?;
        self.write(qemu, common::DEVICE_FEATURE_SELECT, 4, 0)?;
        let offered =
            qemu.qtest_number(&format!("readl {:#x}", self.common + common::DEVICE_FEATURE))?;
        // Of the low feature bits only the device's own bit 0, and of the high ones
        // VIRTIO_F_VERSION_1.
        for (select, features) in [(0, offered & 1), (1, 1)] {
            self.write(qemu, common::DRIVER_FEATURE_SELECT, 4, select)?;
            self.write(qemu, common::DRIVER_FEATURE, 4, features)?;
        }
        self.set_status(qemu, ACKNOWLEDGE | DRIVER | FEATURES_OK)?;
        self.write(qemu, common::QUEUE_SELECT, 2, 0)?;
        self.write(qemu, common::QUEUE_SIZE, 2, RING_SIZE)?;
        self.write_u64(qemu, common::QUEUE_DESC, self.ring)?;
        self.write_u64(qemu, common::QUEUE_DRIVER, self.ring + 0x1000)?;
        self.write_u64(qemu, common::QUEUE_DEVICE, self.ring + 0x2000)?;
        self.write(qemu, common::QUEUE_ENABLE, 2, 1)?;
        self.set_status(qemu, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    }

    /// Resets the device by writing 0 to the status (virtio reset).
    pub fn reset(&self, qemu: &mut Qemu) -> Res<()> {
        self.set_status(qemu, 0)
    }

    /// Loads one byte from the window, as a guest does.
    pub fn load(&self, qemu: &mut Qemu, offset: u64) -> Res<u8> {
        let value = qemu.qtest_number(&format!("readb {:#x}", self.window + offset))?;
        Ok((value & 0xff) as u8)
    }

    /// Stores one byte to the window, as a guest does.
    pub fn store(&self, qemu: &mut Qemu, offset: u64, byte: u8) -> Res<()> {
        qemu.qtest(&format!("writeb {:#x} {byte:#x}", self.window + offset)).map(|_| ())
    }
}
