// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of QMP, QEMU's control protocol.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use serde_json::{Value, json};

/// Time limit that tells a hang from a slow machine.
const HANG: Duration = Duration::from_secs(60);

pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Devices that were unplugged and for which `wait_deleted` has not been called yet.
    deleted: Vec<String>,
}

impl Qmp {
    /// QEMU is the client and connects before it starts the guest.
    pub fn accept(listener: &UnixListener) -> Self {
        let (stream, _) = listener.accept().expect("QEMU connects its QMP socket");
        stream.set_read_timeout(Some(HANG)).expect("set a timeout");
        let mut qmp = Self { stream: BufReader::new(stream), deleted: Vec::new() };
        let greeting = qmp.read();
        assert!(greeting.get("QMP").is_some(), "not a QMP greeting: {greeting}");
        qmp.command("qmp_capabilities", json!({}));
        qmp
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("QMP answers");
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("QMP sent '{line}': {error}"))
    }

    fn note(&mut self, said: &Value) {
        if said["event"] == "DEVICE_DELETED" {
            // The parts of a device have no id.
            self.deleted.extend(said["data"]["device"].as_str().map(str::to_owned));
        }
    }

    /// Waits for the DEVICE_DELETED event of a device, unless it has come already.
    pub fn wait_deleted(&mut self, device: &str) {
        while !self.deleted.iter().any(|deleted| deleted == device) {
            let said = self.read();
            self.note(&said);
        }
        self.deleted.retain(|deleted| deleted != device);
    }

    /// Runs one command and returns its answer. Events that come in between are recorded.
    pub fn command(&mut self, name: &str, arguments: Value) -> Value {
        let request = json!({ "execute": name, "arguments": arguments });
        writeln!(self.stream.get_mut(), "{request}").expect("write to QMP");
        loop {
            let mut answer = self.read();
            assert!(answer.get("error").is_none(), "QMP {name}: {answer}");
            if let Some(value) = answer.get_mut("return") {
                return value.take();
            }
            self.note(&answer);
        }
    }
}
