//! Throughput and flush latency over a network with delay: one owner and one replica in namespaces of their
//! own, with a relay between them (see `integration::harness::lan`).
//!
//!     delay [--write]
//!
//! Prints a table; with `--write` it also replaces the one in `docs/performance.md`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use integration::harness::cluster::repository;
use integration::harness::{Cluster, bytes};

const DELAYS_MS: [u64; 4] = [0, 1, 10, 50];
const MIB: usize = 1 << 20;
const IMAGE_MIB: usize = 256;
/// Of each measurement.
const FLUSH_TIME: Duration = Duration::from_secs(3);
const SETTLE: Duration = Duration::from_secs(4);
const WRITE_MIB: usize = 192;
const WRITERS: usize = 16;
const BEGIN: &str = "<!-- delay: begin -->";
const END: &str = "<!-- delay: end -->";

/// One row of the table.
struct Row {
    delay_ms: u64,
    flush_median: Duration,
    flush_p99: Duration,
    parallel_flushes: f64,
    throughput_mib: f64,
}

fn main() -> std::io::Result<()> {
    let mut rows = Vec::new();
    for delay_ms in DELAYS_MS {
        // Each on a connection of its own: what congestion control has learnt on another way is no use.
        let row = measure(delay_ms)?;
        eprintln!("{}", line(&row));
        rows.push(row);
    }
    let table = table(&rows);
    println!("{table}");
    if std::env::args().any(|a| a == "--write") {
        replace(&repository().join("docs/performance.md"), &table)?;
    }
    Ok(())
}

fn measure(delay_ms: u64) -> std::io::Result<Row> {
    let mut cluster = Cluster::start_on_lan("delaybench", 2);
    cluster.lan().set_delay(Duration::from_millis(delay_ms));
    let file = make(&cluster, "disk.raw", IMAGE_MIB)?;
    let others: Vec<File> =
        (0..WRITERS).map(|w| make(&cluster, &format!("disk{w}.raw"), 4)).collect::<std::io::Result<_>>()?;
    // Once over everything: what is measured overwrites.
    let _ = write_all(&file)?;
    cluster.wait_in_sync("disk.raw");
    std::thread::sleep(SETTLE);
    let throughput_mib = write_all(&file)?;
    let mut took = flushes(&file)?;
    took.sort();
    let parallel_flushes = parallel(&others)?;
    let at = |share: usize| took[(took.len() - 1) * share / 100];
    Ok(Row { delay_ms, flush_median: at(50), flush_p99: at(99), parallel_flushes, throughput_mib })
}

fn make(cluster: &Cluster, name: &str, mib: usize) -> std::io::Result<File> {
    let path = cluster.file("a", name);
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    file.set_len((mib * MIB) as u64)?;
    file.sync_all()?;
    Ok(file)
}

/// Writes sequentially, and flushes at the end: MiB a second that reach the replica's disk.
fn write_all(file: &File) -> std::io::Result<f64> {
    let noise = bytes::noise(7, MIB);
    let start = Instant::now();
    for i in 0..WRITE_MIB {
        file.write_all_at(&noise, (i * MIB) as u64)?;
    }
    file.sync_data()?;
    Ok(WRITE_MIB as f64 / start.elapsed().as_secs_f64())
}

/// 4 KiB writes with an fdatasync each.
fn flushes(file: &File) -> std::io::Result<Vec<Duration>> {
    let noise = bytes::noise(1, 4096);
    let begin = Instant::now();
    let mut took = Vec::new();
    while begin.elapsed() < FLUSH_TIME {
        let start = Instant::now();
        file.write_all_at(&noise, (took.len() % 1024 * 4096) as u64)?;
        file.sync_data()?;
        took.push(start.elapsed());
    }
    Ok(took)
}

/// Flushes a second of one writer on each image. (Of one file the kernel lets one fsync go at a time.)
fn parallel(files: &[File]) -> std::io::Result<f64> {
    let start = Instant::now();
    let counts = std::thread::scope(|scope| {
        let writers: Vec<_> = files.iter().map(|f| scope.spawn(|| flushes(f))).collect();
        let ends = writers.into_iter().map(|w| w.join().expect("a writer does not panic"));
        ends.map(|took| took.map(|t| t.len())).sum::<std::io::Result<usize>>()
    })?;
    Ok(counts as f64 / start.elapsed().as_secs_f64())
}

fn line(row: &Row) -> String {
    let ms = |d: Duration| d.as_secs_f64() * 1000.0;
    let (median, p99) = (ms(row.flush_median), ms(row.flush_p99));
    format!(
        "| {} | {median:.2} | {p99:.2} | {:.0} | {:.1} |",
        row.delay_ms, row.parallel_flushes, row.throughput_mib
    )
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "| delay, one way, ms | flush, median, ms | flush, 99th percentile, ms | flushes/s of {WRITERS} images together | \
         sequential write, MiB/s |\n| ---: | ---: | ---: | ---: | ---: |\n"
    );
    for row in rows {
        text += &line(row);
        text.push('\n');
    }
    text
}

/// Replaces what is between the markers.
fn replace(path: &Path, table: &str) -> std::io::Result<()> {
    let text = std::fs::read_to_string(path)?;
    let parts = text.split_once(BEGIN).and_then(|(head, rest)| Some((head, rest.split_once(END)?.1)));
    let (head, tail) =
        parts.ok_or_else(|| std::io::Error::other(format!("no {BEGIN} in {}", path.display())))?;
    std::fs::write(path, format!("{head}{BEGIN}\n{table}{END}{tail}"))
}
