//! `vmfs scrub`, and what `status` says of scrubs and damage.

use std::sync::Arc;
use std::time::Instant;

use vmfs_store::Rot;

use super::{NodeControl, POLL, ms};
use crate::api::{ApiError, Damage, Progress, ScrubReport, ScrubRequest, ScrubStatus, ScrubbedImage, Unit};
use crate::node::Image;

/// Damaged places named in a document.
const OPEN_MAX: usize = 20;

/// What is known of damage, for a document.
pub(super) fn damage(rot: Rot) -> Damage {
    let mut open = rot.open;
    if open.len() > OPEN_MAX {
        let more = open.len() - (OPEN_MAX - 1);
        open.truncate(OPEN_MAX - 1);
        open.push(format!("and {more} more"));
    }
    Damage { found: rot.found, repaired: rot.repaired, open }
}

impl NodeControl {
    pub(super) fn scrub_status(&self, image: &Image) -> ScrubStatus {
        let state = self.node.scrubs.state(image.id);
        let running = state.running.unwrap_or_default();
        ScrubStatus {
            running: state.running.is_some(),
            done_bytes: running.done_bytes,
            total_bytes: running.total_bytes,
            finished_ms: state.ended_ms,
            error: state.error,
        }
    }

    /// Has images scrubbed and waits for it. They are asked for one after the other, so that a client that
    /// goes away leaves no more than one under way.
    pub(super) async fn scrub(
        &self,
        request: ScrubRequest,
        progress: Progress,
    ) -> Result<ScrubReport, ApiError> {
        let images = match &request.image {
            Some(path) => vec![self.image(path)?],
            None => self.node.images().into_iter().filter(|i| !i.state().unlinked).collect(),
        };
        let begun = Instant::now();
        let mut report = ScrubReport { ok: true, bytes_read: 0, elapsed_ms: 0, images: Vec::new() };
        for image in images {
            let one = self.scrub_one(&image, request.rate_bytes, &progress).await?;
            report.ok &= one.open.is_empty() && one.error.is_none();
            report.bytes_read += one.bytes_read;
            report.images.push(one);
        }
        report.elapsed_ms = ms(begun);
        Ok(report)
    }

    async fn scrub_one(
        &self,
        image: &Arc<Image>,
        rate: Option<u64>,
        progress: &Progress,
    ) -> Result<ScrubbedImage, ApiError> {
        let path = image.state().path.clone().unwrap_or_else(|| format!("({})", image.id.short()));
        let stage = format!("scrubbing {path}");
        let before = image.rot();
        let finished = self.node.scrubs.ask(image.id, rate);
        let mut stopping = self.node.stopping();
        loop {
            let state = self.node.scrubs.state(image.id);
            if state.finished > finished {
                let rot = image.rot();
                return Ok(ScrubbedImage {
                    image: path,
                    bytes_read: state.last_read_bytes,
                    found: rot.found - before.found,
                    repaired: rot.repaired - before.repaired,
                    open: damage(rot).open,
                    error: state.error,
                });
            }
            if *stopping.borrow_and_update() || self.node.image(image.id).is_none() {
                return Err(ApiError::failed(format!("{path}: the scrub was stopped")));
            }
            if let Some(p) = state.running {
                progress.report(stage.clone(), p.done_bytes, Some(p.total_bytes), Unit::Bytes);
            }
            tokio::time::sleep(POLL).await;
        }
    }
}
