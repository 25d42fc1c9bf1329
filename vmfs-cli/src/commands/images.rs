//! Commands about one image.

use vmfs_common::config::{ByteSize, HostName, TimeSpan};
use vmfs_replica::api::{
    AbandonReport, AbandonRequest, FailReport, HandoverReport, HandoverRequest, ImageInfo, ImageStatus,
    PolicyReport, PolicySetRequest, PromoteReport, PromoteRequest, ReplicaAddRequest, ReplicaRemoveRequest,
    ReplicaReport, VerifyReport, VerifyRequest, WaitReport, WaitRequest,
};

use super::Ask;
use super::forks::forks_table;
use super::status::count;
use crate::args::{PolicyCommand, ReplicaCommand};
use crate::clock::utc;
use crate::error::{CliError, CliResult};
use crate::progress::{ProgressLine, human_seconds};
use crate::table::{Table, pairs};

impl Ask {
    /// A long question, with progress on a terminal.
    pub(super) async fn long<T: serde::de::DeserializeOwned>(
        &self,
        path: &str,
        request: &impl serde::Serialize,
    ) -> CliResult<T> {
        let mut line = ProgressLine::new();
        self.client.post_streamed(path, request, |event| line.show(event)).await
    }
}

pub(super) async fn info(ask: &Ask, image: &str) -> CliResult {
    let info: ImageInfo = ask.client.get_image("/v1/image", &ask.image(image).await?).await?;
    ask.output.show(&info, render_info)
}

fn render_info(info: &ImageInfo) -> String {
    let s = &info.status;
    let state = s.reason.as_ref().map_or_else(|| s.state.to_string(), |r| format!("{} ({r})", s.state));
    let mut out = pairs(&[
        ("image", s.path.clone()),
        ("id", s.id.to_string()),
        ("size", format!("{} ({} bytes)", ByteSize::new(s.size).human(), s.size)),
        ("stored here", ByteSize::new(s.stored_bytes).human()),
        ("segments here", ByteSize::new(s.segment_bytes).human()),
        ("state", state),
        ("role here", s.role.to_string()),
        ("owner", s.owner.clone().unwrap_or_else(|| "unknown".to_owned())),
        (
            "epoch",
            format!("{}{}", s.epoch, if s.forced { ", separate lineage (forced promotion)" } else { "" }),
        ),
        ("last update", format!("{} at {}", s.seq, utc(info.last_update_ms))),
        ("last flush", s.flushed_seq.to_string()),
        ("log from", info.log_start_seq.to_string()),
        ("head", info.head_digest.clone()),
        ("flushes", policy_text(&info.policy)),
    ]);
    let mut members = Table::new(&["MEMBER", "ROLE", "STATE", ">SEQ", ">DURABLE", ">BEHIND"]);
    for m in &s.members {
        members.row([
            m.host.clone(),
            m.role.to_string(),
            m.state.to_string(),
            m.seq.to_string(),
            m.durable_seq.to_string(),
            ByteSize::new(m.lag_bytes).human(),
        ]);
    }
    out.push('\n');
    out.push_str(&members.render());
    if !info.fork_list.is_empty() {
        out.push('\n');
        out.push_str(&forks_table(&info.fork_list));
    }
    out.push_str(&scrub_text(s));
    for (reason, n) in &s.refusals {
        out.push_str(&format!("refused: {reason} {n}\n"));
    }
    out
}

/// The last scrub, and damage.
fn scrub_text(s: &ImageStatus) -> String {
    let last = s.scrub.finished_ms.map_or_else(|| "never".to_owned(), utc);
    let mut out = format!("last scrub: {last}");
    if s.scrub.running {
        let (done, total) = (ByteSize::new(s.scrub.done_bytes), ByteSize::new(s.scrub.total_bytes));
        out.push_str(&format!(", running: {} of {}", done.human(), total.human()));
    }
    if let Some(error) = &s.scrub.error {
        out.push_str(&format!(", given up: {error}"));
    }
    out.push('\n');
    if s.damage.found > 0 {
        out.push_str(&format!("damage: {} found, {} repaired\n", s.damage.found, s.damage.repaired));
    }
    for what in &s.damage.open {
        out.push_str(&format!("damaged: {what}\n"));
    }
    out
}

/// The rules in words.
fn policy_text(policy: &PolicyReport) -> String {
    use vmfs_common::policy::{Acks, OnQuorumLoss};
    let acks = match policy.acks {
        Acks::Majority => format!(
            "wait for {} of {} members, data on {}",
            policy.quorum,
            policy.members.len(),
            policy.data_copies
        ),
        Acks::Local => "wait for the owner's disk only".to_owned(),
        Acks::All => format!("wait for all {} members", policy.members.len()),
    };
    let loss = match policy.on_quorum_loss {
        OnQuorumLoss::Stall => "stall without a quorum",
        OnQuorumLoss::Degrade => "go on with fewer copies without a quorum",
    };
    format!("{acks}; {loss}")
}

pub(super) async fn promote(ask: &Ask, image: &str, force: bool, members: &[HostName]) -> CliResult {
    let image = ask.image(image).await?;
    let members = members.iter().map(ToString::to_string).collect();
    let report: PromoteReport = ask.long("/v1/promote", &PromoteRequest { image, force, members }).await?;
    ask.output.show(&report, |r| {
        let lineage = if r.forced { ", in a separate lineage" } else { "" };
        let warning = r.warning.as_ref().map_or_else(String::new, |w| format!("{}: {w}\n", r.image));
        format!(
            "{}: owned by this host since epoch {}{lineage} ({} ms); {}\n{warning}",
            r.image, r.epoch, r.elapsed_ms, r.loss
        )
    })
}

pub(super) async fn handover(ask: &Ask, image: &str, to: &HostName) -> CliResult {
    let request = HandoverRequest { image: ask.image(image).await?, to: to.to_string() };
    let report: HandoverReport = ask.long("/v1/handover", &request).await?;
    ask.output.show(&report, |r| {
        format!("{}: owned by {} since epoch {} (pause {} ms)\n", r.image, r.owner, r.epoch, r.pause_ms)
    })
}

pub(super) async fn verify(ask: &Ask, image: &str, deep: bool) -> CliResult {
    let request = VerifyRequest { image: ask.image(image).await?, deep };
    let report: VerifyReport = ask.long("/v1/verify", &request).await?;
    ask.output.show(&report, render_verify)?;
    if report.ok {
        return Ok(());
    }
    let first = report.problems.first().map_or("the copies differ", String::as_str);
    let more = report.problems.len().saturating_sub(1);
    let more = if more == 0 { String::new() } else { format!(" (and {more} more)") };
    Err(CliError::failed(format!("{}: {first}{more}", report.image)))
}

fn render_verify(report: &VerifyReport) -> String {
    let mut table = Table::new(&["COPY", ">SEQ", "SAME", "NOTE"]);
    for copy in &report.copies {
        let same = match copy.same {
            Some(true) => "yes",
            Some(false) => "NO",
            None => "-",
        };
        let seq = copy.seq.map_or_else(|| "-".to_owned(), |s| s.to_string());
        table.row([copy.host.as_str(), &seq, same, copy.note.as_deref().unwrap_or("")]);
    }
    let mut out = table.render();
    out.push_str(&format!(
        "{} checked, {} audited",
        count(report.updates, "update"),
        count(report.epochs_audited, "ended epoch")
    ));
    if report.bytes_read > 0 {
        out.push_str(&format!(
            ", {} read, {}",
            ByteSize::new(report.bytes_read).human(),
            count(report.bad_blocks, "bad block")
        ));
    }
    out.push('\n');
    for problem in &report.problems {
        out.push_str(&format!("problem: {problem}\n"));
    }
    out
}

pub(super) async fn replica(ask: &Ask, command: ReplicaCommand) -> CliResult {
    let report: ReplicaReport = match command {
        ReplicaCommand::Add { image, host, witness } => {
            let request =
                ReplicaAddRequest { image: ask.image(&image).await?, host: host.to_string(), witness };
            ask.long("/v1/replica/add", &request).await?
        }
        ReplicaCommand::Remove { image, host } => {
            let request = ReplicaRemoveRequest { image: ask.image(&image).await?, host: host.to_string() };
            ask.long("/v1/replica/remove", &request).await?
        }
    };
    ask.output.show(&report, |r| {
        let members: Vec<_> = r.members.iter().map(|m| format!("{} {}", m.host, m.role)).collect();
        format!("{}: members since update {}: {}\n", r.image, r.seq, members.join(", "))
    })
}

pub(super) async fn wait(ask: &Ask, image: &str, in_sync: bool, timeout: Option<TimeSpan>) -> CliResult {
    let request =
        WaitRequest { image: ask.image(image).await?, in_sync, timeout_ms: timeout.map(TimeSpan::millis) };
    let report: WaitReport = ask.long("/v1/wait", &request).await?;
    ask.output.show(&report, |r| {
        let what = if in_sync { "in sync" } else { "there" };
        format!(
            "{}: {what} at update {} ({})\n",
            r.status.path,
            r.status.seq,
            human_seconds(r.waited_ms / 1000)
        )
    })
}

pub(super) async fn fail(ask: &Ask, image: &str) -> CliResult {
    let report: FailReport = ask.client.post("/v1/fail", &ask.image_request(image).await?).await?;
    ask.output
        .show(&report, |r| format!("{}: {} failed\n", r.image, count(r.failed_requests, "waiting request")))
}

pub(super) async fn abandon(ask: &Ask, image: &str, discard: bool) -> CliResult {
    let request = AbandonRequest { image: ask.image(image).await?, discard };
    let report: AbandonReport = ask.client.post("/v1/abandon", &request).await?;
    ask.output.show(&report, |r| match r.discarded {
        true => format!("{}: the copy of this host is dropped\n", r.image),
        false => format!("{}: the separate lineage is given up; what it alone had is a fork\n", r.image),
    })
}

pub(super) async fn policy(ask: &Ask, command: PolicyCommand) -> CliResult {
    let report: PolicyReport = match command {
        PolicyCommand::Show { image } => {
            ask.client.get_image("/v1/policy", &ask.image(&image).await?).await?
        }
        PolicyCommand::Set { image, acks, on_quorum_loss } => {
            let request = PolicySetRequest {
                image: ask.image(&image).await?,
                acks: acks.map(Into::into),
                on_quorum_loss: on_quorum_loss.map(Into::into),
            };
            ask.client.post("/v1/policy", &request).await?
        }
    };
    ask.output.show(&report, |r| {
        let members: Vec<_> = r.members.iter().map(|m| format!("{} {}", m.host, m.role)).collect();
        pairs(&[
            ("image", r.image.clone()),
            ("members", members.join(", ")),
            ("acks", word(&r.acks)),
            ("on-quorum-loss", word(&r.on_quorum_loss)),
            ("flushes", policy_text(r)),
        ])
    })
}

/// The word that an enum has in the JSON documents and on the command line.
fn word(value: &impl serde::Serialize) -> String {
    let json = serde_json::to_value(value).unwrap_or_default();
    json.as_str().unwrap_or("?").to_owned()
}

#[cfg(test)]
mod tests {
    use vmfs_common::policy::{Acks, OnQuorumLoss};
    use vmfs_replica::api::{ImageRole, MemberName, VerifyCopy};

    use super::*;

    #[test]
    fn rules_are_said_in_words() {
        let member = |host: &str| MemberName { host: host.into(), role: ImageRole::Replica };
        let mut policy = PolicyReport {
            image: "x".into(),
            acks: Acks::Majority,
            on_quorum_loss: OnQuorumLoss::Stall,
            members: vec![member("a"), member("b"), member("c")],
            quorum: 2,
            data_copies: 2,
        };
        assert_eq!(policy_text(&policy), "wait for 2 of 3 members, data on 2; stall without a quorum");
        policy.acks = Acks::All;
        assert!(policy_text(&policy).starts_with("wait for all 3 members"));
        assert_eq!((word(&Acks::Local), word(&OnQuorumLoss::Degrade)), ("local".into(), "degrade".into()));
    }

    #[test]
    fn info_shows_members_and_flattens_in_json() {
        let info = ImageInfo {
            status: crate::commands::status::tests::image("vm/a.img"),
            policy: PolicyReport {
                image: "vm/a.img".into(),
                acks: Acks::Majority,
                on_quorum_loss: OnQuorumLoss::Stall,
                members: vec![],
                quorum: 2,
                data_copies: 2,
            },
            fork_list: vec![],
            head_digest: "ab".into(),
            log_start_seq: 1,
            last_update_ms: 0,
        };
        let text = render_info(&info);
        assert!(text.contains("last update:    812 at 1970-01-01 00:00:00 UTC\n"), "{text}");
        assert!(text.contains("b       replica  catching-up  812      800  12 MiB\n"), "{text}");
        let json = serde_json::to_value(&info).unwrap();
        assert_eq!((&json["path"], &json["policy"]["quorum"]), (&"vm/a.img".into(), &2.into()));
        assert_eq!(serde_json::from_value::<ImageInfo>(json).unwrap(), info);
    }

    #[test]
    fn verification_shows_every_copy() {
        let copy = |host: &str, seq, same, note: Option<&str>| VerifyCopy {
            host: host.into(),
            seq,
            same,
            note: note.map(Into::into),
        };
        let report = VerifyReport {
            image: "x".into(),
            ok: false,
            updates: 1,
            epochs_audited: 2,
            bytes_read: 4096,
            bad_blocks: 1,
            copies: vec![copy("a", Some(5), Some(false), None), copy("b", None, None, Some("offline"))],
            problems: vec!["block 7 is bad".into()],
        };
        assert_eq!(
            render_verify(&report),
            "COPY  SEQ  SAME  NOTE\n\
             a       5  NO\n\
             b       -  -     offline\n\
             1 update checked, 2 ended epochs audited, 4 KiB read, 1 bad block\n\
             problem: block 7 is bad\n"
        );
    }
}
