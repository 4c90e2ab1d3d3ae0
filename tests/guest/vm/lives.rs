// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Resets from outside the guest, and hot-plug of devices.

use std::os::unix::process::ExitStatusExt;

use serde_json::json;

use super::{HANG, Vm};
use crate::daemon::Daemon;

impl Vm<'_> {
    /// Resets the machine by QMP `system_reset`, and waits until the guest has booted again.
    pub fn system_reset(&mut self) {
        self.qmp("set-action", json!({"reboot": "reset"}));
        self.qmp("system_reset", json!({}));
        self.wait_ready();
        self.qmp("set-action", json!({"reboot": "shutdown"}));
    }

    /// Resets the machine by QMP `system_reset`; QEMU must end by `signal`.
    pub fn system_reset_kills(&mut self, signal: i32) {
        self.qmp("set-action", json!({"reboot": "reset"}));
        self.qmp("system_reset", json!({}));
        if !self.qemu_output.wait_closed(HANG) {
            self.fail("QEMU still runs after the reset");
        }
        let status = self.qemu.wait().expect("wait for QEMU");
        if status.signal() != Some(signal) {
            self.fail(&format!("QEMU ended with {status}"));
        }
    }

    /// Unplugs a daemon's device and removes its chardev, which closes the connection; then plugs
    /// in a new device with a new connection. In between the guest has no such device.
    pub fn unplug_and_plug(&mut self, index: usize) {
        let (device, chardev) = (format!("dev{index}"), format!("vhost{index}"));
        self.qmp("device_del", json!({ "id": device }));
        self.qmp.as_mut().expect("QMP is connected").wait_deleted(&device);
        self.qmp("chardev-remove", json!({ "id": chardev }));
        let path = self.folder.path().join(format!("vhost-{index}"));
        let addr = json!({"type": "unix", "data": {"path": path}});
        let backend = json!({"type": "socket", "data": {"addr": addr, "server": false}});
        self.qmp("chardev-add", json!({ "id": chardev, "backend": backend }));
        let words = self.devices[index].clone();
        let mut arguments =
            json!({"id": device, "bus": format!("port{index}"), "chardev": chardev});
        let mut words = words.split(',');
        arguments["driver"] = words.next().expect("a driver").into();
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            arguments[key] = value.parse::<u64>().map_or_else(|_| value.into(), Into::into);
        }
        self.qmp("device_add", arguments);
    }

    /// Powers off. The daemons keep listening; SIGTERM ends them.
    pub fn poweroff_listening(&mut self) {
        self.send("POWEROFF");
        self.expect("BYE POWEROFF");
        if !self.qemu_output.wait_closed(HANG) {
            self.fail("QEMU does not end");
        }
        let status = self.qemu.wait().expect("wait for QEMU");
        if !status.success() {
            self.fail(&format!("QEMU ended with {status}"));
        }
        self.terminate_daemons();
    }

    /// Ends by SIGTERM the daemons that keep listening.
    pub fn terminate_daemons(&mut self) {
        self.daemons.iter_mut().for_each(Daemon::terminate);
    }
}
