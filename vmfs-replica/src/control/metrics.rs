//! Prometheus text exposition.

use std::fmt::Write as _;

use super::NodeControl;

impl NodeControl {
    pub(super) fn metrics_text(&self) -> String {
        let status = self.status_report();
        let mut t = String::new();
        let mut family = |name: &str, kind: &str, help: &str, rows: Vec<(String, u64)>| {
            let _ = writeln!(t, "# HELP vmfs_{name} {help}\n# TYPE vmfs_{name} {kind}");
            for (labels, value) in rows {
                let _ = writeln!(t, "vmfs_{name}{labels} {value}");
            }
        };
        let image = |path: &str| format!("{{image=\"{}\"}}", escape(path));
        let each = |f: &dyn Fn(&crate::api::ImageStatus) -> u64| {
            status.images.iter().map(|i| (image(&i.path), f(i))).collect::<Vec<_>>()
        };
        family("image_size_bytes", "gauge", "Size of the image.", each(&|i| i.size));
        family("image_stored_bytes", "gauge", "Bytes of blocks that hold data.", each(&|i| i.stored_bytes));
        family("image_seq", "counter", "Last update of this copy.", each(&|i| i.seq));
        family(
            "image_flushed_seq",
            "counter",
            "Last update acknowledged by a flush.",
            each(&|i| i.flushed_seq),
        );
        family("image_epoch", "counter", "Epoch of the image.", each(&|i| i.epoch));
        family("image_forks", "gauge", "Forks kept here.", each(&|i| i.forks));
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

fn escape(label: &str) -> String {
    label.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
