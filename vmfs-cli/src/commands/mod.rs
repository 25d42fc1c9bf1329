//! What each command does: one request, one answer, shown for people or as JSON.

mod enrol;
mod forks;
mod hosts;
mod images;
mod scrub;
mod status;

use vmfs_replica::api::server::image_path;
use vmfs_replica::api::{ImageRequest, StatusReport};

use crate::args::{Cli, Command};
use crate::client::Client;
use crate::error::{CliError, CliResult};
use crate::output::Output;
use crate::up;

#[cfg(test)]
pub(crate) use status::tests::image as test_image;
pub(crate) use status::{CLEAR, images_table};

/// Runs a command to its end.
pub(crate) fn run(cli: Cli) -> CliResult {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| CliError::failed(format!("cannot start: {e}")))?;
    runtime.block_on(dispatch(cli))
}

async fn dispatch(cli: Cli) -> CliResult {
    let ask = Ask { client: Client::new(&cli.socket), output: Output { json: cli.json } };
    match cli.command {
        Command::Up(args) => up::up(args).await,
        Command::Down { dir } => up::down(&dir),
        Command::Status { watch } => status::status(&ask, watch).await,
        Command::Ls => status::ls(&ask).await,
        Command::Info { image } => images::info(&ask, &image).await,
        Command::Promote { image, force, members } => images::promote(&ask, &image, force, &members).await,
        Command::Handover { image, to } => images::handover(&ask, &image, &to).await,
        Command::Verify { image, deep } => images::verify(&ask, &image, deep).await,
        Command::Scrub { image, rate } => scrub::scrub(&ask, image.as_deref(), rate).await,
        Command::Replica(command) => images::replica(&ask, command).await,
        Command::Wait { image, in_sync, timeout } => images::wait(&ask, &image, in_sync, timeout).await,
        Command::Fail { image } => images::fail(&ask, &image).await,
        Command::Abandon { image, discard } => images::abandon(&ask, &image, discard).await,
        Command::Policy(command) => images::policy(&ask, command).await,
        Command::Forks { image } => forks::list(&ask, image.as_deref()).await,
        Command::Fork(command) => forks::fork(&ask, command).await,
        Command::Datastore(command) => enrol::datastore(command),
        Command::Host(command) => hosts::host(&ask, command).await,
    }
}

/// Whom to ask, and how to show the answer.
#[derive(Debug)]
struct Ask {
    client: Client,
    output: Output,
}

impl Ask {
    async fn status(&self) -> CliResult<StatusReport> {
        self.client.get("/v1/status").await
    }

    /// The path inside the mount that `text` stands for: itself, or a path of this machine that leads
    /// into the daemon's mount. A file of this machine that is elsewhere is no image.
    async fn image(&self, text: &str) -> CliResult<String> {
        let inside = image_path(text)?;
        if !text.starts_with('/') {
            return Ok(inside);
        }
        let mount = self.status().await?.mount;
        if let Some(image) = mount.as_deref().and_then(|mount| below(mount, text)) {
            return Ok(image);
        }
        if std::path::Path::new(text).exists() {
            let mount = mount.map_or_else(String::new, |m| format!(", {}", m.display()));
            return Err(CliError::failed(format!("{text} is not inside the mount of this daemon{mount}")));
        }
        Ok(inside)
    }

    async fn image_request(&self, text: &str) -> CliResult<ImageRequest> {
        Ok(ImageRequest { image: self.image(text).await? })
    }
}

/// The part of `text` below `mount`, when there is one.
fn below(mount: &std::path::Path, text: &str) -> Option<String> {
    let rest = std::path::Path::new(text).strip_prefix(mount).ok()?.to_str()?;
    (!rest.is_empty()).then(|| rest.to_owned())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn host_paths_lead_into_the_mount_and_nowhere_else() {
        let mount = Path::new("/srv/vm");
        assert_eq!(below(mount, "/srv/vm/a/b.img"), Some("a/b.img".into()));
        assert_eq!(below(mount, "/srv/vm/"), None);
        assert_eq!(below(mount, "/srv/vmx/a"), None);
        assert_eq!(below(mount, "/a"), None);
    }
}
