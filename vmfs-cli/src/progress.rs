//! Progress of long work: one line with rate and time to go, on a terminal only.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use vmfs_common::config::ByteSize;
use vmfs_replica::api::{ProgressEvent, Unit};

/// Shortest time between two updates of the line.
const INTERVAL: Duration = Duration::from_millis(100);

/// The line. Erased when dropped.
#[derive(Debug)]
pub(crate) struct ProgressLine {
    terminal: bool,
    stage: String,
    /// When the stage began, and how much of it was done then.
    start: (Instant, u64),
    drawn: Option<Instant>,
}

impl ProgressLine {
    pub(crate) fn new() -> Self {
        let terminal = std::io::stderr().is_terminal();
        Self { terminal, stage: String::new(), start: (Instant::now(), 0), drawn: None }
    }

    pub(crate) fn show(&mut self, event: &ProgressEvent) {
        let now = Instant::now();
        if event.stage != self.stage {
            self.stage.clone_from(&event.stage);
            self.start = (now, event.done);
            self.drawn = None;
        }
        if self.terminal && self.drawn.is_none_or(|at| now - at >= INTERVAL) {
            let line = render(event, now - self.start.0, event.done.saturating_sub(self.start.1));
            // A terminal that is gone is no reason to stop the work.
            let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
            let _ = std::io::stderr().flush();
            self.drawn = Some(now);
        }
    }
}

impl Drop for ProgressLine {
    fn drop(&mut self) {
        if self.terminal {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// The line for `event`; `moved` of its units took `elapsed`.
fn render(event: &ProgressEvent, elapsed: Duration, moved: u64) -> String {
    let amount = |n: u64| match event.unit {
        Unit::Bytes => ByteSize::new(n).human(),
        Unit::Updates => format!("{n} updates"),
        Unit::Members => format!("{n} members"),
    };
    let mut line = format!("{}: {}", event.stage, amount(event.done));
    if let Some(total) = event.total {
        let percent = if total == 0 { 100 } else { u128::from(event.done) * 100 / u128::from(total) };
        line.push_str(&format!(" of {}, {percent}%", amount(total)));
    }
    let ms = u128::from(u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    if event.unit == Unit::Members || ms < 500 || moved == 0 {
        return line;
    }
    let rate = u64::try_from(u128::from(moved) * 1000 / ms).unwrap_or(u64::MAX);
    line.push_str(&format!(", {}/s", amount(rate)));
    if let Some(rest) = event.total.map(|t| t.saturating_sub(event.done)).filter(|_| rate > 0) {
        line.push_str(&format!(", {} to go", human_seconds(rest.div_ceil(rate))));
    }
    line
}

/// `45 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn human_seconds(s: u64) -> String {
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        _ => format!("{} h {} min", s / 3600, s / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_has_rate_and_time_to_go() {
        let event = ProgressEvent {
            stage: "reading".into(),
            done: 64 << 20,
            total: Some(256 << 20),
            unit: Unit::Bytes,
        };
        assert_eq!(
            render(&event, Duration::from_secs(2), 64 << 20),
            "reading: 64 MiB of 256 MiB, 25%, 32 MiB/s, 6 s to go"
        );
        assert_eq!(render(&event, Duration::from_millis(1), 1), "reading: 64 MiB of 256 MiB, 25%");
        let event = ProgressEvent { stage: "votes".into(), done: 1, total: None, unit: Unit::Members };
        assert_eq!(render(&event, Duration::from_secs(9), 1), "votes: 1 members");
        let event = ProgressEvent { stage: "x".into(), done: 0, total: Some(0), unit: Unit::Updates };
        assert_eq!(render(&event, Duration::from_secs(9), 0), "x: 0 updates of 0 updates, 100%");
    }

    #[test]
    fn times_are_for_people() {
        assert_eq!(human_seconds(59), "59 s");
        assert_eq!(human_seconds(200), "3 min 20 s");
        assert_eq!(human_seconds(7500), "2 h 5 min");
    }
}
