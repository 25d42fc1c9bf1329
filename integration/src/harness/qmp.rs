//! QEMU's monitor protocol, as much of it as the tests need.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Value, json};

use super::wait::{secs, until};

/// One connection to a QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects, waiting until the socket is there, and negotiates.
    #[must_use]
    pub fn connect(path: &Path) -> Self {
        let stream = until("QEMU listens on its monitor", secs(20), || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(secs(60))).expect("a socket takes a timeout");
        let lines = BufReader::new(stream.try_clone().expect("a socket can be shared"));
        let mut qmp = Self { stream, lines };
        let greeting = qmp.line();
        assert!(greeting["QMP"].is_object(), "not a QMP server: {greeting}");
        let _ = qmp.call("qmp_capabilities", json!({}));
        qmp
    }

    /// Runs one command; panics with QEMU's own words when it refuses.
    #[track_caller]
    pub fn call(&mut self, command: &str, arguments: Value) -> Value {
        self.try_call(command, arguments).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    /// Runs one command; the error is QEMU's description.
    ///
    /// # Errors
    /// When QEMU refuses the command.
    pub fn try_call(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let message = json!({ "execute": command, "arguments": arguments });
        writeln!(self.stream, "{message}").expect("QEMU is there");
        loop {
            let mut answer = self.line();
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            if let Some(error) = answer.get("error") {
                return Err(error["desc"].as_str().unwrap_or("no reason").to_owned());
            }
            // Anything else is an event, which nobody here waits for: states are asked for.
        }
    }

    /// The run state, as `query-status` says it (`running`, `paused`, `inmigrate`, ...).
    pub fn run_state(&mut self) -> String {
        self.call("query-status", json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    /// The state of a migration (`active`, `pre-switchover`, `completed`, ...).
    pub fn migration_state(&mut self) -> String {
        self.call("query-migrate", json!({}))["status"].as_str().unwrap_or_default().to_owned()
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("QEMU answers");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("not QMP ({e}): {line}"))
    }
}
