//! Serves a disk with a power switch (see `integration::power`) on a directory, for the tests.
//!
//!     power_disk POINT BACKING
//!
//! Takes one command a line on standard input and answers each with one line: `freeze`, `freeze-after CALLS`,
//! `is-frozen`, `fail-waiting`, `cut SEED`. Ends, and unmounts, with its input.

use std::io::{BufRead, Write};
use std::path::Path;

use integration::power::PowerDisk;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [point, backing] = args.as_slice() else { return Err("usage: power_disk POINT BACKING".into()) };
    let disk = PowerDisk::mount(Path::new(point), Path::new(backing))?;
    answer("mounted")?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (command, argument) = line.split_once(' ').unwrap_or((&line, ""));
        match command {
            "freeze" => disk.freeze(),
            "freeze-after" => disk.freeze_after(argument.parse()?),
            "fail-waiting" => disk.fail_waiting(),
            "is-frozen" => {
                answer(if disk.is_frozen() { "yes" } else { "no" })?;
                continue;
            }
            "cut" => {
                let lost = disk.cut(argument.parse()?)?;
                answer(&format!("{} pages and {} changes of names were not synced", lost.pages, lost.names))?;
                continue;
            }
            other => return Err(format!("unknown command {other:?}").into()),
        }
        answer("done")?;
    }
    Ok(())
}

fn answer(line: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush())
}
