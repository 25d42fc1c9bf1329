//! The socket and the routes, over real connections, with a daemon that records what it is asked.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Mutex;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use vmfs_common::policy::{Acks, OnQuorumLoss};
use vmfs_common::{DatastoreId, HostId, ImageId, StoreId};

use super::*;
use crate::api::types::*;
use crate::api::{ErrorCode, Unit};

/// Answers from a table in the way a daemon would, and remembers the images it was asked about.
#[derive(Default)]
struct Recorder {
    asked: Mutex<Vec<String>>,
    waits_dropped: Arc<std::sync::atomic::AtomicUsize>,
}

impl Recorder {
    fn note(&self, what: impl Into<String>) {
        self.asked.lock().unwrap().push(what.into());
    }
}

fn refuse<T: Send + 'static>(error: ApiError) -> Answer<'static, T> {
    Box::pin(async move { Err(error) })
}

impl Control for Recorder {
    fn status(&self) -> Answer<'_, StatusReport> {
        Box::pin(async {
            Ok(StatusReport {
                host: "a".into(),
                host_id: HostId::from_bytes([1; 16]),
                store_id: StoreId::from_bytes([2; 16]),
                datastore: DatastoreId::from_bytes([3; 16]),
                mount: None,
                version: "0".into(),
                peers: vec![],
                images: vec![],
                refusals: BTreeMap::new(),
                damage: Damage::default(),
                unopened: vec![],
            })
        })
    }
    fn info(&self, image: String) -> Answer<'_, ImageInfo> {
        self.note(format!("info {image}"));
        refuse(ApiError::not_found(format!("{image}: no such image")))
    }
    fn promote(&self, request: PromoteRequest, progress: Progress) -> Answer<'_, PromoteReport> {
        self.note(format!("promote {} {}", request.image, request.force));
        Box::pin(async move {
            if !request.force {
                return Err(ApiError::no_quorum("1 of 3 members reachable, 2 needed"));
            }
            progress.report("collecting votes", 1, Some(2), Unit::Members);
            tokio::task::yield_now().await;
            Ok(PromoteReport {
                image: request.image,
                id: ImageId::from_bytes([9; 16]),
                epoch: 7,
                seq: 100,
                loss: Loss::Nothing,
                forced: true,
                warning: None,
                elapsed_ms: 12,
            })
        })
    }
    fn handover(&self, _: HandoverRequest, _: Progress) -> Answer<'_, HandoverReport> {
        refuse(ApiError::failed("not now"))
    }
    fn replica_add(&self, _: ReplicaAddRequest, _: Progress) -> Answer<'_, ReplicaReport> {
        refuse(ApiError::failed("not now"))
    }
    fn replica_remove(&self, _: ReplicaRemoveRequest, _: Progress) -> Answer<'_, ReplicaReport> {
        refuse(ApiError::failed("not now"))
    }
    fn verify(&self, _: VerifyRequest, _: Progress) -> Answer<'_, VerifyReport> {
        refuse(ApiError::failed("not now"))
    }
    fn scrub(&self, _: ScrubRequest, _: Progress) -> Answer<'_, ScrubReport> {
        refuse(ApiError::failed("not now"))
    }
    fn forks(&self, image: Option<String>) -> Answer<'_, ForkList> {
        self.note(format!("forks {image:?}"));
        Box::pin(async { Ok(ForkList { forks: vec![] }) })
    }
    fn fork_drop(&self, _: ForkDropRequest) -> Answer<'_, ForkInfo> {
        refuse(ApiError::not_found("no such fork"))
    }
    fn fork_export(&self, r: ForkExportRequest, _: Progress) -> Answer<'_, ForkExportReport> {
        self.note(format!("export {} to {} ({})", r.fork, r.file, r.onto));
        refuse(ApiError::not_found("no such fork"))
    }
    fn policy(&self, image: String) -> Answer<'_, PolicyReport> {
        refuse(ApiError::not_found(image))
    }
    fn policy_set(&self, request: PolicySetRequest) -> Answer<'_, PolicyReport> {
        Box::pin(async move {
            Ok(PolicyReport {
                image: request.image,
                acks: request.acks.unwrap_or(Acks::Majority),
                on_quorum_loss: request.on_quorum_loss.unwrap_or(OnQuorumLoss::Stall),
                members: vec![],
                quorum: 2,
                data_copies: 2,
            })
        })
    }
    fn fail(&self, _: ImageRequest) -> Answer<'_, FailReport> {
        refuse(ApiError::failed("not now"))
    }
    fn abandon(&self, _: AbandonRequest) -> Answer<'_, AbandonReport> {
        refuse(ApiError::failed("not now"))
    }
    fn wait(&self, _: WaitRequest, _: Progress) -> Answer<'_, WaitReport> {
        struct Guard(Arc<std::sync::atomic::AtomicUsize>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
        }
        let guard = Guard(self.waits_dropped.clone());
        self.note("wait");
        Box::pin(async move {
            let _guard = guard;
            std::future::pending().await
        })
    }
    fn hosts(&self) -> Answer<'_, HostList> {
        Box::pin(async { Ok(HostList { hosts: vec![] }) })
    }
    fn host_invite(&self, _: InviteRequest) -> Answer<'_, InviteReport> {
        refuse(ApiError::failed("this host does not hold the CA's key"))
    }
    fn host_remove(&self, _: HostRemoveRequest) -> Answer<'_, HostList> {
        refuse(ApiError::failed("not now"))
    }
    fn metrics(&self) -> Answer<'_, String> {
        Box::pin(async { Ok("vmfs_images 0\n".to_owned()) })
    }
}

struct Rig {
    dir: PathBuf,
    socket: PathBuf,
    control: Arc<Recorder>,
    stop: tokio::sync::oneshot::Sender<()>,
    server: tokio::task::JoinHandle<io::Result<()>>,
}

fn scratch(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("vmfs-api-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

impl Rig {
    fn start(name: &str) -> Self {
        let dir = scratch(name);
        let socket = dir.join("sock");
        let control = Arc::new(Recorder::default());
        let bound = ControlServer::bind(&socket).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let server = tokio::spawn(bound.serve(control.clone(), async {
            let _ = stopped.await;
        }));
        Self { dir, socket, control, stop, server }
    }
    async fn ask(&self, method: &str, path: &str, body: &str) -> (u16, String) {
        let mut stream = tokio::net::UnixStream::connect(&self.socket).await.unwrap();
        let head = format!("{method} {path} HTTP/1.0\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }
    async fn error(&self, method: &str, path: &str, body: &str) -> (u16, ApiError) {
        let (status, body) = self.ask(method, path, body).await;
        (status, serde_json::from_str(&body).unwrap_or_else(|e| panic!("{body:?}: {e}")))
    }
    fn asked(&self) -> Vec<String> {
        self.control.asked.lock().unwrap().clone()
    }
    async fn end(self) {
        let _ = self.stop.send(());
        self.server.await.unwrap().unwrap();
        assert!(!self.socket.exists(), "the socket goes away with the server");
        std::fs::remove_dir_all(&self.dir).unwrap();
    }
}

#[tokio::test]
async fn socket_is_for_its_owner_only_and_goes_away() {
    let rig = Rig::start("mode");
    assert_eq!(std::fs::metadata(&rig.socket).unwrap().permissions().mode() & 0o7777, 0o600);
    let (status, body) = rig.ask("GET", "/v1/status", "").await;
    assert_eq!(status, 200);
    assert_eq!(serde_json::from_str::<StatusReport>(&body).unwrap().host, "a");
    let (status, body) = rig.ask("GET", "/metrics", "").await;
    assert_eq!((status, body.as_str()), (200, "vmfs_images 0\n"));
    rig.end().await;
}

#[tokio::test]
async fn metrics_address_serves_metrics_and_nothing_else() {
    let rig = Rig::start("metrics");
    let server = crate::api::MetricsServer::bind(([127, 0, 0, 1], 0).into()).await.unwrap();
    let address = server.address().unwrap();
    let serving = tokio::spawn(server.serve(rig.control.clone(), std::future::pending()));
    for (path, expected) in [("/metrics", "HTTP/1.0 200"), ("/v1/status", "HTTP/1.0 404")] {
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(expected), "{answer}");
    }
    serving.abort();
    rig.end().await;
}

#[tokio::test]
async fn socket_in_use_is_left_alone_and_a_stale_one_is_replaced() {
    let rig = Rig::start("stale");
    assert!(matches!(ControlServer::bind(&rig.socket), Err(ServerError::InUse(_))));
    assert_eq!(rig.ask("GET", "/v1/status", "").await.0, 200);
    let stale = rig.dir.join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    assert!(stale.exists());
    drop(ControlServer::bind(&stale).unwrap());
    let file = rig.dir.join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(ControlServer::bind(&file), Err(ServerError::NotASocket(_))));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    let open = rig.dir.join("open");
    std::fs::create_dir(&open).unwrap();
    for (mode, refused) in [(0o777, true), (0o1777, false), (0o755, false)] {
        std::fs::set_permissions(&open, std::fs::Permissions::from_mode(mode)).unwrap();
        let bound = ControlServer::bind(&open.join("sock"));
        assert_eq!(matches!(bound, Err(ServerError::OpenDirectory(_))), refused, "{mode:o}");
        assert_eq!(bound.is_err(), refused);
    }
    let long = rig.dir.join("x".repeat(120));
    assert!(matches!(ControlServer::bind(&long), Err(ServerError::PathTooLong { .. })));
    rig.end().await;
}

#[tokio::test]
async fn long_work_streams_progress_and_then_its_result() {
    let rig = Rig::start("stream");
    let (status, body) = rig.ask("POST", "/v1/promote", r#"{"image":"/vm/a.img","force":true}"#).await;
    assert_eq!(status, 200);
    let lines: Vec<StreamLine<PromoteReport>> =
        body.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert!(matches!(&lines[0], StreamLine::Progress(p) if p.stage == "collecting votes"), "{body}");
    assert!(matches!(&lines[1], StreamLine::Done(d) if d.image == "vm/a.img" && d.epoch == 7), "{body}");
    assert_eq!(rig.asked(), ["promote vm/a.img true"]);
    let (_, body) = rig.ask("POST", "/v1/promote", r#"{"image":"vm/a.img"}"#).await;
    let line: StreamLine<PromoteReport> = serde_json::from_str(&body).unwrap();
    assert!(matches!(line, StreamLine::Error(e) if e.code == ErrorCode::NoQuorum));
    rig.end().await;
}

#[tokio::test]
async fn wrong_requests_are_usage_errors_and_never_reach_the_daemon() {
    let rig = Rig::start("usage");
    let long = "n".repeat(256);
    for (method, path, body) in [
        ("GET", "/v1/image".to_owned(), String::new()),
        ("GET", "/v1/image?image=a/../b".to_owned(), String::new()),
        ("GET", "/v1/image?image=".to_owned(), String::new()),
        ("GET", format!("/v1/image?image={long}"), String::new()),
        ("GET", "/v1/image?picture=a".to_owned(), String::new()),
        ("POST", "/v1/promote".to_owned(), "{".to_owned()),
        ("POST", "/v1/promote".to_owned(), r#"{"image":"a","fast":true}"#.to_owned()),
        ("POST", "/v1/promote".to_owned(), r#"{"image":"a","members":["b"]}"#.to_owned()),
        ("POST", "/v1/verify".to_owned(), r#"{"image":"a\u0000b"}"#.to_owned()),
        ("POST", "/v1/wait".to_owned(), " ".repeat(BODY_BYTES_MAX + 1)),
        ("POST", "/v1/status".to_owned(), String::new()),
    ] {
        let (status, error) = rig.error(method, &path, &body).await;
        assert_eq!((status, error.code), (400, ErrorCode::Usage), "{method} {path} {body:.40}: {error}");
        assert!(!error.message.contains('\n'));
    }
    assert_eq!(rig.asked(), Vec::<String>::new());
    assert_eq!(rig.error("GET", "/v2/status", "").await.0, 404);
    assert_eq!(
        rig.error("GET", "/v1/image?image=%2Fa%20b", "").await.1,
        ApiError::not_found("a b: no such image")
    );
    rig.end().await;
}

#[tokio::test]
async fn wait_ends_at_its_time_out_and_with_its_client() {
    let rig = Rig::start("wait");
    let (_, body) = rig.ask("POST", "/v1/wait", r#"{"image":"a","timeout_ms":20}"#).await;
    let line: StreamLine<WaitReport> = serde_json::from_str(&body).unwrap();
    assert!(matches!(line, StreamLine::Error(e) if e.message == "a: not there after 0.0 s"), "{body}");
    let mut stream = tokio::net::UnixStream::connect(&rig.socket).await.unwrap();
    stream
        .write_all(b"POST /v1/wait HTTP/1.1\r\nhost: x\r\ncontent-length: 13\r\n\r\n{\"image\":\"a\"}")
        .await
        .unwrap();
    while rig.asked().len() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    drop(stream);
    while rig.control.waits_dropped.load(std::sync::atomic::Ordering::SeqCst) < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    rig.end().await;
}

#[test]
fn losses_say_exactly_what_is_known() {
    assert_eq!(Loss::Nothing.to_string(), "nothing acknowledged is missing");
    let time_ms = (12 * 3600 + 3 * 60 + 7) * 1000;
    let ends = Loss::EndsAt { seq: 812, time_ms, later_updates: Some(3) };
    assert_eq!(ends.to_string(), "ends at update 812 of 12:03:07 UTC; 3 later updates had been acknowledged");
    let ends = Loss::EndsAt { seq: 812, time_ms, later_updates: None };
    assert_eq!(ends.to_string(), "ends at update 812 of 12:03:07 UTC; later updates had been acknowledged");
    let unknown = Loss::UnknownAfter { seq: 812, time_ms };
    assert_eq!(unknown.to_string(), "ends at update 812; unknown after the last contact at 12:03:07 UTC");
    let json = serde_json::to_string(&unknown).unwrap();
    assert_eq!(json, r#"{"kind":"unknown-after","seq":812,"time_ms":43387000}"#);
}
