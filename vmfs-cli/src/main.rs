//! `vmfs`: the operator's command. It parses the command line, asks a daemon over its control socket
//! and shows the answer; it knows nothing of chains and stores. The exceptions work without a daemon:
//! [`up`] runs a little cluster, and joining a datastore makes a host before there is a daemon.
//!
//! - [`args`]: the command line; [`commands`]: what each command does
//! - [`client`]: HTTP over the control socket; [`output`], [`table`], [`progress`], [`clock`]: what people see
//! - [`multicall`]: under the name of a daemon, this binary is that daemon

mod args;
mod client;
mod clock;
mod commands;
mod error;
mod multicall;
mod output;
mod progress;
mod table;
mod up;

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;

use crate::args::Cli;

fn main() -> ExitCode {
    let program = std::env::args_os().next().unwrap_or_default();
    if let Some(daemon) = multicall::daemon(&program) {
        return daemon();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return explain(&e),
    };
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            say(&e);
            e.exit_code()
        }
    }
}

/// Help and version go to standard output; wrong usage is one line.
fn explain(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let text = error.render().to_string();
            output::print(&text).map_or_else(|e| e.exit_code(), |()| ExitCode::SUCCESS)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let e = error::CliError::usage("which command? (see vmfs --help)");
            say(&e);
            e.exit_code()
        }
        _ => {
            let e = error::CliError::usage(vmfs_replica::daemon::usage_line(error));
            say(&e);
            e.exit_code()
        }
    }
}

fn say(error: &error::CliError) {
    use std::io::Write as _;
    // Nobody listens: the exit code still tells.
    let _ = writeln!(std::io::stderr(), "vmfs: {error}");
}
