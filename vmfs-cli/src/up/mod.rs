//! `vmfs up` and `vmfs down`: a little cluster in one directory, each host a real daemon with its own
//! identity, store and mount, talking QUIC on loopback.
//!
//! - [`cluster`]: the directory: making it, its hosts, their ports
//! - [`daemon`]: starting and stopping the processes
//! - [`mounts`]: what a killed daemon leaves behind
//! - [`live`]: what is shown while it runs
//!
//! The daemons outlive their launcher: whether a host runs is decided by the lock on its pid file, and by
//! nothing that `vmfs up` remembers. `DIR/up.lock` is the pid file of the launcher itself.

mod cluster;
mod daemon;
mod live;
mod mounts;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use vmfs_replica::pid_file::{self, PidFile, PidFileError};

use self::cluster::{Cluster, Host};
use self::daemon::Started;
use crate::args::UpArgs;
use crate::error::{CliError, CliResult};
use crate::output::{print, tell};

/// How long `vmfs down` waits for the launcher to shut its cluster down.
const LAUNCHER_STOP: Duration = Duration::from_secs(45);

/// `vmfs up`.
pub(crate) async fn up(args: UpArgs) -> CliResult {
    let mut interrupt = Interrupt::new()?;
    let dir = absolute(&args.dir)?;
    cluster::check_place(&dir)?;
    let lock = lock(&dir)?;
    let cluster = Cluster::open_or_make(&dir, args.hosts)?;
    tokio::select! {
        settled = cluster.settled() => settled?,
        () = interrupt.wait() => return Err(CliError::failed("interrupted before any host was started")),
    }
    let missing = cluster.not_running()?;
    if missing.is_empty() {
        return Err(CliError::failed(format!(
            "{} is up already; stop it with: vmfs down {}",
            dir.display(),
            args.dir.display()
        )));
    }
    for host in &missing {
        mounts::detach_dead(&host.mount()).map_err(CliError::failed)?;
    }
    cluster.settle_ports(&missing)?;
    let mut started = Started::spawn(&missing)?;
    let ready = tokio::select! {
        ready = started.wait_ready() => ready,
        () = interrupt.wait() => Err(CliError::failed("interrupted while the hosts were starting")),
    };
    if let Err(error) = ready {
        shut_down(&missing, &mut started)?;
        return Err(error);
    }
    if args.detach {
        drop(lock);
        return print(&live::announce(&cluster, live::Ending::Down(&args.dir)));
    }
    let ended = tokio::select! {
        ended = live::watch(&cluster, &mut started) => ended,
        () = interrupt.wait() => Ok(()),
    };
    tell("stopping ...\n");
    shut_down(cluster.hosts(), &mut started)?;
    drop(lock);
    ended?;
    tell("all hosts have stopped\n");
    Ok(())
}

/// `vmfs down`.
pub(crate) fn down(dir: &Path) -> CliResult {
    let given = dir;
    let dir = absolute(given)?;
    let Some(cluster) = Cluster::open(&dir)? else {
        return Err(CliError::failed(format!("{} is not a directory of vmfs up", given.display())));
    };
    let launcher_stopped = stop_launcher(&dir)?;
    let _lock = lock(&dir)?;
    let stopped = daemon::stop(cluster.hosts())?;
    clean_up(cluster.hosts())?;
    if launcher_stopped && stopped.is_empty() {
        print("stopped vmfs up and its hosts\n")
    } else if stopped.is_empty() {
        print("nothing was running\n")
    } else {
        print(&format!("stopped {}\n", stopped.join(", ")))
    }
}

fn absolute(dir: &Path) -> CliResult<PathBuf> {
    let path = std::path::absolute(dir).map_err(|e| CliError::failed(format!("{}: {e}", dir.display())))?;
    // Mount points are known to the kernel by their real path.
    Ok(std::fs::canonicalize(&path).unwrap_or(path))
}

fn lock_path(dir: &Path) -> PathBuf {
    dir.join("up.lock")
}

fn lock(dir: &Path) -> CliResult<PidFile> {
    PidFile::create(&lock_path(dir)).map_err(|e| match e {
        PidFileError::Running { pid, .. } => {
            CliError::failed(format!("another vmfs up (process {pid}) is at work in {}", dir.display()))
        }
        PidFileError::Io { .. } => CliError::failed(e),
    })
}

/// Asks a `vmfs up` that stays in front to end, and waits until it did. Says whether there was one.
fn stop_launcher(dir: &Path) -> CliResult<bool> {
    let path = lock_path(dir);
    let fail = |e: std::io::Error| CliError::failed(format!("{}: {e}", path.display()));
    let Some(pid) = pid_file::running(&path).map_err(fail)? else { return Ok(false) };
    let Some(process) = daemon::Process::verified(pid, &path).map_err(fail)? else { return Ok(false) };
    process.terminate().map_err(fail)?;
    if process.wait_gone(LAUNCHER_STOP).map_err(fail)? {
        return Ok(true);
    }
    Err(CliError::failed(format!("vmfs up (process {pid}) does not end; stop it and try again")))
}

fn shut_down(hosts: &[Host], started: &mut Started) -> CliResult {
    started.terminate();
    daemon::stop(hosts)?;
    started.wait_gone()?;
    clean_up(hosts)
}

/// Removes what a killed daemon leaves behind.
fn clean_up(hosts: &[Host]) -> CliResult {
    for host in hosts {
        mounts::detach_dead(&host.mount()).map_err(CliError::failed)?;
        for file in [host.socket(), host.pid_file()] {
            match std::fs::remove_file(&file) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(CliError::failed(format!("cannot remove {}: {e}", file.display())));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Ctrl-C, SIGTERM, or the terminal going away.
struct Interrupt([Signal; 3]);

impl Interrupt {
    fn new() -> CliResult<Self> {
        let on = |kind| signal(kind).map_err(|e| CliError::failed(format!("cannot handle signals: {e}")));
        Ok(Self([on(SignalKind::interrupt())?, on(SignalKind::terminate())?, on(SignalKind::hangup())?]))
    }

    async fn wait(&mut self) {
        let [int, term, hup] = &mut self.0;
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
            _ = hup.recv() => {}
        }
    }
}
