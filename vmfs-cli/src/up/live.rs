//! What `vmfs up` shows: where things are, what to try, and how the hosts fare.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::Duration;

use vmfs_replica::api::{ImageRole, ImageStatus, StatusReport};

use super::cluster::{Cluster, Host};
use super::daemon::Started;
use crate::client::Client;
use crate::commands::{CLEAR, images_table};
use crate::error::{CliError, CliResult};
use crate::output::tell;
use crate::table::Table;

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);
/// A host that does not answer within this time is shown so.
const ANSWER_MAX: Duration = Duration::from_millis(800);

/// How the cluster is stopped.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ending<'a> {
    Interrupt,
    Down(&'a Path),
}

/// Where things are and what to try.
pub(super) fn announce(cluster: &Cluster, ending: Ending<'_>) -> String {
    let mut out = format!("{} hosts are ready in {}\n\n", cluster.hosts().len(), cluster.dir().display());
    let mut table = Table::new(&["HOST", "MOUNT", "CONTROL SOCKET"]);
    for host in cluster.hosts() {
        let (mount, socket) = (host.mount(), host.socket());
        table.row([host.name.as_str(), &mount.display().to_string(), &socket.display().to_string()]);
    }
    out.push_str(&table.render());
    let vmfs = std::env::current_exe().map_or_else(|_| "vmfs".to_owned(), |exe| exe.display().to_string());
    let first = &cluster.hosts()[0];
    let second = cluster.hosts().get(1).unwrap_or(first);
    out.push_str("\nTry in another shell:\n");
    let dir = cluster.dir().display();
    let mut hints = vec![
        format!("alias vmfs={vmfs}"),
        format!("qemu-img create -f qcow2 {dir}/{}/mnt/disk.qcow2 10G", first.name),
        format!("vmfs --socket {dir}/{}/vmfs.sock wait disk.qcow2 --in-sync", first.name),
        format!("vmfs --socket {dir}/{}/vmfs.sock status", second.name),
    ];
    if cluster.hosts().len() > 1 {
        hints.push(format!("kill -9 $(cat {dir}/{}/vmfs.pid)     # the host dies", first.name));
        hints.push(format!("vmfs --socket {dir}/{}/vmfs.sock promote disk.qcow2", second.name));
    }
    out.extend(hints.iter().map(|hint| format!("  {hint}\n")));
    match ending {
        Ending::Interrupt => out.push_str("\nCtrl-C stops all of it; the data stays.\n"),
        Ending::Down(dir) => out.push_str(&format!("  vmfs down {}\n", dir.display())),
    }
    out
}

/// One host at one moment.
struct Look {
    name: String,
    pid: Option<u32>,
    ended: Option<String>,
    report: Option<StatusReport>,
}

impl Look {
    async fn at(host: &Host, started: &Started) -> CliResult<Self> {
        let pid = host.pid()?;
        let client = Client::new(&host.socket());
        let asked = tokio::time::timeout(ANSWER_MAX, client.get::<StatusReport>("/v1/status"));
        let report = match pid {
            Some(_) => asked.await.ok().and_then(Result::ok),
            None => None,
        };
        let ended = started.ended(host).filter(|_| pid.is_none()).map(|status| status.to_string());
        Ok(Self { name: host.name.to_string(), pid, ended, report })
    }

    fn state(&self) -> String {
        match (self.pid, &self.report, &self.ended) {
            (Some(_), Some(_), _) => "ready".to_owned(),
            (Some(_), None, _) => "no answer".to_owned(),
            (None, _, Some(how)) => format!("not running ({how})"),
            (None, _, None) => "not running".to_owned(),
        }
    }
}

/// Shows how the hosts fare, until none is left.
pub(super) async fn watch(cluster: &Cluster, started: &mut Started) -> CliResult {
    let terminal = std::io::stdout().is_terminal();
    let intro = announce(cluster, Ending::Interrupt);
    if !terminal {
        tell(&intro);
    }
    let mut shown = String::new();
    let mut states = vec!["ready".to_owned(); cluster.hosts().len()];
    loop {
        started.reap();
        let mut looks = Vec::new();
        for host in cluster.hosts() {
            looks.push(Look::at(host, started).await?);
        }
        if terminal {
            let text = render(&looks);
            if text != shown {
                tell(&format!("{CLEAR}{intro}\n{text}"));
                shown = text;
            }
        } else {
            for (look, state) in looks.iter().zip(&mut states).filter(|(look, state)| look.state() != **state)
            {
                *state = look.state();
                tell(&format!("host {}: {state}\n", look.name));
            }
        }
        if looks.iter().all(|look| look.pid.is_none()) {
            return Err(CliError::failed(format!(
                "all hosts have stopped by themselves; their logs are {}/*/vmfs.log",
                cluster.dir().display()
            )));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn render(looks: &[Look]) -> String {
    let mut table = Table::new(&["HOST", ">PID", "STATE", ">IMAGES", ">OWNED", ">PEERS"]);
    for look in looks {
        let number = |of: &dyn Fn(&StatusReport) -> usize| {
            look.report.as_ref().map_or("-".into(), |r| of(r).to_string())
        };
        table.row([
            look.name.clone(),
            look.pid.map_or("-".to_owned(), |pid| pid.to_string()),
            look.state(),
            number(&|r| r.images.len()),
            number(&|r| r.images.iter().filter(|i| i.role == ImageRole::Owner).count()),
            number(&|r| r.peers.iter().filter(|p| p.connected).count()),
        ]);
    }
    let mut out = table.render();
    let images = best_views(looks);
    if !images.is_empty() {
        out.push('\n');
        out.push_str(&images_table(&images));
    }
    out
}

/// Every image once, as its owner sees it, or whoever answers when the owner does not.
fn best_views(looks: &[Look]) -> Vec<ImageStatus> {
    let mut best: Vec<ImageStatus> = Vec::new();
    for image in looks.iter().filter_map(|look| look.report.as_ref()).flat_map(|report| &report.images) {
        match best.iter_mut().find(|known| known.id == image.id) {
            None => best.push(image.clone()),
            Some(known) => {
                let rank = |i: &ImageStatus| (i.epoch, i.role == ImageRole::Owner);
                if rank(image) > rank(known) {
                    *known = image.clone();
                }
            }
        }
    }
    best.sort_by(|a, b| a.path.cmp(&b.path));
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::test_image;

    fn look(name: &str, images: Vec<ImageStatus>) -> Look {
        let report = StatusReport {
            host: name.into(),
            host_id: vmfs_common::HostId::default(),
            store_id: vmfs_common::StoreId::default(),
            datastore: vmfs_common::DatastoreId::default(),
            mount: None,
            version: String::new(),
            peers: vec![],
            images,
            refusals: std::collections::BTreeMap::new(),
            damage: vmfs_replica::api::Damage::default(),
            unopened: vec![],
        };
        Look { name: name.into(), pid: Some(1), ended: None, report: Some(report) }
    }

    #[test]
    fn image_is_shown_once_and_as_its_newest_owner_sees_it() {
        let (mut deposed, mut owner, mut replica) = (test_image("x"), test_image("x"), test_image("x"));
        (deposed.epoch, deposed.seq) = (3, 999);
        (owner.epoch, owner.seq) = (4, 900);
        (replica.epoch, replica.seq, replica.role) = (4, 890, ImageRole::Replica);
        let looks = [look("a", vec![deposed]), look("b", vec![replica]), look("c", vec![owner])];
        let views = best_views(&looks);
        assert_eq!(views.iter().map(|v| v.seq).collect::<Vec<_>>(), [900]);
        assert!(render(&looks).starts_with("HOST  PID  STATE  IMAGES  OWNED  PEERS\n"));
    }

    #[test]
    fn host_that_died_is_shown_with_the_reason() {
        let mut dead = look("a", vec![]);
        (dead.pid, dead.report, dead.ended) = (None, None, Some("signal: 9 (SIGKILL)".into()));
        assert_eq!(dead.state(), "not running (signal: 9 (SIGKILL))");
        assert!(
            render(&[dead]).contains("a       -  not running (signal: 9 (SIGKILL))       -      -      -\n")
        );
    }
}
