//! A private network for one cluster, in which single hosts can be cut off.

use std::collections::BTreeSet;

use super::command::{bash, run};
use super::reaper::Reaper;

/// A network namespace with only a loopback, gone with its [`Reaper`].
#[derive(Debug)]
pub struct Network {
    name: String,
}

impl Network {
    /// Makes the namespace.
    #[must_use]
    pub fn new(reaper: &mut Reaper) -> Self {
        let unique = reaper.dir().file_name().expect("invariant: the reaper's directory has a name");
        let name = unique.to_string_lossy().into_owned();
        run("ip", ["netns", "add", &name]);
        reaper.at_end(&format!("ip netns del {name}"));
        run("ip", ["-n", &name, "link", "set", "lo", "up"]);
        Self { name }
    }

    /// The words that run a command inside (its mounts stay those of the test).
    #[must_use]
    pub fn launcher(&self) -> Vec<String> {
        vec!["nsenter".into(), format!("--net=/run/netns/{}", self.name)]
    }

    /// Drops every datagram from and to the UDP sockets of the process `pid`, until [`Self::heal`].
    pub fn cut(&self, pid: u32) {
        let ports = self.udp_ports(pid);
        assert!(!ports.is_empty(), "process {pid} has no UDP socket to cut off");
        let set = ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
        bash(
            r#"ip netns exec "$1" nft -f - <<X
add table inet cut
delete table inet cut
table inet cut {
  chain out { type filter hook output priority 0; udp sport { $2 } drop; udp dport { $2 } drop; }
}
X"#,
            [self.name.as_str(), &set],
        );
    }

    /// Lets everything through again.
    pub fn heal(&self) {
        run("ip", ["netns", "exec", &self.name, "nft", "delete", "table", "inet", "cut"]);
    }

    /// The ports of all UDP sockets that the process has open.
    fn udp_ports(&self, pid: u32) -> BTreeSet<u16> {
        let sockets = bash(
            r#"ip netns exec "$1" ss -H -u -a -n -p | grep -F "pid=$2," | awk '{print $4}' || true"#,
            [self.name.as_str(), &pid.to_string()],
        );
        sockets.stdout.lines().filter_map(|l| l.rsplit_once(':')?.1.parse().ok()).collect()
    }
}
