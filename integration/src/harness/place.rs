//! Where the tests of foreign tools work: a new cluster's mount, or any directory.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::cluster::Cluster;
use super::reaper::Reaper;

/// A directory under test. `VMFS_TEST_MOUNT=DIR` replaces the cluster by a plain directory, which is how
/// the tests themselves are tested (they must pass on ext4).
#[derive(Debug)]
pub struct Place {
    mount: PathBuf,
    scratch: PathBuf,
    cluster: Option<Cluster>,
    reaper: Option<Reaper>,
}

impl Place {
    /// A mount (of host a) with nothing in it.
    #[must_use]
    pub fn new(name: &str) -> Self {
        if let Some(base) = std::env::var_os("VMFS_TEST_MOUNT") {
            return Self::plain(name, Path::new(&base));
        }
        let cluster = Cluster::start(name);
        Self { mount: cluster.mnt("a"), scratch: cluster.scratch(), cluster: Some(cluster), reaper: None }
    }

    /// A plain directory below `base`, for tests that need no mount.
    #[must_use]
    pub fn plain(name: &str, base: &Path) -> Self {
        let mut reaper = Reaper::new(name);
        let unique = reaper.dir().file_name().expect("invariant: the reaper's directory has a name");
        let mount = base.join(unique).join("plain");
        std::fs::create_dir_all(&mount).unwrap_or_else(|e| panic!("{}: {e}", mount.display()));
        for dir in [&mount, &base.join(unique)] {
            std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).expect("it is ours");
        }
        reaper.at_end(&format!("rm -rf --one-file-system '{}'", base.join(unique).display()));
        Self { mount, scratch: reaper.dir().to_owned(), cluster: None, reaper: Some(reaper) }
    }

    /// The directory under test.
    #[must_use]
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// A path in it, as text for a command line.
    #[must_use]
    pub fn path(&self, name: &str) -> String {
        self.mount.join(name).to_str().expect("paths of these tests are text").to_owned()
    }

    /// A path on an ordinary filesystem, as text for a command line.
    #[must_use]
    pub fn outside(&self, name: &str) -> String {
        self.scratch.join(name).to_str().expect("paths of these tests are text").to_owned()
    }

    /// The cluster, unless this is a plain directory.
    #[must_use]
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// Has `command` (one line of shell) run at the end.
    pub fn at_end(&mut self, command: &str) {
        match (&mut self.cluster, &mut self.reaper) {
            (Some(cluster), _) => cluster.at_end(command),
            (None, Some(reaper)) => reaper.at_end(command),
            (None, None) => unreachable!("invariant: a place has a cluster or a reaper"),
        }
    }

    /// The end of every tool test: every image that the tool left has the same bytes on all hosts, passes
    /// `vmfs verify`, and no frame was refused.
    #[track_caller]
    pub fn assert_replicated(&self) {
        let Some(cluster) = &self.cluster else { return };
        for image in cluster.status("a").images {
            cluster.assert_copies_identical(&image.path);
            for host in cluster.hosts() {
                let refusals = cluster.image(host, &image.path).expect("the image is known").refusals;
                assert!(
                    refusals.values().all(|&n| n == 0),
                    "{host} refused updates of {}: {refusals:?}",
                    image.path
                );
            }
        }
    }
}
