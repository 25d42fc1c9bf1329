//! The `vmfs-replica` daemon (storage-only hosts and witnesses), and what both daemons share.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use vmfs_common::config::Config;
use vmfs_net::HostRole;

use crate::api::ControlServer;
use crate::control::NodeControl;
use crate::node::{self, Node};
use crate::pid_file::PidFile;
use crate::{config_file, sd_notify};

#[derive(Debug, Parser)]
#[command(version, about = "Keeps copies of VMFS images for other hosts, or votes as a witness")]
struct Arguments {
    /// Configuration of this host (see examples/vmfs.toml)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// The program: arguments, configuration, running until SIGTERM or SIGINT. Exit code 0 after a clean
/// stop, 1 when it could not start (one line on standard error says why), 2 for wrong usage.
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(a) => a,
        Err(e) => return usage(&e),
    };
    run(
        &arguments.config,
        |config| {
            anyhow::ensure!(config.mount.is_none(), "[mount] is for vmfs-fuse: this daemon has no mount");
            let witness = vec![HostRole::Witness];
            Ok(if config.witness { witness } else { vec![HostRole::Replica, HostRole::Witness] })
        },
        |_, _| Ok(()),
    )
}

/// Prints what clap has to say: help and version are no errors, wrong usage is one line.
#[must_use]
pub fn usage(e: &clap::Error) -> ExitCode {
    if e.use_stderr() {
        eprintln!("{}: {}", program(), usage_line(e));
        return ExitCode::from(2);
    }
    // Nothing to be done when even that cannot be printed.
    let _ = e.print();
    ExitCode::SUCCESS
}

/// Wrong usage in one line: what clap says without its layout, and the usage.
#[must_use]
pub fn usage_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let (mut said, mut usage) = (Vec::new(), None);
    for line in text.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("Usage:") {
            usage = Some(rest.trim().to_owned());
        } else if line.starts_with("For more information") {
            break;
        } else if !line.is_empty() {
            said.push(line);
        }
    }
    let said = said.join(" ");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    usage.map_or_else(|| said.to_owned(), |usage| format!("{said} (usage: {usage})"))
}

/// Runs a daemon: `prepare` looks at the configuration and says the host's roles; `attach` puts
/// something on top of the running engine, whose drop takes it down again.
#[must_use]
pub fn run<M>(
    config: &Path,
    prepare: impl FnOnce(&Config) -> anyhow::Result<Vec<HostRole>>,
    attach: impl FnOnce(&Node, &Config) -> anyhow::Result<M>,
) -> ExitCode {
    node::memory::bound_arenas();
    let started = config_file::load(config)
        .map_err(anyhow::Error::from)
        .and_then(|c| {
            let roles = prepare(&c).with_context(|| format!("config {}", config.display()))?;
            Ok((c, roles))
        })
        .and_then(|(config, roles)| {
            log_to_stderr(&config)?;
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .enable_all()
                .worker_threads(network_threads())
                .thread_name("vmfs-net")
                .max_blocking_threads(64)
                .build()
                .context("cannot start threads")?;
            // Before and after everything else: without it, nothing of this daemon is in use.
            let _pid = config.control.pid_file.as_deref().map(PidFile::create).transpose()?;
            let result = runtime.block_on(serve(config, roles, attach));
            // What still runs holds nothing that is not durable.
            runtime.shutdown_timeout(std::time::Duration::from_secs(2));
            result
        });
    match started {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // Its disk may be full.
            let _ = writeln!(std::io::stderr(), "{}: {}", program(), one_line(&e));
            ExitCode::FAILURE
        }
    }
}

/// Threads for the network: half of the processors. The others belong to the mount, the disk and the
/// guests, and tasks that hand work to each other on one thread do not pay for waking a second one.
fn network_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2))
}

/// The error and its causes; those that a message quotes already are left out.
fn one_line(e: &anyhow::Error) -> String {
    let mut text = e.to_string();
    for cause in e.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text.replace('\n', "; ")
}

fn program() -> String {
    let arg = std::env::args_os().next().unwrap_or_default();
    Path::new(&arg).file_name().map_or_else(|| "vmfs".to_owned(), |n| n.to_string_lossy().into_owned())
}

fn log_to_stderr(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log).with_context(|| format!("log: {:?}", config.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        // It would say on standard error, which is the log, that the log cannot be written, and panic when that
        // fails: with the log on a full disk the daemon would be gone.
        .log_internal_errors(false)
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .try_init()
        .map_err(|e| anyhow::anyhow!("log: {e}"))
}

async fn serve<M>(
    config: Config,
    roles: Vec<HostRole>,
    attach: impl FnOnce(&Node, &Config) -> anyhow::Result<M>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for signals")?;
    let server = ControlServer::bind(&config.control.socket)?;
    let metrics = match config.control.metrics_listen {
        Some(address) => Some(crate::api::MetricsServer::bind(address).await?),
        None => None,
    };
    let node = node::start(config.clone(), roles).await?;
    let attached = match tokio::task::block_in_place(|| attach(&node, &config)) {
        Ok(attached) => attached,
        Err(e) => {
            node.stop().await;
            return Err(e);
        }
    };
    let mount = config.mount.as_ref().map(|m| m.point.clone());
    let control = Arc::new(NodeControl::new(node.clone(), mount));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let wait = |mut s: tokio::sync::watch::Receiver<bool>| async move {
        // An error means that the sender is gone: a stop as well.
        let _ = s.wait_for(|s| *s).await;
    };
    let serving = tokio::spawn(server.serve(control.clone(), wait(stopped.clone())));
    if let Some(metrics) = metrics {
        tokio::spawn(metrics.serve(control, wait(stopped)));
    }
    sd_notify::ready();
    tracing::info!(host = config.host.as_str(), "ready");
    tokio::select! {
        _ = terminate.recv() => tracing::info!("stopping (SIGTERM)"),
        _ = interrupt.recv() => tracing::info!("stopping (SIGINT)"),
    }
    sd_notify::stopping();
    tokio::task::block_in_place(|| drop(attached));
    node.stop().await;
    stop.send_replace(true);
    serving.await.context("the control server")?.context("the control server")
}
