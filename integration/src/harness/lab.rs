//! A "host" in namespaces of its own with a libvirtd, made by `../shared/guest/lab.sh`.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::command::{Ran, try_run};
use super::guest::{Kit, shared};
use super::place::Place;

const HOST: &str = "h";

/// One host with libvirt, which sees the mounts that existed when it was made.
#[derive(Debug)]
pub struct Lab {
    work: PathBuf,
    name: String,
}

impl Lab {
    /// Makes the host and starts libvirtd in it. It ends with `place`.
    #[must_use]
    pub fn with_libvirt(place: &mut Place) -> Self {
        let work = PathBuf::from(place.outside("lab"));
        std::fs::create_dir_all(&work).expect("the scratch directory is ours");
        let guest = Kit::get().work_dir().join("guest");
        std::os::unix::fs::symlink(guest, work.join("guest")).expect("the scratch directory is ours");
        // Interface names have 15 bytes, and others may have a lab too.
        let name = format!("vt{:x}", std::process::id());
        place.at_end(&format!("ip netns del {name}-{HOST}"));
        place.at_end(&format!("ip link del {name}br"));
        let lab = Self { work, name };
        let _ = try_run(lab.script(&["up", HOST, "1"])).ok();
        let _ = try_run(lab.script(&["libvirt", HOST])).ok();
        lab
    }

    fn script(&self, args: &[&str]) -> Command {
        let mut command = Command::new(shared("guest/lab.sh"));
        command.env("WORK", &self.work).env("LAB", &self.name).env("LABNET", "10.97.0").args(args);
        command
    }

    /// Runs `virsh` in the host, however it ends.
    #[must_use]
    pub fn try_virsh(&self, args: &[&str]) -> Ran {
        let mut words = vec!["in", HOST, "virsh", "-q", "-c", "qemu:///system"];
        words.extend(args);
        try_run(self.script(&words))
    }

    /// Runs `virsh` in the host; panics unless it succeeds. Returns what it printed.
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> String {
        self.try_virsh(args).ok().stdout
    }

    /// Runs any command in the host, with more of an environment, however it ends.
    #[must_use]
    pub fn try_in(&self, env: &[(&str, &str)], args: &[&str]) -> Ran {
        let mut words = vec!["in", HOST];
        words.extend(args);
        let mut command = self.script(&words);
        command.envs(env.iter().copied());
        try_run(command)
    }

    /// The XML of a domain that runs the journal guest on `image`, in a file.
    #[must_use]
    pub fn domain_xml(&self, name: &str, image: &str, options: &[&str]) -> PathBuf {
        let mut words = vec!["domxml", name, image];
        words.extend(options);
        let xml = try_run(self.script(&words)).ok().stdout;
        let path = self.work.join(format!("{name}.xml"));
        std::fs::write(&path, xml).expect("the scratch directory is ours");
        path
    }

    /// What the domain's guest has printed.
    #[must_use]
    pub fn console(&self, domain: &str) -> String {
        let path = self.work.join("lab").join(HOST).join(format!("log/libvirt/{domain}.console"));
        std::fs::read(path).map(|b| String::from_utf8_lossy(&b).replace('\r', "")).unwrap_or_default()
    }

    /// Where this host's files are.
    #[must_use]
    pub fn work(&self) -> &Path {
        &self.work
    }
}
