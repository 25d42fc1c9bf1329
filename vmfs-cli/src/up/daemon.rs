//! Starting and stopping the hosts' processes.

use std::fs::File;
use std::io::{self, Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};
use vmfs_replica::api::StatusReport;
use vmfs_replica::pid_file::{self, Holder};

use super::cluster::Host;
use super::mounts;
use crate::client::Client;
use crate::error::{CliError, CliResult};

/// A host that is not ready after this long will not be.
const READY_MAX: Duration = Duration::from_secs(60);
/// Between two looks whether it is.
const READY_POLL: Duration = Duration::from_millis(20);
/// How long hosts that are ready may take to connect to each other before they are ready all the same.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// How long one look may take.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// Between two looks whether a child has ended.
const GONE_POLL: Duration = Duration::from_millis(5);
/// How long a daemon may take to end on SIGTERM.
const STOP_MAX: Duration = Duration::from_secs(20);
/// How long the kernel may take to end it on SIGKILL.
const KILL_MAX: Duration = Duration::from_secs(10);

/// The processes that this `vmfs up` started.
#[derive(Debug)]
pub(super) struct Started(Vec<Running>);

#[derive(Debug)]
struct Running {
    host: Host,
    child: Child,
    /// Where this run's part of the log begins.
    log_start: u64,
    ended: Option<ExitStatus>,
}

impl Started {
    /// Starts the daemons of `hosts`, all at once.
    pub(super) fn spawn(hosts: &[Host]) -> CliResult<Self> {
        let mut started = Self(Vec::new());
        for host in hosts {
            match spawn(host) {
                Ok(running) => started.0.push(running),
                Err(e) => {
                    for running in &mut started.0 {
                        // Not ready yet, and nobody has seen it: nothing can be lost.
                        let _ = running.child.kill();
                        let _ = running.child.wait();
                    }
                    return Err(CliError::failed(format!(
                        "host {}: cannot start its daemon: {e}",
                        host.name
                    )));
                }
            }
        }
        Ok(started)
    }

    /// Returns when every host answers and its mount is there.
    pub(super) async fn wait_ready(&mut self) -> CliResult {
        let start = Instant::now();
        loop {
            let mut waiting = None;
            for running in &mut self.0 {
                running.reap();
                if let Some(status) = running.ended {
                    return Err(running.failure(&format!("ended while starting ({status})")));
                }
                if !running.is_ready(start.elapsed() < CONNECT_MAX).await? {
                    waiting = Some(running);
                }
            }
            match waiting {
                None => return Ok(()),
                Some(slow) if start.elapsed() > READY_MAX => {
                    return Err(slow.failure(&format!("is not ready after {} s", READY_MAX.as_secs())));
                }
                Some(_) => tokio::time::sleep(READY_POLL).await,
            }
        }
    }

    /// Asks them all to end: also those that were started so short a time ago that no pid file names them.
    pub(super) fn terminate(&mut self) {
        self.reap();
        for running in self.0.iter().filter(|r| r.ended.is_none()) {
            // It is not reaped, so that the number is its own. One that has ended meanwhile is what is wanted.
            let _ = kill_process(Pid::from_child(&running.child), Signal::TERM);
        }
    }

    /// Returns when all of them have ended, after [`STOP_MAX`] by SIGKILL.
    pub(super) fn wait_gone(&mut self) -> CliResult {
        let end = Instant::now() + STOP_MAX;
        for running in &mut self.0 {
            let fail =
                |e| CliError::failed(format!("host {}: cannot stop its daemon: {e}", running.host.name));
            while running.ended.is_none() {
                running.ended = running.child.try_wait().map_err(fail)?;
                if running.ended.is_none() && Instant::now() > end {
                    running.child.kill().map_err(fail)?;
                    running.ended = Some(running.child.wait().map_err(fail)?);
                } else if running.ended.is_none() {
                    std::thread::sleep(GONE_POLL);
                }
            }
        }
        Ok(())
    }

    /// Takes note of those that have ended.
    pub(super) fn reap(&mut self) {
        self.0.iter_mut().for_each(Running::reap);
    }

    /// How the daemon of `host` ended, when it was one of these.
    pub(super) fn ended(&self, host: &Host) -> Option<ExitStatus> {
        self.0.iter().find(|r| r.host.name == host.name)?.ended
    }
}

fn spawn(host: &Host) -> io::Result<Running> {
    let mut log = File::options().append(true).create(true).open(host.log())?;
    let log_start = log.seek(io::SeekFrom::End(0))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg0("vmfs-fuse").arg("--config").arg(host.config());
    command.current_dir(host.dir()).env_remove("VMFS_SOCKET").env_remove("NOTIFY_SOCKET");
    // A group of its own: Ctrl-C is for `vmfs up`, which ends its hosts in order.
    command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
    Ok(Running { host: host.clone(), child: command.spawn()?, log_start, ended: None })
}

impl Running {
    fn reap(&mut self) {
        if self.ended.is_none() {
            // An error would mean that it was reaped elsewhere, which nobody here does.
            self.ended = self.child.try_wait().ok().flatten();
        }
    }

    /// It answers, its mount is there and, if asked for, it is connected to all others: an image that is
    /// made then has all its members.
    async fn is_ready(&self, connected: bool) -> CliResult<bool> {
        if self.host.pid()? != Some(self.child.id()) {
            return Ok(false);
        }
        let client = Client::new(&self.host.socket());
        // The socket may be there before anybody serves it.
        let asked = tokio::time::timeout(ANSWER_MAX, client.get::<StatusReport>("/v1/status"));
        let Ok(Ok(report)) = asked.await else { return Ok(false) };
        let linked = !connected || report.peers.iter().all(|p| p.connected);
        Ok(linked && mounts::is_mounted(&self.host.mount()).map_err(CliError::failed)?)
    }

    /// What happened, with the last thing the daemon said.
    fn failure(&self, what: &str) -> CliError {
        let said = last_line(&self.host.log(), self.log_start).unwrap_or_default();
        let said = if said.is_empty() { String::new() } else { format!(": {said}") };
        CliError::failed(format!("host {} {what}{said} (log: {})", self.host.name, self.host.log().display()))
    }
}

/// The last line with text after `start`.
fn last_line(path: &Path, start: u64) -> io::Result<String> {
    const TAIL_BYTES: u64 = 8192;
    let mut file = File::open(path)?;
    let end = file.seek(io::SeekFrom::End(0))?;
    file.seek(io::SeekFrom::Start(start.max(end.saturating_sub(TAIL_BYTES))))?;
    let mut bytes = Vec::new();
    file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
    Ok(last.unwrap_or_default().chars().filter(|c| !c.is_control()).take(500).collect())
}

/// A process, held so that its number cannot come to mean another one.
#[derive(Debug)]
pub(super) struct Process(OwnedFd);

impl Process {
    /// The process that holds the pid file at `path` and has number `pid`; none when it has just ended.
    pub(super) fn verified(pid: u32, path: &Path) -> io::Result<Option<Self>> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let Some(raw) = raw else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{pid} is no process id")));
        };
        let fd = match pidfd_open(raw, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            other => other?,
        };
        // Held first, looked at second: if it still holds the lock now, the handle is on the right one.
        let holds = matches!(pid_file::holder(path)?, Holder::Running(p) | Holder::Ending(p) if p == pid);
        Ok(holds.then_some(Self(fd)))
    }

    pub(super) fn terminate(&self) -> io::Result<()> {
        self.signal(Signal::TERM)
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.0, signal) {
            Err(Errno::SRCH) => Ok(()),
            other => Ok(other?),
        }
    }

    /// Waits until it has ended; false when it has not after `max`.
    pub(super) fn wait_gone(&self, max: Duration) -> io::Result<bool> {
        let end = Instant::now() + max;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

/// Stops those of `hosts` that run, all at once: SIGTERM, and after a while SIGKILL. Says which ran.
pub(super) fn stop(hosts: &[Host]) -> CliResult<Vec<String>> {
    let mut running = Vec::new();
    for host in hosts {
        let fail =
            |e: io::Error| CliError::failed(format!("host {}: cannot stop its daemon: {e}", host.name));
        // One that was killed a moment ago is waited for as well, though not stopped by this.
        let holder = host.holder()?;
        if let Holder::Running(pid) | Holder::Ending(pid) = holder
            && let Some(process) = Process::verified(pid, &host.pid_file()).map_err(fail)?
        {
            process.terminate().map_err(fail)?;
            running.push((host, pid, process, holder == Holder::Running(pid)));
        }
    }
    let end = Instant::now() + STOP_MAX;
    for (host, pid, process, _) in &running {
        let fail =
            |e: io::Error| CliError::failed(format!("host {}: cannot stop its daemon: {e}", host.name));
        if process.wait_gone(end.saturating_duration_since(Instant::now())).map_err(fail)? {
            continue;
        }
        eprintln!(
            "vmfs: host {} does not stop within {} s: killed (process {pid})",
            host.name,
            STOP_MAX.as_secs()
        );
        process.signal(Signal::KILL).map_err(fail)?;
        if !process.wait_gone(KILL_MAX).map_err(fail)? {
            return Err(CliError::failed(format!("host {}: process {pid} cannot be killed", host.name)));
        }
    }
    Ok(running.iter().filter(|(.., ran)| *ran).map(|(host, ..)| host.name.to_string()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_line_of_this_run_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old\nfirst\n last \u{1b}[0m\n\n").unwrap();
        assert_eq!(last_line(&path, 4).unwrap(), "last [0m");
        assert_eq!(last_line(&path, 26).unwrap(), "");
    }

    #[test]
    fn number_of_a_process_without_the_lock_is_never_signalled() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        std::fs::write(&path, format!("{}\n", child.id())).unwrap();
        assert!(Process::verified(child.id(), &path).unwrap().is_none());
        assert!(child.try_wait().unwrap().is_none(), "still there");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn process_is_seen_to_end() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let process = Process(pidfd_open(pid, PidfdFlags::empty()).unwrap());
        assert!(!process.wait_gone(Duration::from_millis(1)).unwrap());
        process.terminate().unwrap();
        assert!(process.wait_gone(Duration::from_secs(10)).unwrap());
        child.wait().unwrap();
        process.terminate().unwrap();
    }
}
