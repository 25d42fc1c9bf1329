//! `vmfs verify`: the retained chain, the content against its digests, and the copies against each
//! other, without moving data.

use std::sync::Arc;
use std::time::Duration;

use vmfs_common::chain::{EpochAudit, EpochSecret, check_extends, check_seal};
use vmfs_common::header::Update;
use vmfs_common::op::Op;
use vmfs_common::policy::MemberRole;
use vmfs_common::state::ImageState;
use vmfs_common::{Digest, Head, Seq};

use super::NodeControl;
use crate::api::{ApiError, Progress, Unit, VerifyCopy, VerifyReport, VerifyRequest};
use crate::node::{Ask, Image, Told};

/// Problems listed in a report.
const PROBLEMS_MAX: usize = 100;
/// How long a member may take to reach the compared update and to hash its map.
const COMPARE_TIMEOUT: Duration = Duration::from_secs(600);

impl NodeControl {
    pub(super) async fn verify(
        &self,
        request: VerifyRequest,
        progress: Progress,
    ) -> Result<VerifyReport, ApiError> {
        let image = self.image(&request.image)?;
        let mut report = VerifyReport {
            image: request.image.clone(),
            ok: false,
            updates: 0,
            epochs_audited: 0,
            bytes_read: 0,
            bad_blocks: 0,
            copies: Vec::new(),
            problems: Vec::new(),
        };
        let (walker, walked) = (image.clone(), progress.clone());
        let chain = tokio::task::spawn_blocking(move || walk_chain(&walker, &walked)).await;
        let chain = chain.map_err(ApiError::failed)?;
        report.updates = chain.updates;
        report.epochs_audited = chain.epochs_audited;
        report.problems = chain.problems;
        if request.deep && image.kind() == MemberRole::Replica {
            self.verify_content(&image, &progress, &mut report).await?;
        }
        self.compare_copies(&image, &progress, &mut report).await;
        report.problems.truncate(PROBLEMS_MAX);
        report.ok = report.problems.is_empty() && report.copies.iter().all(|c| c.same != Some(false));
        Ok(report)
    }

    async fn verify_content(
        &self,
        image: &Arc<Image>,
        progress: &Progress,
        report: &mut VerifyReport,
    ) -> Result<(), ApiError> {
        let (store, progress) = (image.clone(), progress.clone());
        let found = tokio::task::spawn_blocking(move || {
            store.verify_content(&mut |done, total| {
                let block = vmfs_common::BLOCK_BYTES_U64;
                progress.report("hashing", done * block, Some(total * block), Unit::Bytes);
            })
        })
        .await
        .map_err(ApiError::failed)?
        .map_err(ApiError::failed)?;
        report.bytes_read = found.blocks * vmfs_common::BLOCK_BYTES_U64;
        report.bad_blocks = found.bad_blocks.len() as u64;
        let bad_block = found.bad_blocks.iter().map(|b| format!("block {} does not match its digest", b.0));
        let bad_update = found.bad_updates.iter().map(|s| format!("update {s} of the log is damaged"));
        report.problems.extend(bad_block.chain(bad_update).take(PROBLEMS_MAX));
        // What else was found and is not repaired.
        let open = image.rot().open.into_iter().filter(|w| !w.starts_with("block "));
        report.problems.extend(open.map(|what| format!("damaged: {what}")).take(PROBLEMS_MAX));
        // Reading a damaged block is what starts its repair.
        image.ask_for_repair(&found.bad_blocks);
        Ok(())
    }

    async fn compare_copies(&self, image: &Arc<Image>, progress: &Progress, report: &mut VerifyReport) {
        let state = image.state();
        let me = self.node.identity.host;
        let copy = |note: Option<String>, seq, same| VerifyCopy {
            host: self.node.config.host.as_str().to_owned(),
            seq,
            same,
            note,
        };
        let others: Vec<_> = state.members.data_members().filter(|m| m.host != me).collect();
        for m in &others {
            // Best effort: a member that cannot be asked is reported below.
            let _ = self.node.ask(m.host, &Ask::PinSeal { image: image.id }).await;
        }
        let sealed = image.seal_and_merkle().await;
        let (head, root) = match sealed {
            Ok(s) => s,
            Err(why) => {
                let head = image.state().head().seq.0;
                report.copies.push(copy(
                    Some(format!("not compared with other hosts: {why}")),
                    Some(head),
                    None,
                ));
                return;
            }
        };
        report.copies.push(copy(None, Some(head.seq.0), Some(true)));
        let total = others.len() as u64;
        for (done, member) in others.iter().enumerate() {
            progress.report("comparing copies", done as u64, Some(total), Unit::Members);
            let found = self.compare_one(image, member.host, head, root).await;
            if found.same == Some(false) {
                report.problems.push(format!("the copy on {} differs", found.host));
            }
            report.copies.push(found);
        }
    }

    async fn compare_one(
        &self,
        image: &Arc<Image>,
        host: vmfs_common::HostId,
        head: Head,
        root: Digest,
    ) -> VerifyCopy {
        let name = self.node.host_name(host);
        let ask = Ask::MerkleAt { image: image.id, head };
        let until = tokio::time::Instant::now() + COMPARE_TIMEOUT;
        let mut note = "timed out".to_owned();
        while tokio::time::Instant::now() < until {
            match self.node.ask(host, &ask).await {
                Ok((Told::Merkle { root: theirs, .. }, _)) => {
                    let same = Some(theirs == root);
                    return VerifyCopy { host: name, seq: Some(head.seq.0), same, note: None };
                }
                Ok((Told::NotYet, _)) => {}
                Ok(_) => {
                    note = "its copy could not be compared at this update".to_owned();
                    break;
                }
                Err(e) if self.node.network().is_connected(host) => note = e,
                Err(e) => {
                    note = e;
                    break;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        VerifyCopy { host: name, seq: None, same: None, note: Some(note) }
    }
}

#[derive(Default)]
struct Walk {
    updates: u64,
    epochs_audited: u64,
    problems: Vec<String>,
}

/// Walks the retained log: each update must extend the one before by the chain's rules, each
/// certificate and Seal must verify, and each ended epoch whose secret was published is audited.
fn walk_chain(image: &Image, progress: &Progress) -> Walk {
    let (from, head) = (image.log_start(), image.state().head().seq);
    let mut walk = Walk::default();
    let mut epoch: Vec<Update> = Vec::new();
    let mut before: Option<(ImageState, Update)> = None;
    for seq in from.0..=head.0 {
        let update = match image.update_at(Seq(seq)) {
            Ok(Some(u)) => u,
            // Given back while we walked: what is left begins later.
            Ok(None) if Seq(seq) < image.log_start() => {
                (before, walk.updates) = (None, 0);
                epoch.clear();
                continue;
            }
            Ok(None) => {
                walk.problems.push(format!("update {seq} is missing from the log"));
                return walk;
            }
            Err(e) => {
                walk.problems.push(format!("update {seq} cannot be read: {e}"));
                return walk;
            }
        };
        if let Some((state, last)) = &mut before {
            if let Err(why) = check_one(state, last, &update) {
                walk.problems.push(format!("update {seq}: {why}"));
            }
            state.apply(&update);
        } else {
            let mut state = ImageState::new(image.id);
            state.apply(&update);
            before = Some((state, update.clone()));
        }
        if let Op::EpochStart(start) = &update.header.op {
            audit(&mut walk, &epoch, start.published);
            epoch.clear();
            epoch.push(update.clone());
        } else if !epoch.is_empty() {
            epoch.push(update.clone());
        }
        if let Some((_, last)) = &mut before {
            *last = update;
        }
        walk.updates += 1;
        if walk.updates.is_multiple_of(1024) {
            progress.report("checking the chain", walk.updates, Some(head.0 + 1 - from.0), Unit::Updates);
        }
        if walk.problems.len() >= PROBLEMS_MAX {
            return walk;
        }
    }
    walk
}

fn check_one(state: &ImageState, last: &Update, update: &Update) -> Result<(), String> {
    let tip = vmfs_common::chain::Tip::of(last);
    if let Op::EpochStart(start) = &update.header.op {
        if update.header.parent != last.digest || update.header.seq != last.header.seq.next() {
            return Err("the parent is not the update before it".to_owned());
        }
        // Where the log begins in the middle, the member list at its start is not known from it.
        if state.members.is_empty() {
            return Ok(());
        }
        return start.verify(update.header.seq, &last.head(), &state.members).map_err(|e| e.to_string());
    }
    check_extends(&tip, update.header.image, update).map_err(|e| e.to_string())?;
    if let (Op::Seal(_), Some(owner)) = (&update.header.op, state.members.get(update.header.epoch.host)) {
        check_seal(update, &owner.key).map_err(|e| e.to_string())?;
    }
    Ok(())
}

fn audit(walk: &mut Walk, epoch: &[Update], published: Option<[u8; 32]>) {
    let (Some(secret), Some((first, rest))) = (published, epoch.split_first()) else { return };
    let audited = EpochAudit::begin(EpochSecret::from_bytes(secret), first)
        .and_then(|mut audit| rest.iter().try_for_each(|u| audit.next(u)));
    match audited {
        Ok(()) => walk.epochs_audited += 1,
        Err(why) => walk.problems.push(format!("epoch {}: {why}", first.header.epoch.number)),
    }
}
