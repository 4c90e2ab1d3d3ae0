// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A shared host directory and the daemon that serves it: ours with a DAX window, ours without one,
//! or, for comparison, Debian's virtiofsd.
//!
//! `VUD_FS_BACKEND=virtiofsd` runs virtiofsd instead of our daemon, which shows which part of a
//! test depends on DAX. `VUD_LOG_LEVEL` sets the log level of the daemons; a failing test prints
//! the log.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::daemon::binary;
use crate::disk::sha256;
use crate::images::Images;
use crate::report::CaseReport;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Ours,
    Virtiofsd,
}

#[derive(Debug, Clone)]
pub struct Share {
    dir: PathBuf,
    tag: String,
    backend: Backend,
    /// `--window-size`; `None`: the device in QEMU has no window.
    window: Option<String>,
    queues: u32,
    /// The path of another build of our daemon.
    build: Option<PathBuf>,
    args: Vec<String>,
}

impl Share {
    /// Served by our daemon, with a window of 64 MiB.
    pub fn dax(dir: &Path, tag: &str) -> Self {
        let window = Some("64M".to_owned());
        Self { window, ..Self::plain(dir, tag) }.of_environment()
    }

    /// Served by our daemon to QEMU's own vhost-user-fs device, which has no window.
    pub fn plain(dir: &Path, tag: &str) -> Self {
        Self {
            dir: dir.into(),
            tag: tag.into(),
            backend: Backend::Ours,
            window: None,
            queues: 1,
            build: None,
            args: Vec::new(),
        }
        .of_environment()
    }

    /// Served by Debian's virtiofsd.
    pub fn virtiofsd(dir: &Path, tag: &str) -> Self {
        Self { backend: Backend::Virtiofsd, window: None, ..Self::plain(dir, tag) }
    }

    fn of_environment(self) -> Self {
        match std::env::var_os("VUD_FS_BACKEND") {
            Some(name) if name == "virtiofsd" => {
                Self { backend: Backend::Virtiofsd, window: None, ..self }
            }
            _ => self,
        }
    }

    /// Sets the size of the window, if the share has one.
    pub fn window(self, size: &str) -> Self {
        Self { window: self.window.map(|_| size.into()), ..self }
    }

    /// Serves the share by another build of our daemon.
    pub fn build(self, build: &Path) -> Self {
        Self { build: Some(build.into()), ..self }
    }

    /// Sets the number of request queues. Debian's virtiofsd always has one.
    pub fn queues(self, queues: u32) -> Self {
        let queues = if self.backend == Backend::Ours { queues } else { 1 };
        Self { queues, ..self }
    }

    /// Additional arguments that both daemons know.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// Additional arguments that only our daemon knows.
    pub fn our_args(self, args: &[&str]) -> Self {
        if self.backend == Backend::Ours { self.args(args) } else { self }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn tag(&self) -> &str {
        &self.tag
    }

    pub fn has_window(&self) -> bool {
        self.window.is_some()
    }

    pub fn is_ours(&self) -> bool {
        self.backend == Backend::Ours
    }

    /// Checks that the host's files have the sizes and the SHA-256 that the guest reported.
    pub fn check_sums(&self, report: &CaseReport) {
        let sums = report.values("sum");
        assert!(!sums.is_empty(), "no sums: {report:#?}");
        for line in sums {
            let name = line.split(',').next().unwrap_or_default();
            let bytes = std::fs::read(self.path(name)).expect("read the file that the guest made");
            let host = format!("{name},{},{}", bytes.len(), sha256(&bytes));
            assert_eq!(line, host, "the file differs: guest (left), host (right)");
        }
    }

    /// The daemon's command line.
    pub fn command(&self, images: &Images, socket: &Path) -> Command {
        let mut command = match self.backend {
            Backend::Ours => {
                let mut command = Command::new(self.build.clone().unwrap_or_else(binary));
                command.arg("fs").args(["--tag", &self.tag]);
                if let Some(window) = &self.window {
                    command.args(["--window-size", window]);
                }
                if self.queues > 1 {
                    command.args(["--num-request-queues", &self.queues.to_string()]);
                }
                command
            }
            Backend::Virtiofsd => {
                let mut command = Command::new(images.virtiofsd());
                // virtiofsd's sandbox needs namespaces, which a test machine may not allow.
                command.args(["--sandbox", "none"]);
                command
            }
        };
        command.arg("--socket-path").arg(socket).arg("--shared-dir").arg(&self.dir);
        if let Some(level) = std::env::var_os("VUD_LOG_LEVEL") {
            command.arg("--log-level").arg(level);
        }
        command.args(&self.args);
        command
    }

    /// QEMU's `-device` argument without chardev and slot.
    pub fn device(&self) -> String {
        match (self.backend, &self.window) {
            (Backend::Ours, Some(_)) => format!(
                "vhost-user-test-device-pci,virtio-id=26,num_vqs={},vq_size=128,config_size=44",
                1 + self.queues
            ),
            _ => format!(
                "vhost-user-fs-pci,tag={},queue-size=1024,num-request-queues={}",
                self.tag, self.queues
            ),
        }
    }
}
