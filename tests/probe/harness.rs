// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The environment of a row: one QEMU, its devices, and a back-end for each device.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::backend::{Answer, Backend, Options};
use crate::pci::Driver;
use crate::qemu::{ProbeError, Qemu, Res};
use crate::table::Found;

/// The PCI slot of the first device.
const FIRST_SLOT: u64 = 0x10;

pub struct Device {
    pub backend: Backend,
    driver: Option<Driver>,
}

impl Device {
    pub fn new(backend: Backend) -> Self {
        Self { backend, driver: None }
    }
}

/// The environment of one row. It outlives the row's function, so that the end of QEMU can be
/// examined.
pub struct Harness {
    program: PathBuf,
    folder: TempDir,
    qemu: Option<Qemu>,
    pub devices: Vec<Device>,
    /// The current step; part of the text of the result.
    pub doing: String,
}

impl Harness {
    pub fn new(program: &Path) -> Res<Self> {
        Ok(Self {
            program: program.to_owned(),
            folder: TempDir::new()?,
            qemu: None,
            devices: Vec::new(),
            doing: "at its start".into(),
        })
    }

    /// Starts QEMU with one device per element of `options`, and waits until QEMU is up. The
    /// devices are not started.
    pub fn boot(&mut self, options: &[Options]) -> Res<()> {
        self.devices.clear();
        for (index, options) in options.iter().enumerate() {
            let backend = Backend::listen(&self.path(&format!("vhost-{index}")), options.clone())?;
            self.devices.push(Device::new(backend));
        }
        let chardevs: Vec<String> = (0..options.len())
            .map(|index| format!("path={}", self.path(&format!("vhost-{index}")).display()))
            .collect();
        self.launch(&chardevs)?;
        self.greet()
    }

    /// Starts QEMU with these chardev options, one device per chardev.
    pub fn launch(&mut self, chardevs: &[String]) -> Res<()> {
        let mut arguments: Vec<String> = [
            "-machine",
            "q35",
            "-m",
            "64M",
            "-object",
            "memory-backend-memfd,id=mem,size=64M,share=on",
            "-numa",
            "node,memdev=mem",
        ]
        .map(String::from)
        .to_vec();
        for (index, chardev) in chardevs.iter().enumerate() {
            let slot = FIRST_SLOT + index as u64;
            arguments.extend([
                "-chardev".into(),
                format!("socket,id=c{index},{chardev}"),
                "-device".into(),
                format!(
                    "vhost-user-test-device-pci,chardev=c{index},virtio-id=27,num_vqs=1,\
                     vq_size=128,config_size=16,addr={slot:#x}"
                ),
            ]);
        }
        self.qemu = Some(Qemu::start(&self.program, self.folder.path(), &arguments)?);
        Ok(())
    }

    /// Waits until QEMU is up, and finds the devices' registers.
    pub fn greet(&mut self) -> Res<()> {
        let qemu = self.qemu.as_mut().ok_or_else(no_qemu)?;
        qemu.greet()?;
        for (index, device) in self.devices.iter_mut().enumerate() {
            if let Some(lacks) = device.backend.lacks() {
                return Err(ProbeError::Other(format!("this QEMU can't be probed: {lacks}")));
            }
            let index = index as u64;
            device.driver = Some(Driver::find(qemu, FIRST_SLOT + index, index)?);
        }
        Ok(())
    }

    /// Boots with one device and starts it. `mem_slots`: whether the back-end offers
    /// CONFIGURE_MEM_SLOTS.
    pub fn started(&mut self, mem_slots: bool) -> Res<Backend> {
        self.boot(&[Options::new(mem_slots)])?;
        self.start(0)?;
        Ok(self.backend(0))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file of `bytes` bytes, open for reading and writing; byte 0 is 'p', the others are 0.
    pub fn file(&self, name: &str, bytes: u64) -> Res<File> {
        let path = self.path(name);
        std::fs::write(&path, "p")?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        file.set_len(bytes)?;
        Ok(file)
    }

    pub fn backend(&self, index: usize) -> Backend {
        self.devices[index].backend.clone()
    }

    pub fn qemu(&mut self) -> Res<&mut Qemu> {
        self.qemu.as_mut().ok_or_else(no_qemu)
    }

    fn driver(&mut self, index: usize) -> Res<(&mut Qemu, &mut Driver)> {
        let driver = self.devices.get_mut(index).and_then(|device| device.driver.as_mut());
        let (Some(qemu), Some(driver)) = (self.qemu.as_mut(), driver) else {
            return Err(no_qemu());
        };
        Ok((qemu, driver))
    }

    /// Starts the device, as a driver does up to DRIVER_OK.
    pub fn start(&mut self, index: usize) -> Res<()> {
        let (qemu, driver) = self.driver(index)?;
        driver.start(qemu)
    }

    /// Resets the device (virtio reset).
    pub fn reset(&mut self, index: usize) -> Res<()> {
        let (qemu, driver) = self.driver(index)?;
        driver.reset(qemu)
    }

    pub fn load(&mut self, index: usize, offset: u64) -> Res<u8> {
        let (qemu, driver) = self.driver(index)?;
        driver.load(qemu, offset)
    }

    pub fn store(&mut self, index: usize, offset: u64, byte: u8) -> Res<()> {
        let (qemu, driver) = self.driver(index)?;
        driver.store(qemu, offset, byte)
    }

    /// Resets the machine, and gives the BARs their old addresses.
    pub fn reboot(&mut self) -> Res<()> {
        let qemu = self.qemu()?;
        qemu.qmp("system_reset", json!({}))?;
        qemu.wait_event("RESET")?;
        for index in 0..self.devices.len() {
            let (qemu, driver) = self.driver(index)?;
            driver.set_up(qemu)?;
        }
        Ok(())
    }

    /// Stops and continues the VM by QMP.
    pub fn pause(&mut self) -> Res<()> {
        let qemu = self.qemu()?;
        qemu.qmp("stop", json!({}))?;
        qemu.qmp("cont", json!({}))?;
        Ok(())
    }

    /// Sets the current step, for the text of the result.
    pub fn doing(&mut self, what: &str) {
        self.doing = what.to_owned();
    }

    /// Sends a QMP command to check that QEMU still answers.
    pub fn ping(&mut self) -> Res<()> {
        self.qemu()?.qmp("query-status", json!({})).map(|_| ())
    }

    /// Turns the answer to a map or unmap into a finding; for a refusal, with QEMU's error message.
    pub fn found(&mut self, answer: Answer) -> Res<Found> {
        // QEMU writes its error message before it answers this command.
        self.ping()?;
        if answer == Answer::Done {
            return Ok(Found::Accepted);
        }
        let qemu = self.qemu()?;
        let line = qemu.written_line("").and_then(|_| qemu.lines().pop()).unwrap_or_default();
        Ok(Found::Refused(without_name(&line).to_owned()))
    }

    /// How QEMU ended, if a broken connection shows that it did.
    pub fn death(&mut self) -> Option<Found> {
        let doing = self.doing.clone();
        let qemu = self.qemu.as_mut()?;
        let end = qemu.end_after_break()?.clone();
        // The last line of QEMU's output has the reason.
        let text = qemu.lines().pop().unwrap_or_default();
        Some(Found::Died { end, doing, text: without_name(&text).to_owned() })
    }
}

fn no_qemu() -> ProbeError {
    ProbeError::Other("QEMU is not running, or has no such device".into())
}

/// Removes the program name at the start of QEMU's error messages.
fn without_name(line: &str) -> &str {
    match line.split_once(": ") {
        Some((name, rest)) if name.contains("qemu") => rest,
        _ => line,
    }
}
