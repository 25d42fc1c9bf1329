//! `vmfs forks` and `vmfs fork drop`.

use vmfs_common::config::ByteSize;
use vmfs_replica::api::{ForkDropRequest, ForkInfo, ForkList};

use super::Ask;
use crate::args::ForkCommand;
use crate::clock::utc;
use crate::error::CliResult;
use crate::table::Table;

pub(super) async fn list(ask: &Ask, image: Option<&str>) -> CliResult {
    let list: ForkList = match image {
        None => ask.client.get("/v1/forks").await?,
        Some(image) => ask.client.get_image("/v1/forks", &ask.image(image).await?).await?,
    };
    ask.output
        .show(&list, |list| if list.forks.is_empty() { String::new() } else { forks_table(&list.forks) })
}

pub(super) async fn fork(ask: &Ask, command: ForkCommand) -> CliResult {
    let ForkCommand::Drop { fork } = command;
    let dropped: ForkInfo = ask.client.post("/v1/fork/drop", &ForkDropRequest { fork }).await?;
    ask.output.show(&dropped, |f| {
        format!("{}: dropped ({} of {})\n", f.fork, ByteSize::new(f.bytes).human(), f.image)
    })
}

pub(super) fn forks_table(forks: &[ForkInfo]) -> String {
    let mut table = Table::new(&["FORK", "IMAGE", ">EPOCH", "UPDATES", ">SIZE", "SINCE", "REASON"]);
    for f in forks {
        table.row([
            f.fork.clone(),
            f.image.clone(),
            f.epoch.to_string(),
            format!("{}-{}", f.first_seq, f.last_seq),
            ByteSize::new(f.bytes).human(),
            utc(f.created_ms),
            f.reason.clone(),
        ]);
    }
    table.render()
}
