//! Making hosts: `vmfs datastore init` and `vmfs host join`. Works on files, before there is a daemon.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::Path;

use vmfs_common::config::{
    Config, ControlConfig, DEFAULT_PORT, HostName, IdentityConfig, MountConfig, NetworkConfig, PeerAddress,
    ReplicationConfig, StoreConfig,
};
use vmfs_net::HostRole;
use vmfs_net::pki::{init_datastore, invite};

use crate::args::{DatastoreCommand, PlaceArgs};
use crate::error::{CliError, CliResult};
use crate::output::print;

pub(super) fn datastore(command: DatastoreCommand) -> CliResult {
    let DatastoreCommand::Init { host, address, place } = command;
    let place = absolute(place)?;
    check_free(&place.config)?;
    let config = config(&host, Some(&address), false, &place)?;
    let id = init_datastore(&place.identity).map_err(CliError::failed)?;
    invite::join_local(
        &place.identity,
        host.as_str(),
        &place.identity,
        &address.to_string(),
        &roles(&place, false),
    )
    .map_err(CliError::failed)?;
    write_config(&place.config, &config)?;
    print(&format!(
        "datastore {id}\n{}\nNext: start {}, then invite the other hosts with: vmfs host invite NAME\n",
        made(&host, &place),
        start_command(&place),
    ))
}

pub(super) async fn join(
    invitation: &str,
    witness: bool,
    address: Option<PeerAddress>,
    place: PlaceArgs,
) -> CliResult {
    if witness && place.mount.is_some() {
        return Err(CliError::usage(
            "a witness holds no data and has no mount: leave out --mount or --witness",
        ));
    }
    let place = absolute(place)?;
    check_free(&place.config)?;
    let invitation = invite::Invitation::from_token_or_file(invitation).map_err(CliError::failed)?;
    // The name is the inviting host's to give: only the answer tells it.
    let reached_at = match (&address, place.listen) {
        (Some(address), _) => address.to_string(),
        (None, Some(listen)) => listen.to_string(),
        (None, None) => SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)).to_string(),
    };
    let roles = roles(&place, witness);
    let identity = vmfs_net::join(&place.identity, &invitation, &reached_at, &roles).await;
    let identity = identity.map_err(CliError::failed)?;
    let host: HostName = identity.name().parse().map_err(CliError::failed)?;
    write_config(&place.config, &config(&host, address.as_ref(), witness, &place)?)?;
    print(&format!(
        "datastore {}\n{}\nNext: start {}\n",
        identity.datastore(),
        made(&host, &place),
        start_command(&place)
    ))
}

fn roles(place: &PlaceArgs, witness: bool) -> Vec<HostRole> {
    match (witness, &place.mount) {
        (true, _) => vec![HostRole::Witness],
        (false, None) => vec![HostRole::Replica],
        (false, Some(_)) => vec![HostRole::Mount, HostRole::Replica],
    }
}

fn made(host: &HostName, place: &PlaceArgs) -> String {
    format!("host {host}: keys in {}, configuration in {}", place.identity.display(), place.config.display())
}

fn start_command(place: &PlaceArgs) -> String {
    let daemon = if place.mount.is_some() { "vmfs-fuse" } else { "vmfs-replica" };
    format!("{daemon} --config {}", place.config.display())
}

/// The configuration is read from any directory: its paths are absolute.
fn absolute(mut place: PlaceArgs) -> CliResult<PlaceArgs> {
    let paths =
        [&mut place.config, &mut place.identity, &mut place.store].into_iter().chain(&mut place.mount);
    for path in paths {
        *path =
            std::path::absolute(&*path).map_err(|e| CliError::failed(format!("{}: {e}", path.display())))?;
        if path.to_str().is_none() {
            return Err(CliError::usage(format!(
                "{}: not UTF-8, a configuration cannot say it",
                path.display()
            )));
        }
    }
    Ok(place)
}

fn config(
    host: &HostName,
    address: Option<&PeerAddress>,
    witness: bool,
    place: &PlaceArgs,
) -> CliResult<Config> {
    let port = address.map_or(DEFAULT_PORT, PeerAddress::port);
    let listen = place.listen.unwrap_or_else(|| SocketAddr::from(([0, 0, 0, 0], port)));
    let config = Config {
        host: host.clone(),
        witness,
        log: "info".to_owned(),
        store: StoreConfig::at(place.store.clone()),
        mount: place.mount.clone().map(MountConfig::at),
        network: NetworkConfig { listen, advertise: None },
        identity: IdentityConfig { dir: place.identity.clone() },
        control: ControlConfig::default(),
        replication: ReplicationConfig::default(),
        peers: std::collections::BTreeMap::new(),
        policies: Vec::new(),
    };
    // What is written must be what a daemon accepts.
    Config::parse(&config.to_toml()).map_err(CliError::failed)
}

fn check_free(path: &Path) -> CliResult {
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(CliError::failed(format!("{}: {e}", path.display()))),
        Ok(_) => Err(CliError::failed(format!(
            "{} exists already (choose another place with --config)",
            path.display()
        ))),
    }
}

fn write_config(path: &Path, config: &Config) -> CliResult {
    let fail = |e: io::Error| CliError::failed(format!("{}: {e}", path.display()));
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).map_err(fail)?;
    }
    let text = format!("# Every key is explained in examples/vmfs.toml.\n{}", config.to_toml());
    let mut file = std::fs::File::create_new(path).map_err(fail)?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(fail)
}
