//! Running a foreign command to its end, with a time limit and its whole output in the failure message.

use std::ffi::OsStr;
use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// The longest that a command may take unless the caller says otherwise.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// How long after a command's end its output may still be open.
const PIPE_LIMIT: Duration = Duration::from_secs(5);

/// What a finished command said.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output, lossily decoded.
    pub stdout: String,
    /// Standard error, lossily decoded.
    pub stderr: String,
    /// Wall-clock time from start to end.
    pub took: Duration,
}

impl Ran {
    /// The exit code; panics when a signal ended the command.
    #[must_use]
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| panic!("{self} was ended by a signal"))
    }

    /// Panics, with everything the command said, unless it exited 0.
    #[must_use]
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "failed: {self}");
        self
    }

    /// Panics unless the command exited with `code` and said exactly one line on standard error.
    #[must_use]
    #[track_caller]
    pub fn refused(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "expected exit code {code}: {self}");
        let lines: Vec<_> = self.stderr.lines().filter(|l| !l.trim().is_empty()).collect();
        assert_eq!(lines.len(), 1, "expected one clear line on stderr: {self}");
        assert!(!self.stderr.contains("panicked"), "a panic is no clear error: {self}");
        self
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ({}, {:?})\n--- stdout\n{}\n--- stderr\n{}",
            self.line, self.status, self.took, self.stdout, self.stderr
        )
    }
}

/// Runs `program` with `args`; panics unless it exits 0.
#[track_caller]
pub fn run<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = Command::new(program);
    command.args(args);
    try_run(command).ok()
}

/// Runs a `bash -euo pipefail` script; panics unless it exits 0. `$1`.. are `args`.
#[track_caller]
pub fn bash<S: AsRef<OsStr>>(script: &str, args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script, "bash"]).args(args);
    try_run(command).ok()
}

/// Runs a command to its end, however it ends, within [`COMMAND_LIMIT`].
#[must_use]
#[track_caller]
pub fn try_run(command: Command) -> Ran {
    try_run_within(command, COMMAND_LIMIT)
}

/// Runs a command to its end; panics when it takes longer than `limit`.
#[must_use]
#[track_caller]
pub fn try_run_within(mut command: Command, limit: Duration) -> Ran {
    let line = line_of(&command);
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("cannot start `{line}`: {e}"));
    let stdout = reader(child.stdout.take());
    let stderr = reader(child.stderr.take());
    let status = wait_within(&mut child, limit).unwrap_or_else(|| {
        let _ = child.kill();
        panic!("`{line}` did not end within {limit:?}")
    });
    let took = start.elapsed();
    // A child that left a process behind with its pipes open must fail the test, not hang it.
    let text = |from: Receiver<String>| {
        from.recv_timeout(PIPE_LIMIT)
            .unwrap_or_else(|_| panic!("`{line}` ended, but something it started holds its output open"))
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    Ran { line, status, stdout, stderr, took }
}

/// Waits for `child`; none when it is still running after `limit`.
pub fn wait_within(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if start.elapsed() > limit => return None,
            Ok(None) => std::thread::sleep(pause),
            Err(e) => panic!("cannot wait for a child: {e}"),
        }
        pause = (pause * 2).min(Duration::from_millis(10));
    }
}

fn line_of(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|a| a.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

fn reader<R: Read + Send + 'static>(from: Option<R>) -> Receiver<String> {
    let (tell, told) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut from) = from {
            // A broken pipe ends the text early; the exit code tells the rest.
            let _ = from.read_to_end(&mut bytes);
        }
        // The listener may have given up.
        let _ = tell.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    told
}
