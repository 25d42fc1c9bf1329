//! Prometheus text exposition.

use std::fmt::Write as _;

use super::NodeControl;
use crate::api::{ImageStatus, StatusReport};

/// Labels and value of one line.
type Row = (String, u64);
/// Writes a family: its name, kind and help, and its lines.
type Family<'a> = &'a mut dyn FnMut(&str, &str, &str, Vec<Row>);

impl NodeControl {
    pub(super) fn metrics_text(&self) -> String {
        let status = self.status_report();
        let mut t = String::new();
        let mut family = |name: &str, kind: &str, help: &str, rows: Vec<Row>| {
            let _ = writeln!(t, "# HELP vmfs_{name} {help}\n# TYPE vmfs_{name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(t, "vmfs_{name}{labels} {value}");
            }
        };
        let image = |path: &str| format!("{{image=\"{}\"}}", escape(path));
        let each = |f: &dyn Fn(&ImageStatus) -> u64| {
            status.images.iter().map(|i| (image(&i.path), f(i))).collect::<Vec<_>>()
        };
        family("image_size_bytes", "gauge", "Size of the image.", each(&|i| i.size));
        family("image_stored_bytes", "gauge", "Bytes of blocks that hold data.", each(&|i| i.stored_bytes));
        let segments = "Bytes of segments: data, log, and what is superseded and not yet given back.";
        family("image_segment_bytes", "gauge", segments, each(&|i| i.segment_bytes));
        let compacted = "Bytes moved by compaction.";
        family("image_compacted_bytes_total", "counter", compacted, each(&|i| i.compacted_bytes));
        family("image_seq", "counter", "Last update of this copy.", each(&|i| i.seq));
        family(
            "image_flushed_seq",
            "counter",
            "Last update acknowledged by a flush.",
            each(&|i| i.flushed_seq),
        );
        family("image_epoch", "counter", "Epoch of the image.", each(&|i| i.epoch));
        family("image_forks", "gauge", "Forks kept here.", each(&|i| i.forks));
        damage(&status, &mut family);
        let states = status.images.iter().map(|i| {
            (format!("{{image=\"{}\",state=\"{}\",role=\"{}\"}}", escape(&i.path), i.state, i.role), 1)
        });
        family("image_state", "gauge", "1 for the state the image is in.", states.collect());
        let lags = status.images.iter().flat_map(|i| {
            i.members.iter().map(|m| {
                let labels = format!("{{image=\"{}\",member=\"{}\"}}", escape(&i.path), escape(&m.host));
                (labels, m.lag_bytes)
            })
        });
        family("member_lag_bytes", "gauge", "Bytes a member has not made durable.", lags.collect());
        let refusals = status.refusals.iter().map(|(k, v)| (format!("{{reason=\"{}\"}}", escape(k)), *v));
        family("refusals_total", "counter", "What this host refused, by reason.", refusals.collect());
        let peers = status
            .peers
            .iter()
            .map(|p| (format!("{{peer=\"{}\"}}", escape(&p.host)), u64::from(p.connected)));
        family("peer_connected", "gauge", "1 while there is a connection.", peers.collect());
        let (free, total) = self.node.space();
        family("store_free_bytes", "gauge", "Bytes free for data.", vec![(String::new(), free)]);
        family("store_size_bytes", "gauge", "Size of the store's file system.", vec![(String::new(), total)]);
        t
    }
}

/// Damage found on this host's disk, and the scrubs that look for it.
fn damage(status: &StatusReport, family: Family<'_>) {
    let each = |f: &dyn Fn(&ImageStatus) -> u64| {
        let row = |i: &ImageStatus| (format!("{{image=\"{}\"}}", escape(&i.path)), f(i));
        status.images.iter().map(row).collect::<Vec<_>>()
    };
    let found = "Damaged places found in this copy.";
    family("image_damage_found_total", "counter", found, each(&|i| i.damage.found));
    let repaired = "Damaged places that were repaired.";
    family("image_damage_repaired_total", "counter", repaired, each(&|i| i.damage.repaired));
    let open = "Damaged places not repaired yet (at most 20 are counted).";
    family("image_damage_open", "gauge", open, each(&|i| i.damage.open.len() as u64));
    family("image_scrub_running", "gauge", "1 while it is scrubbed.", each(&|i| i.scrub.running.into()));
    family("image_scrub_done_bytes", "gauge", "How far the scrub is.", each(&|i| i.scrub.done_bytes));
    family("image_scrub_total_bytes", "gauge", "Of how much.", each(&|i| i.scrub.total_bytes));
    let ended = "When the last scrub ended, seconds since 1970; 0 for never.";
    let ended_s = each(&|i| i.scrub.finished_ms.unwrap_or(0) / 1000);
    family("image_scrub_finished_seconds", "gauge", ended, ended_s);
    let of_store = |n: u64| vec![(String::new(), n)];
    let shared = &status.damage;
    family("store_damage_found_total", "counter", "Damage in what all images share.", of_store(shared.found));
    family("store_damage_repaired_total", "counter", "Of that, repaired.", of_store(shared.repaired));
    let unopened = "Images whose files here cannot be opened.";
    family("store_images_unopened", "gauge", unopened, of_store(status.unopened.len() as u64));
}

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
