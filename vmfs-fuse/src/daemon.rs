//! The `vmfs-fuse` daemon of a hypervisor host: the engine with a mount on top.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::Parser;
use vmfs_common::config::Config;
use vmfs_net::HostRole;
use vmfs_replica::node::Node;
use vmfs_store::disk::FileDisk;

use crate::catalog::{Catalog, Meta};
use crate::fs::{Fs, Options};
use crate::mount::{self, Detached, MountOptions, Mounted};
use crate::node_backend::NodeBackend;

/// How long a stopping daemon lets open files end.
const DETACH_GRACE: Duration = Duration::from_secs(5);

#[derive(Debug, Parser)]
#[command(version, about = "Mounts VMFS images and keeps copies of those of other hosts")]
struct Arguments {
    /// Configuration of this host (see examples/vmfs.toml)
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

/// The program. Exit codes as [`vmfs_replica::daemon::main`].
#[must_use]
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(a) => a,
        Err(e) => return vmfs_replica::daemon::usage(&e),
    };
    let roles = |config: &Config| {
        let mount = config.mount.as_ref().context("[mount] is missing: without a mount use vmfs-replica")?;
        // Before anything is opened or made: a wrong mount point is to leave no trace.
        mount::check_point(&mount.point)?;
        Ok(vec![HostRole::Mount, HostRole::Replica, HostRole::Witness])
    };
    vmfs_replica::daemon::run(&arguments.config, roles, attach)
}

/// The mount while it lasts; dropped, it is detached.
struct Attached {
    mounted: Option<Mounted>,
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Some(mounted) = self.mounted.take() else { return };
        match mounted.detach(DETACH_GRACE) {
            Ok(Detached::Gone) => tracing::info!("unmounted"),
            Ok(Detached::Busy) => tracing::warn!("unmounted; files in it were still open"),
            Ok(Detached::Covered) => {
                tracing::warn!("another file system is mounted over ours: left as it is");
            }
            Err(e) => tracing::error!("cannot unmount: {e}"),
        }
    }
}

fn attach(node: &Node, config: &Config) -> anyhow::Result<Attached> {
    let section = config.mount.as_ref().context("[mount] is missing")?;
    let dir = config.store.dir.join("catalog");
    let disk = FileDisk::open(&dir).with_context(|| format!("catalog {}", dir.display()))?;
    let options = Options {
        stall_timeout: Duration::from_millis(config.replication.stall_timeout.millis()),
        ..Options::default()
    };
    let root = Meta { attrs: options.root, ctime_ns: options.root.mtime_ns, ..Meta::default() };
    let catalog =
        Catalog::open(Arc::new(disk), &root).with_context(|| format!("catalog {}", dir.display()))?;
    let catalog = Arc::new(catalog);
    if catalog.was_mended() {
        node.note_mended("the catalog");
    }
    let scrubbed = Arc::clone(&catalog);
    node.also_scrub("the catalog", move || scrubbed.scrub().map_err(|e| e.to_string()));
    let backend = Arc::new(NodeBackend::new(node.clone()));
    let fs = Fs::start(backend, catalog, options).context("cannot start threads")?;
    let mut how = MountOptions::new(&section.point);
    how.allow_other = section.allow_other;
    let mounted = mount::mount(&fs, &how)?;
    Ok(Attached { mounted: Some(mounted) })
}
