//! `vmfs status` and `vmfs ls`.

use std::io::IsTerminal as _;
use std::time::Duration;

use serde::Serialize;
use vmfs_common::config::ByteSize;
use vmfs_replica::api::{ImageState, ImageStatus, MemberState, MemberStatus, StatusReport};

use super::Ask;
use crate::error::CliResult;
use crate::output::print;
use crate::table::Table;

/// Between two looks of `--watch`.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);
/// Clears a terminal and goes to its first line.
pub(crate) const CLEAR: &str = "\x1b[H\x1b[2J";

pub(super) async fn status(ask: &Ask, watch: bool) -> CliResult {
    if !watch {
        return ask.output.show(&ask.status().await?, render);
    }
    let redraw = std::io::stdout().is_terminal() && !ask.output.json;
    loop {
        match ask.status().await {
            Ok(report) if redraw => print(&format!("{CLEAR}{}", render(&report)))?,
            Ok(report) => ask.output.show_line(&report, |r| render(r) + "\n")?,
            // A daemon that restarts comes back while somebody watches.
            Err(error) if redraw => print(&format!("{CLEAR}{error}\n"))?,
            Err(error) => return Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
            _ = tokio::signal::ctrl_c() => return Ok(()),
        }
    }
}

fn render(report: &StatusReport) -> String {
    let connected = report.peers.iter().filter(|p| p.connected).count();
    let mount = report.mount.as_ref().map_or_else(|| "no mount".to_owned(), |m| m.display().to_string());
    let mut out = format!(
        "host {}, {mount}, {connected} of {} peer{} connected\n",
        report.host,
        report.peers.len(),
        if report.peers.len() == 1 { "" } else { "s" },
    );
    for peer in report.peers.iter().filter(|p| !p.connected) {
        let address = peer.address.as_deref().unwrap_or("address unknown");
        let error = peer.error.as_deref().map(|e| format!(": {e}")).unwrap_or_default();
        out.push_str(&format!("  {} ({address}) is not connected{error}\n", peer.host));
    }
    if report.images.is_empty() {
        out.push_str("no images\n");
    } else {
        out.push('\n');
        out.push_str(&images_table(&report.images));
    }
    for image in report.images.iter().filter(|i| i.state != ImageState::Ok) {
        if let Some(reason) = &image.reason {
            out.push_str(&format!("{}: {}: {reason}\n", image.path, image.state));
        }
    }
    for image in report.images.iter().filter(|i| i.forced) {
        out.push_str(&format!("{}: separate lineage since a forced promotion\n", image.path));
    }
    for image in report.images.iter().filter(|i| i.forks > 0) {
        out.push_str(&format!("{}: {} kept (vmfs forks)\n", image.path, count(image.forks, "fork")));
    }
    for image in report.images.iter().filter(|i| i.damage.found > 0) {
        let d = &image.damage;
        out.push_str(&format!("{}: {} found, {} repaired\n", image.path, places(d.found), d.repaired));
    }
    if report.damage.found > 0 {
        let d = &report.damage;
        out.push_str(&format!("store: {} found, {} repaired\n", places(d.found), d.repaired));
    }
    for image in &report.unopened {
        out.push_str(&format!("image {} cannot be opened here: {}\n", image.id, image.reason));
    }
    for image in report.images.iter().filter(|i| i.scrub.running) {
        let s = &image.scrub;
        let (done, total) = (ByteSize::new(s.done_bytes).human(), ByteSize::new(s.total_bytes).human());
        out.push_str(&format!("{}: being scrubbed, {done} of {total}\n", image.path));
    }
    let refused: u64 = report.refusals.values().sum();
    if refused > 0 {
        let reasons: Vec<_> = report.refusals.iter().map(|(reason, n)| format!("{reason} {n}")).collect();
        out.push_str(&format!("refused: {}\n", reasons.join(", ")));
    }
    out
}

pub(crate) fn images_table(images: &[ImageStatus]) -> String {
    let mut table = Table::new(&[
        "IMAGE",
        ">SIZE",
        "ROLE",
        "OWNER",
        ">EPOCH",
        ">SEQ",
        ">FLUSHED",
        "STATE",
        "OTHER MEMBERS",
    ]);
    for image in images {
        // The owner has a column of its own.
        let others: Vec<_> =
            image.members.iter().filter(|m| Some(&m.host) != image.owner.as_ref()).map(member).collect();
        table.row([
            image.path.clone(),
            ByteSize::new(image.size).human(),
            image.role.to_string(),
            image.owner.clone().unwrap_or_else(|| "?".to_owned()),
            image.epoch.to_string(),
            image.seq.to_string(),
            image.flushed_seq.to_string(),
            image.state.to_string(),
            others.join(", "),
        ]);
    }
    table.render()
}

/// `b in-sync`, `c catching-up 12 MiB`.
fn member(member: &MemberStatus) -> String {
    let mut text = format!("{} {}", member.host, member.state);
    if member.role == vmfs_replica::api::ImageRole::Witness {
        text.push_str(" (witness)");
    }
    if member.lag_bytes > 0 && member.state != MemberState::Unknown {
        text.push_str(&format!(", {} behind", ByteSize::new(member.lag_bytes).human()));
    }
    text
}

/// `1 damaged place`, `2 damaged places`.
fn places(n: u64) -> String {
    count(n, "damaged place")
}

/// `1 fork`, `2 forks`.
pub(super) fn count(n: u64, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// `vmfs ls --json`.
#[derive(Debug, Serialize)]
struct ImageList<'a> {
    images: Vec<ImageLine<'a>>,
}

#[derive(Debug, Serialize)]
struct ImageLine<'a> {
    path: &'a str,
    id: String,
    size: u64,
    role: &'static str,
    owner: Option<&'a str>,
    state: &'static str,
}

impl<'a> From<&'a ImageStatus> for ImageLine<'a> {
    fn from(i: &'a ImageStatus) -> Self {
        let (role, state) = (i.role.as_str(), i.state.as_str());
        Self { path: &i.path, id: i.id.to_string(), size: i.size, role, owner: i.owner.as_deref(), state }
    }
}

pub(super) async fn ls(ask: &Ask) -> CliResult {
    let report = ask.status().await?;
    let images = report.images.iter().map(ImageLine::from).collect();
    ask.output.show(&ImageList { images }, |list| {
        let mut table = Table::new(&["IMAGE", ">SIZE", "ROLE", "OWNER", "STATE"]);
        for i in &list.images {
            table.row([i.path, &ByteSize::new(i.size).human(), i.role, i.owner.unwrap_or("?"), i.state]);
        }
        if table.is_empty() { String::new() } else { table.render() }
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use vmfs_common::{DatastoreId, HostId, ImageId, StoreId};
    use vmfs_replica::api::{Damage, ImageRole, PeerStatus, ScrubStatus, Unopened};

    use super::*;

    pub(crate) fn image(path: &str) -> ImageStatus {
        let member = |host: &str, role, state, lag_bytes| MemberStatus {
            host: host.into(),
            role,
            state,
            seq: 812,
            durable_seq: 800,
            lag_bytes,
        };
        ImageStatus {
            path: path.into(),
            id: ImageId::from_bytes([1; 16]),
            size: 10 << 30,
            stored_bytes: 3 << 20,
            segment_bytes: 5 << 20,
            compacted_bytes: 0,
            role: ImageRole::Owner,
            owner: Some("a".into()),
            epoch: 3,
            seq: 812,
            flushed_seq: 800,
            state: ImageState::Ok,
            reason: None,
            forced: false,
            members: vec![
                member("a", ImageRole::Owner, MemberState::InSync, 0),
                member("b", ImageRole::Replica, MemberState::CatchingUp, 12 << 20),
                member("w", ImageRole::Witness, MemberState::InSync, 0),
            ],
            refusals: BTreeMap::new(),
            forks: 0,
            damage: Damage::default(),
            scrub: ScrubStatus::default(),
        }
    }

    fn report(images: Vec<ImageStatus>) -> StatusReport {
        StatusReport {
            host: "a".into(),
            host_id: HostId::from_bytes([1; 16]),
            store_id: StoreId::from_bytes([2; 16]),
            datastore: DatastoreId::from_bytes([3; 16]),
            mount: Some("/mnt".into()),
            version: "0.1.0".into(),
            peers: vec![PeerStatus {
                host: "b".into(),
                host_id: HostId::from_bytes([4; 16]),
                address: Some("127.0.0.1:1".into()),
                connected: false,
                rtt_us: None,
                error: Some("connection refused".into()),
            }],
            images,
            refusals: BTreeMap::from([("gap".to_owned(), 2)]),
            damage: Damage::default(),
            unopened: vec![],
        }
    }

    #[test]
    fn status_is_aligned_and_says_what_is_wrong() {
        let mut second = image("b.qcow2");
        second.state = ImageState::Stalled;
        second.reason = Some("1 of 3 members reachable".into());
        second.forks = 1;
        second.damage = Damage { found: 3, repaired: 2, open: vec!["block 4".into()] };
        second.scrub = ScrubStatus {
            running: true,
            done_bytes: 1 << 20,
            total_bytes: 2 << 20,
            ..ScrubStatus::default()
        };
        let mut report_of = report(vec![image("vm/a.img"), second]);
        report_of.unopened =
            vec![Unopened { id: ImageId::from_bytes([9; 16]), reason: "the map is damaged".into() }];
        let text = render(&report_of);
        assert_eq!(
            text,
            "host a, /mnt, 0 of 1 peer connected\n\
             \x20 b (127.0.0.1:1) is not connected: connection refused\n\
             \n\
             IMAGE       SIZE  ROLE   OWNER  EPOCH  SEQ  FLUSHED  STATE    OTHER MEMBERS\n\
             vm/a.img  10 GiB  owner  a          3  812      800  ok       b catching-up, 12 MiB behind, w in-sync (witness)\n\
             b.qcow2   10 GiB  owner  a          3  812      800  stalled  b catching-up, 12 MiB behind, w in-sync (witness)\n\
             b.qcow2: stalled: 1 of 3 members reachable\n\
             b.qcow2: 1 fork kept (vmfs forks)\n\
             b.qcow2: 3 damaged places found, 2 repaired\n\
             image 09090909090909090909090909090909 cannot be opened here: the map is damaged\n\
             b.qcow2: being scrubbed, 1 MiB of 2 MiB\n\
             refused: gap 2\n"
        );
        assert!(render(&report(vec![])).ends_with("no images\nrefused: gap 2\n"));
    }

    #[test]
    fn status_json_has_the_keys_of_the_contract() {
        let json = serde_json::to_value(report(vec![image("vm/a.img")])).unwrap();
        let keys = |v: &serde_json::Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        for key in ["host", "mount", "images", "refusals"] {
            assert!(keys(&json).contains(&key.to_owned()), "{key}");
        }
        let image = &json["images"][0];
        for key in [
            "path",
            "id",
            "size",
            "role",
            "owner",
            "epoch",
            "seq",
            "flushed_seq",
            "state",
            "members",
            "refusals",
        ] {
            assert!(keys(image).contains(&key.to_owned()), "{key}");
        }
        for key in ["host", "role", "state", "seq", "durable_seq", "lag_bytes"] {
            assert!(keys(&image["members"][1]).contains(&key.to_owned()), "{key}");
        }
        assert_eq!(image["role"], "owner");
        assert_eq!(image["members"][1]["state"], "catching-up");
        assert_eq!(image["size"], 10_u64 << 30);
        assert_eq!(image["epoch"], 3);
    }
}
