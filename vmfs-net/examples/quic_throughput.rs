//! Measures the transport between two hosts on loopback: throughput of updates with their CPU
//! time, and the round trip of a small frame, idle and beside a full stream.
//!
//! `cargo run --release -p vmfs-net --example quic_throughput -- --help`

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use clap::Parser;
use tokio::sync::mpsc;
use vmfs_common::{HostId, ImageId, StoreId};
use vmfs_net::pki::{init_datastore, invite};
use vmfs_net::{
    Answer, Congestion, Frame, FrameReader, Handlers, HostIdentity, NetConfig, NetEvent, Network,
    RequestHandler, StreamHandler, Tuning,
};

/// Measure QUIC between two hosts on loopback.
#[derive(Debug, Parser)]
struct Args {
    /// Seconds per throughput measurement.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// cubic, newreno or bbr.
    #[arg(long, default_value = "cubic")]
    congestion: String,
    /// First congestion window in KiB.
    #[arg(long, default_value_t = Tuning::default().initial_window_bytes / 1024)]
    initial_window_kib: u64,
    /// Largest UDP payload.
    #[arg(long, default_value_t = Tuning::default().loopback_mtu_max)]
    mtu: u16,
    /// Packets per acknowledgement, 0 for the default.
    #[arg(long, default_value_t = Tuning::default().ack_every)]
    ack_every: u32,
    /// Send without segmentation offload.
    #[arg(long)]
    no_gso: bool,
    /// Use AES-256-GCM.
    #[arg(long)]
    aes256: bool,
    /// Bytes of payload per update.
    #[arg(long, default_value_t = 128 << 10)]
    payload: usize,
    /// Bytes on their way, in KiB.
    #[arg(long, default_value_t = 2048)]
    send_window_kib: u32,
    /// Parallel streams.
    #[arg(long, default_value_t = 1)]
    streams: u8,
}

/// Image of the streams whose frames are sent back.
const PING: ImageId = ImageId::from_bytes([9; 16]);

/// Counts payload; on the answering side sends control frames back, on the asking side hands them out.
struct Sink {
    /// Set on the answering side.
    answer: Arc<OnceLock<Network>>,
    pongs: mpsc::UnboundedSender<Bytes>,
    bytes: Arc<AtomicU64>,
}

impl StreamHandler for Sink {
    fn on_stream(&self, from: HostId, _: u64, image: ImageId, frames: FrameReader) {
        let (answer, pongs, bytes) =
            (self.answer.get().cloned(), self.pongs.clone(), Arc::clone(&self.bytes));
        tokio::spawn(async move {
            if let Err(e) = read(answer, from, image, frames, pongs, &bytes).await {
                tracing::debug!("reader: {e:#}");
            }
        });
    }
}

async fn read(
    answer: Option<Network>,
    from: HostId,
    image: ImageId,
    mut frames: FrameReader,
    pongs: mpsc::UnboundedSender<Bytes>,
    bytes: &AtomicU64,
) -> Result<()> {
    let mut back = answer.map(|net| net.open_stream(from, image)).transpose()?;
    while let Some(frame) = frames.next().await? {
        match (frame, &mut back) {
            (Frame::Update { payload, .. }, _) => {
                bytes.fetch_add(u64::try_from(payload.len())?, Ordering::Relaxed);
            }
            (Frame::Control(body), Some(back)) => back.send_control(body).await?,
            (Frame::Control(body), None) => pongs.send(body)?,
        }
    }
    Ok(())
}

struct NoRequests;

impl RequestHandler for NoRequests {
    fn on_request(&self, _: HostId, body: Bytes) -> Answer {
        Box::pin(async move { Ok(body) })
    }
}

struct End {
    net: Network,
    bytes: Arc<AtomicU64>,
    pongs: mpsc::UnboundedReceiver<Bytes>,
}

async fn start(dir: &Path, tuning: Tuning, send_window_bytes: u32, answers: bool) -> Result<End> {
    let identity = HostIdentity::load(dir)?;
    let (pongs_in, pongs) = mpsc::unbounded_channel();
    let (events, mut drain) = mpsc::channel::<NetEvent>(64);
    tokio::spawn(async move { while drain.recv().await.is_some() {} });
    let answer = Arc::new(OnceLock::new());
    let bytes = Arc::new(AtomicU64::new(0));
    let sink = Sink { answer: Arc::clone(&answer), pongs: pongs_in, bytes: Arc::clone(&bytes) };
    let handlers = Handlers { streams: Arc::new(sink), requests: Arc::new(NoRequests) };
    let listen = vmfs_net::Directory::open(dir, identity.trust())?;
    let listen = listen.get(identity.host()).context("own entry")?.address.parse()?;
    let cfg = NetConfig { tuning, send_window_bytes, ..NetConfig::new(listen, StoreId::from_bytes([1; 16])) };
    let net = Network::start(cfg, identity, handlers, events).await?;
    if answers {
        answer.set(net.clone()).ok().context("set once")?;
    }
    Ok(End { net, bytes, pongs })
}

/// User and system time of this process so far.
fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<_> = stat.rsplit(')').next().context("stat")?.split_whitespace().collect();
    // Fields 14 and 15 of proc(5), in ticks of 10 ms.
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / 100.0)
}

async fn pump(net: Network, to: HostId, n: u8, payload: usize) -> Result<()> {
    let mut stream = net.open_stream(to, ImageId::from_bytes([n; 16]))?;
    let (header, payload) = (Bytes::from(vec![1; 200]), Bytes::from(vec![2; payload]));
    loop {
        stream.send_update(header.clone(), std::slice::from_ref(&payload)).await?;
    }
}

async fn round_trips(
    net: &Network,
    to: HostId,
    pongs: &mut mpsc::UnboundedReceiver<Bytes>,
    n: usize,
) -> Result<String> {
    let mut stream = net.open_stream(to, PING)?;
    let mut times = Vec::with_capacity(n);
    for _ in 0..n {
        let at = Instant::now();
        stream.send_control(Bytes::from_static(&[7; 120])).await?;
        pongs.recv().await.context("pong")?;
        times.push(at.elapsed());
    }
    times.sort();
    let us = |q: usize| times[(times.len() - 1) * q / 100].as_micros();
    Ok(format!("p50 {} us, p90 {} us, p99 {} us", us(50), us(90), us(99)))
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let args = Args::parse();
    let tuning = Tuning {
        congestion: match args.congestion.as_str() {
            "cubic" => Congestion::Cubic,
            "newreno" => Congestion::NewReno,
            "bbr" => Congestion::Bbr,
            other => anyhow::bail!("no congestion controller {other}"),
        },
        initial_window_bytes: args.initial_window_kib << 10,
        loopback_mtu_max: args.mtu,
        ack_every: args.ack_every,
        gso: !args.no_gso,
        aes128: !args.aes256,
    };
    let tmp = tempfile::tempdir()?;
    let dirs = [tmp.path().join("a"), tmp.path().join("b")];
    init_datastore(&dirs[0])?;
    for (dir, name) in dirs.iter().zip(["a", "b"]) {
        let address = std::net::UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
        invite::join_local(&dirs[0], name, dir, &address, &[])?;
    }
    let mut a = start(&dirs[0], tuning, args.send_window_kib << 10, false).await?;
    let b = start(&dirs[1], tuning, args.send_window_kib << 10, true).await?;
    let to = b.net.local_host();
    while !a.net.is_connected(to) || !b.net.is_connected(a.net.local_host()) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Path MTU discovery takes a few round trips.
    tokio::time::sleep(Duration::from_millis(500)).await;
    println!("{tuning:?}");
    println!("round trip, idle: {}", round_trips(&a.net, to, &mut a.pongs, 2000).await?);
    let pumps: Vec<_> =
        (0..args.streams).map(|n| tokio::spawn(pump(a.net.clone(), to, n + 16, args.payload))).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (from, at, cpu) = (b.bytes.load(Ordering::Relaxed), Instant::now(), cpu_seconds()?);
    tokio::time::sleep(Duration::from_secs(args.seconds)).await;
    let mib = (b.bytes.load(Ordering::Relaxed) - from) as f64 / f64::from(1 << 20);
    let (seconds, cpu) = (at.elapsed().as_secs_f64(), cpu_seconds()? - cpu);
    println!(
        "{} streams x {} KiB: {:.0} MiB/s, {:.2} CPU s per GiB for both ends together",
        args.streams,
        args.payload >> 10,
        mib / seconds,
        cpu / mib * 1024.0
    );
    println!("round trip beside it: {}", round_trips(&a.net, to, &mut a.pongs, 200).await?);
    let status = std::fs::read_to_string("/proc/self/status")?;
    let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap_or("VmHWM: unknown");
    println!("peak resident memory of both ends: {}", peak.trim_start_matches("VmHWM:").trim());
    pumps.iter().for_each(tokio::task::JoinHandle::abort);
    a.net.shutdown().await;
    b.net.shutdown().await;
    Ok(())
}
