//! The command line: a contract, scripts depend on it.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use vmfs_common::config::{ByteSize, DEFAULT_SOCKET, HostName, PeerAddress, TimeSpan};
use vmfs_common::policy::{Acks, OnQuorumLoss};

/// Operates a VMFS datastore.
///
/// IMAGE is the path of an image inside the mount; a path of the host that leads into the mount is
/// understood too.
///
/// Exit codes: 0 done, 1 failed (one line on standard error says why), 2 wrong usage, 3 refused for
/// lack of a quorum.
#[derive(Debug, Parser)]
#[command(name = "vmfs", version, disable_help_subcommand = true, max_term_width = 100)]
pub(crate) struct Cli {
    /// Control socket of the daemon to talk to.
    #[arg(long, global = true, env = "VMFS_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub(crate) socket: PathBuf,
    /// Print the result as JSON (documented in docs/api.md).
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start a little cluster in DIR: hosts a, b, c, ... on loopback, each a process with a mount.
    ///
    /// Stays in front with a live status until Ctrl-C, which shuts the cluster down. Started again on the same
    /// directory, everything is back.
    Up(UpArgs),
    /// Stop the cluster of `vmfs up DIR`. Does nothing when it is not running.
    Down {
        /// Directory given to `vmfs up`.
        dir: PathBuf,
    },
    /// Show the host, its peers and its images.
    Status {
        /// Show it again every second until Ctrl-C.
        #[arg(long)]
        watch: bool,
    },
    /// List the images.
    Ls,
    /// Show everything about an image.
    Info {
        /// The image.
        image: String,
    },
    /// Make this host the owner of an image.
    ///
    /// Needs a majority of the image's members. Says what, if anything, may be missing.
    Promote {
        /// The image.
        image: String,
        /// Go on without a quorum, in a separate lineage; acknowledged writes may be lost.
        #[arg(long)]
        force: bool,
        /// With --force: another member of the new lineage (may be repeated).
        #[arg(long = "member", value_name = "HOST", requires = "force")]
        members: Vec<HostName>,
    },
    /// Move ownership of an image from this host to another.
    Handover {
        /// The image.
        image: String,
        /// The next owner.
        #[arg(long, value_name = "HOST")]
        to: HostName,
    },
    /// Check an image's chain and compare its copies by digest.
    Verify {
        /// The image.
        image: String,
        /// Also read and hash every block of the copy here.
        #[arg(long)]
        deep: bool,
    },
    /// Read and check everything that images have here, and repair what is damaged.
    Scrub {
        /// Only this image [default: every image on this host]
        image: Option<String>,
        /// Bytes a second to read at most ("100MiB") [default: as configured]
        #[arg(long, value_name = "SIZE")]
        rate: Option<ByteSize>,
    },
    /// Change who replicates an image.
    #[command(subcommand)]
    Replica(ReplicaCommand),
    /// List the divergent tails that were kept.
    Forks {
        /// Only those of this image.
        image: Option<String>,
    },
    /// Manage one divergent tail.
    #[command(subcommand)]
    Fork(ForkCommand),
    /// Make a datastore.
    #[command(subcommand)]
    Datastore(DatastoreCommand),
    /// Manage the hosts of the datastore.
    #[command(subcommand)]
    Host(HostCommand),
    /// Wait until an image is known here.
    Wait {
        /// The image.
        image: String,
        /// Wait until every member holds everything that is there now.
        #[arg(long)]
        in_sync: bool,
        /// Give up (exit code 1) after so many seconds.
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<TimeSpan>,
    },
    /// Fail every request that waits on an image with EIO.
    Fail {
        /// The image.
        image: String,
    },
    /// Show or change what flushes of an image wait for.
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Give up this host's side of an image that has two lineages since a forced promotion.
    ///
    /// On the host of the forced promotion: it follows the other owner, and what it alone has becomes a fork.
    Abandon {
        /// The image.
        image: String,
        /// Drop the whole copy of this host instead, whatever its lineage: it can then be added to the other.
        #[arg(long)]
        discard: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct UpArgs {
    /// Directory of the cluster, made when it is missing.
    pub(crate) dir: PathBuf,
    /// Number of hosts [default: 3, or as many as there are in DIR]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub(crate) hosts: Option<u8>,
    /// Return once all hosts are ready.
    #[arg(long)]
    pub(crate) detach: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReplicaCommand {
    /// Add a member; returns when it holds everything.
    Add {
        /// The image.
        image: String,
        /// The host.
        host: HostName,
        /// It holds only the chain's headers, and votes.
        #[arg(long)]
        witness: bool,
    },
    /// Remove a member.
    Remove {
        /// The image.
        image: String,
        /// The host.
        host: HostName,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum ForkCommand {
    /// Write what it has changed to a file: a new sparse one, or a copy of the image from before it.
    Export {
        /// Its name, as `vmfs forks` shows it.
        fork: String,
        /// The file, on this host. It is made and must not exist, unless `--onto` is given.
        file: PathBuf,
        /// The file exists and is changed in place: a copy of the image (raw) as it was before the fork.
        #[arg(long)]
        onto: bool,
    },
    /// Delete it for good.
    Drop {
        /// Its name, as `vmfs forks` shows it.
        fork: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Show the rules in force.
    Show {
        /// The image.
        image: String,
    },
    /// Change rules; returns when they are in force.
    #[command(group = clap::ArgGroup::new("rules").required(true).multiple(true))]
    Set {
        /// The image.
        image: String,
        /// What a flush waits for.
        #[arg(long, group = "rules")]
        acks: Option<AcksArg>,
        /// What a flush does while there is no quorum.
        #[arg(long, group = "rules")]
        on_quorum_loss: Option<OnQuorumLossArg>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum DatastoreCommand {
    /// Make a datastore with this host as its first: its CA, this host's identity, a configuration file.
    Init {
        /// Name of this host.
        #[arg(long, value_name = "NAME")]
        host: HostName,
        /// HOST:PORT (UDP) at which the other hosts reach this one.
        #[arg(long, value_name = "HOST:PORT")]
        address: PeerAddress,
        #[command(flatten)]
        place: PlaceArgs,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Make a single-use invitation for a new host. Only on the datastore's first host.
    Invite {
        /// Name the new host will have.
        name: HostName,
        /// How long it is good for ("30m").
        #[arg(long, value_name = "DURATION", default_value = "1h")]
        valid: TimeSpan,
        /// Write it to a new file with mode 0600 instead of standard output.
        #[arg(long, value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Make this machine a host of the datastore that an invitation leads to.
    Join {
        /// The invitation, or a file that holds it.
        #[arg(value_name = "TOKEN-OR-FILE")]
        invitation: String,
        /// It holds only headers, and votes: no mount, no data.
        #[arg(long)]
        witness: bool,
        /// HOST:PORT (UDP) at which the other hosts reach this one [default: as the inviting host sees it].
        #[arg(long, value_name = "HOST:PORT")]
        address: Option<PeerAddress>,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// List the hosts of the datastore.
    List,
    /// Strike a host off the datastore. Only on the datastore's first host.
    Remove {
        /// The host.
        name: HostName,
    },
}

/// Where a new host keeps what it has.
#[derive(Debug, Args)]
pub(crate) struct PlaceArgs {
    /// Address to listen on [default: every interface, the port of --address or 4410]
    #[arg(long, value_name = "IP:PORT")]
    pub(crate) listen: Option<SocketAddr>,
    /// Configuration file to write.
    #[arg(long, value_name = "FILE", default_value = "/etc/vmfs/vmfs.toml")]
    pub(crate) config: PathBuf,
    /// Directory for keys and certificates.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmfs/identity")]
    pub(crate) identity: PathBuf,
    /// Directory of the store.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmfs/store")]
    pub(crate) store: PathBuf,
    /// Mount point (vmfs-fuse) [default: no mount: the host runs vmfs-replica]
    #[arg(long, value_name = "DIR")]
    pub(crate) mount: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum AcksArg {
    /// Headers on a majority of the members, data on enough of them.
    Majority,
    /// The owner's disk only: a failover may lose acknowledged writes.
    Local,
    /// Every member.
    All,
}

impl From<AcksArg> for Acks {
    fn from(arg: AcksArg) -> Self {
        match arg {
            AcksArg::Majority => Self::Majority,
            AcksArg::Local => Self::Local,
            AcksArg::All => Self::All,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum OnQuorumLossArg {
    /// Wait until it is back.
    Stall,
    /// Go on with fewer copies of the data.
    Degrade,
}

impl From<OnQuorumLossArg> for OnQuorumLoss {
    fn from(arg: OnQuorumLossArg) -> Self {
        match arg {
            OnQuorumLossArg::Stall => Self::Stall,
            OnQuorumLossArg::Degrade => Self::Degrade,
        }
    }
}

/// Longest time-out in seconds: a year.
const TIMEOUT_S_MAX: f64 = 365.0 * 86_400.0;

fn seconds(text: &str) -> Result<TimeSpan, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.0..=TIMEOUT_S_MAX).contains(&s) => std::time::Duration::try_from_secs_f64(s)
            .map(|d| TimeSpan::from_millis(u64::try_from(d.as_millis()).unwrap_or(u64::MAX)))
            .map_err(|e| e.to_string()),
        _ => Err("not a number of seconds".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_contract_parses() {
        for line in [
            "up DIR --hosts 5 --detach",
            "down DIR",
            "status --json --watch",
            "ls --json",
            "info vm/a.img --json",
            "promote vm/a.img --force",
            "promote vm/a.img --force --member b --member c",
            "handover vm/a.img --to b",
            "verify vm/a.img --deep",
            "scrub",
            "scrub vm/a.img --rate 100MiB",
            "replica add vm/a.img b",
            "replica add vm/a.img w --witness",
            "replica remove vm/a.img b",
            "forks",
            "forks vm/a.img",
            "fork drop x",
            "fork export x out.img",
            "fork export x copy.img --onto",
            "datastore init --host a --address 192.0.2.1:4410",
            "host invite b --valid 10m",
            "host join TOKEN --address b.example:4410 --witness",
            "host join FILE",
            "host list --json",
            "host remove b",
            "wait vm/a.img --in-sync --timeout 2.5",
            "fail vm/a.img",
            "abandon vm/a.img",
            "abandon vm/a.img --discard",
            "policy show vm/a.img",
            "policy set vm/a.img --acks all --on-quorum-loss degrade",
            "--socket /x status",
            "status --socket /x",
        ] {
            let words = std::iter::once("vmfs").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        for line in [
            "",
            "up",
            "up DIR --hosts 0",
            "up DIR --hosts 6",
            "promote",
            "promote a --member b",
            "handover a",
            "policy set a",
            "policy set a --acks most",
            "wait a --timeout soon",
            "wait a --timeout -1",
            "wait a --timeout inf",
            "replica add a",
            "host invite ../x",
            "datastore init --host a --address nowhere",
            "frobnicate",
        ] {
            let words = std::iter::once("vmfs").chain(line.split(' ').filter(|w| !w.is_empty()));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }

    #[test]
    fn seconds_may_have_a_fraction() {
        assert_eq!(seconds("2.5"), Ok(TimeSpan::from_millis(2500)));
        assert_eq!(seconds("0"), Ok(TimeSpan::from_millis(0)));
        assert!(seconds("NaN").is_err());
    }
}
