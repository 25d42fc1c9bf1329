//! `vmfs forks`, `vmfs fork export` and `vmfs fork drop`.

use vmfs_common::config::ByteSize;
use vmfs_replica::api::{ForkDropRequest, ForkExportReport, ForkExportRequest, ForkInfo, ForkList};

use super::Ask;
use crate::args::ForkCommand;
use crate::clock::utc;
use crate::error::{CliError, CliResult};
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
    match command {
        ForkCommand::Drop { fork } => {
            let dropped: ForkInfo = ask.client.post("/v1/fork/drop", &ForkDropRequest { fork }).await?;
            ask.output.show(&dropped, |f| {
                format!("{}: dropped ({} of {})\n", f.fork, ByteSize::new(f.bytes).human(), f.image)
            })
        }
        ForkCommand::Export { fork, file, onto } => {
            let failed = |e| CliError::failed(format!("{}: {e}", file.display()));
            let path = std::path::absolute(&file).map_err(failed)?;
            let file =
                path.to_str().ok_or_else(|| CliError::usage("the file's path is not UTF-8"))?.to_owned();
            let request = ForkExportRequest { fork, file, onto };
            let report: ForkExportReport = ask.long("/v1/fork/export", &request).await?;
            ask.output.show(&report, exported)
        }
    }
}

fn exported(r: &ForkExportReport) -> String {
    let human = |bytes| ByteSize::new(bytes).human();
    format!(
        "{}: {} updates of {} written to {} ({} of data, {} of zeros)\n",
        r.fork,
        r.updates,
        r.image,
        r.file,
        human(r.written_bytes),
        human(r.zeroed_bytes)
    )
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
