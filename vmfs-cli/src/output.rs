//! Standard output: for people, or the same as JSON.

use std::io::Write as _;

use serde::Serialize;

use crate::error::{CliError, CliResult};

/// How results are shown.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    /// Prints `document` as JSON, or what `text` makes of it.
    pub(crate) fn show<T: Serialize>(self, document: &T, text: impl FnOnce(&T) -> String) -> CliResult {
        if !self.json {
            return print(&text(document));
        }
        let json = serde_json::to_string_pretty(document).map_err(CliError::failed)?;
        print(&(json + "\n"))
    }

    /// The same in one line, for a stream of documents.
    pub(crate) fn show_line<T: Serialize>(self, document: &T, text: impl FnOnce(&T) -> String) -> CliResult {
        if !self.json {
            return print(&text(document));
        }
        let json = serde_json::to_string(document).map_err(CliError::failed)?;
        print(&(json + "\n"))
    }
}

/// Prints `text` for whoever may be watching. When nobody does any more, the work goes on.
pub(crate) fn tell(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints `text`. A reader that has seen enough (`| head`) ends the program quietly.
pub(crate) fn print(text: &str) -> CliResult {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other.map_err(|e| CliError::failed(format!("cannot write to standard output: {e}"))),
    }
}
