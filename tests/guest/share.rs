// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host directory that a VM shares, and the daemon that serves it: ours with a DAX window, ours
//! without one, or Debian's virtiofsd to compare with.
//!
//! `VUD_FS_BACKEND=virtiofsd` puts virtiofsd in the place of ours, which shows what of a test is
//! about DAX and what is not. `VUD_LOG_LEVEL` makes the daemons say more when a test fails.

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
    /// `--window-size`; none: the front-end has no window.
    window: Option<String>,
    queues: u32,
    /// Another build of our daemon.
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

    /// Another size of the window, if there is one.
    pub fn window(self, size: &str) -> Self {
        Self { window: self.window.map(|_| size.into()), ..self }
    }

    /// Served by another build of our daemon.
    pub fn build(self, build: &Path) -> Self {
        Self { build: Some(build.into()), ..self }
    }

    /// More request queues. Debian's virtiofsd has one whatever it is told.
    pub fn queues(self, queues: u32) -> Self {
        let queues = if self.backend == Backend::Ours { queues } else { 1 };
        Self { queues, ..self }
    }

    /// More arguments, which both daemons know.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|arg| (*arg).to_owned()));
        self
    }

    /// More arguments, which only our daemon knows.
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

    /// The host has the files, with the sizes and sums that the guest told.
    pub fn check_sums(&self, report: &CaseReport) {
        let sums = report.values("sum");
        assert!(!sums.is_empty(), "no sums: {report:#?}");
        for line in sums {
            let name = line.split(',').next().unwrap_or_default();
            let bytes = std::fs::read(self.path(name)).expect("read what the guest made");
            let host = format!("{name},{},{}", bytes.len(), sha256(&bytes));
            assert_eq!(line, host, "the guest (left) has other bytes than the host");
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
                // Its namespaces need more of a machine than a test can ask for.
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

    /// QEMU's device, all but its chardev and slot.
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
