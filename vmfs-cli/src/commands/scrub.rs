//! `vmfs scrub`.

use vmfs_common::config::ByteSize;
use vmfs_replica::api::{ScrubReport, ScrubRequest};

use super::Ask;
use crate::error::{CliError, CliResult};
use crate::table::Table;

pub(super) async fn scrub(ask: &Ask, image: Option<&str>, rate: Option<ByteSize>) -> CliResult {
    let image = match image {
        Some(image) => Some(ask.image(image).await?),
        None => None,
    };
    let request = ScrubRequest { image, rate_bytes: rate.map(ByteSize::bytes) };
    let report: ScrubReport = ask.long("/v1/scrub", &request).await?;
    ask.output.show(&report, render)?;
    if report.ok {
        return Ok(());
    }
    let bad = report.images.iter().filter(|i| !i.open.is_empty() || i.error.is_some());
    let names: Vec<_> = bad.map(|i| i.image.as_str()).collect();
    Err(CliError::failed(format!("damage is left in {}", names.join(", "))))
}

fn render(report: &ScrubReport) -> String {
    let mut table = Table::new(&["IMAGE", ">READ", ">FOUND", ">REPAIRED", ">LEFT"]);
    for i in &report.images {
        table.row([
            i.image.clone(),
            ByteSize::new(i.bytes_read).human(),
            i.found.to_string(),
            i.repaired.to_string(),
            i.open.len().to_string(),
        ]);
    }
    let mut out = if table.is_empty() { "no images\n".to_owned() } else { table.render() };
    for i in &report.images {
        for what in &i.open {
            out.push_str(&format!("{}: damaged: {what}\n", i.image));
        }
        if let Some(error) = &i.error {
            out.push_str(&format!("{}: given up: {error}\n", i.image));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use vmfs_replica::api::ScrubbedImage;

    use super::*;

    #[test]
    fn a_scrub_shows_what_it_found_and_what_is_left() {
        let image = |name: &str, open: &[&str]| ScrubbedImage {
            image: name.into(),
            bytes_read: 3 << 20,
            found: 2,
            repaired: 1,
            open: open.iter().map(|s| (*s).to_owned()).collect(),
            error: None,
        };
        let images = vec![image("vm/a.img", &[]), image("b", &["block 7"])];
        let report = ScrubReport { ok: false, bytes_read: 6 << 20, elapsed_ms: 5, images };
        assert_eq!(
            render(&report),
            "IMAGE      READ  FOUND  REPAIRED  LEFT\n\
             vm/a.img  3 MiB      2         1     0\n\
             b         3 MiB      2         1     1\n\
             b: damaged: block 7\n"
        );
    }
}
