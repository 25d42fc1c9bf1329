//! `vmfs host ...`: the hosts of the datastore.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use vmfs_common::config::{HostName, TimeSpan};
use vmfs_replica::api::{HostList, HostRemoveRequest, InviteReport, InviteRequest};

use super::{Ask, enrol};
use crate::args::HostCommand;
use crate::clock::utc;
use crate::error::{CliError, CliResult};
use crate::table::Table;

pub(super) async fn host(ask: &Ask, command: HostCommand) -> CliResult {
    match command {
        HostCommand::Invite { name, valid, output } => invite(ask, &name, valid, output.as_deref()).await,
        HostCommand::Join { invitation, witness, address, place } => {
            enrol::join(&invitation, witness, address, place).await
        }
        HostCommand::List => {
            let list: HostList = ask.client.get("/v1/hosts").await?;
            ask.output.show(&list, hosts_table)
        }
        HostCommand::Remove { name } => {
            let request = HostRemoveRequest { name: name.to_string() };
            let list: HostList = ask.client.post("/v1/host/remove", &request).await?;
            ask.output.show(&list, |list| format!("{name}: removed\n{}", hosts_table(list)))
        }
    }
}

fn hosts_table(list: &HostList) -> String {
    let mut table = Table::new(&["HOST", "ID", "ADDRESS", "CONNECTED"]);
    for h in &list.hosts {
        let connected = match (h.this, h.connected) {
            (true, _) => "this host",
            (false, true) => "yes",
            (false, false) => "no",
        };
        table.row([h.host.as_str(), &h.host_id.to_string(), h.address.as_deref().unwrap_or("?"), connected]);
    }
    table.render()
}

async fn invite(ask: &Ask, name: &HostName, valid: TimeSpan, output: Option<&Path>) -> CliResult {
    // The file first: an invitation that cannot be kept should not exist.
    let file = output.map(|path| (path, new_secret_file(path)));
    let file = match file {
        Some((path, opened)) => {
            Some((path, opened.map_err(|e| CliError::failed(format!("{}: {e}", path.display())))?))
        }
        None => None,
    };
    let request = InviteRequest { name: name.to_string(), valid_ms: Some(valid.millis()) };
    let report: CliResult<InviteReport> = ask.client.post("/v1/host/invite", &request).await;
    let Some((path, mut file)) = file else {
        return ask.output.show(&report?, |r| format!("{}\n", r.token));
    };
    let written = report.and_then(|report| {
        writeln!(file, "{}", report.token)
            .and_then(|()| file.sync_all())
            .map_err(|e| CliError::failed(format!("{}: {e}", path.display())))?;
        Ok(report)
    });
    if written.is_err() {
        // Ours and empty: a failure leaves no trace.
        let _ = std::fs::remove_file(path);
    }
    ask.output.show(&written?, |r| {
        format!("{}: invitation for {name}, good for one use until {}\n", path.display(), utc(r.expires_ms))
    })
}

fn new_secret_file(path: &Path) -> std::io::Result<std::fs::File> {
    std::fs::File::options().write(true).create_new(true).mode(0o600).open(path)
}
