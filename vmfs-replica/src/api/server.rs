//! The control socket: HTTP/1 on a Unix socket of mode 0600, and the routes to [`Control`].

use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{BytesRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixSocket};
use tokio::sync::mpsc;

use super::error::ApiError;
use super::metrics::metrics;
use super::progress::{Progress, StreamLine};
use super::types::{
    AbandonRequest, ForkDropRequest, ForkExportRequest, HandoverRequest, HostRemoveRequest, ImageRequest,
    InviteRequest, PolicySetRequest, PromoteRequest, ReplicaAddRequest, ReplicaRemoveRequest, ScrubRequest,
    VerifyRequest, WaitRequest,
};
use super::{Answer, Control};

/// Longest request body in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;
/// Longest socket path in bytes that Linux takes, without the closing zero.
const SOCKET_PATH_BYTES_MAX: usize = 107;
/// Longest file name in bytes.
const NAME_BYTES_MAX: usize = 255;
/// Longest path inside the mount in bytes.
const IMAGE_PATH_BYTES_MAX: usize = 4096;
/// Connections waiting to be accepted.
const BACKLOG_MAX: u32 = 64;
/// Lines of a streamed answer that its client has not read yet.
const LINES_MAX: usize = 16;
/// How long requests under way may take to end after a shutdown began.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Something answers on it.
    #[error("control socket {}: another daemon answers on it", .0.display())]
    InUse(PathBuf),
    /// There is a file of another kind.
    #[error("control socket {}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// Linux takes at most [`SOCKET_PATH_BYTES_MAX`] bytes.
    #[error("control socket {}: the path is {bytes} bytes long, the limit is {SOCKET_PATH_BYTES_MAX}", path.display())]
    PathTooLong {
        /// The path.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// In a directory where others may put a socket of theirs in its place.
    #[error("control socket {}: other users may write its directory", .0.display())]
    OpenDirectory(PathBuf),
    /// Anything else.
    #[error("control socket {}: cannot {what}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound control socket. The file goes away with it, unless somebody else replaced it meanwhile.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    file: SocketFile,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).is_ok_and(|found| found == self.inode) {
            // Nothing to be done about a failure: the next daemon finds that nobody answers.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|m| (m.dev(), m.ino()))
}

impl ControlServer {
    /// Binds the socket with mode 0600. A socket nobody answers on is replaced; anything else that is
    /// there stays. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// [`ServerError`] says what is in the way; nothing was changed then.
    pub fn bind(path: &Path) -> Result<Self, ServerError> {
        let io = |what| move |source| ServerError::Io { path: path.to_owned(), what, source };
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(ServerError::PathTooLong { path: path.to_owned(), bytes });
        }
        let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mode = std::fs::metadata(parent).map_err(io("look at the directory of"))?.mode();
        // With the sticky bit others cannot replace what is not theirs.
        if mode & 0o002 != 0 && mode & 0o1000 == 0 {
            return Err(ServerError::OpenDirectory(path.to_owned()));
        }
        remove_stale(path)?;
        let socket = UnixSocket::new_stream().map_err(io("create a socket"))?;
        // Linux gives the file the mode of the unbound socket: there is no moment at which others may connect.
        rustix::fs::fchmod(&socket, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR)
            .map_err(|e| io("restrict the mode")(e.into()))?;
        socket.bind(path).map_err(io("bind"))?;
        let listener = socket.listen(BACKLOG_MAX).map_err(io("listen"))?;
        let inode = inode(path).map_err(io("look at"))?;
        Ok(Self { listener, file: SocketFile { path: path.to_owned(), inode } })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Answers requests until `shutdown` completes, then gives those under way two seconds.
    ///
    /// # Errors
    /// When the listener fails for good.
    pub async fn serve<F>(self, control: Arc<dyn Control>, shutdown: F) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let (stop, mut stopped) = tokio::sync::watch::channel(false);
        let mut seen = stopped.clone();
        tokio::spawn(async move {
            shutdown.await;
            stop.send_replace(true);
        });
        let serving = axum::serve(self.listener, router(control))
            .with_graceful_shutdown(async move {
                // An error means that the task above is gone, which is a shutdown of the runtime.
                let _ = seen.wait_for(|stopped| *stopped).await;
            })
            .into_future();
        let grace = async move {
            let _ = stopped.wait_for(|stopped| *stopped).await;
            tokio::time::sleep(SHUTDOWN_GRACE).await;
        };
        let result = tokio::select! {
            result = serving => result,
            () = grace => Ok(()),
        };
        drop(self.file);
        result
    }
}

fn remove_stale(path: &Path) -> Result<(), ServerError> {
    let io = |what| move |source| ServerError::Io { path: path.to_owned(), what, source };
    match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(io("look at")(e)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(ServerError::NotASocket(path.to_owned())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(io("remove the stale socket"))
        }
        Err(e) => Err(io("find out whether anybody answers")(e)),
        Ok(_) => Err(ServerError::InUse(path.to_owned())),
    }
}

type Shared = State<Arc<dyn Control>>;
type Payload = Result<Bytes, BytesRejection>;
type ImageQuery = Result<Query<ImageParameter>, QueryRejection>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageParameter {
    image: Option<String>,
}

fn router(control: Arc<dyn Control>) -> Router {
    Router::new()
        .route("/v1/status", get(async |State(c): Shared| c.status().await.map(Json)))
        .route("/v1/image", get(image))
        .route("/v1/promote", post(promote))
        .route("/v1/handover", post(handover))
        .route("/v1/replica/add", post(replica_add))
        .route("/v1/replica/remove", post(replica_remove))
        .route("/v1/verify", post(verify))
        .route("/v1/scrub", post(scrub))
        .route("/v1/wait", post(wait))
        .route("/v1/forks", get(forks))
        .route("/v1/fork/drop", post(fork_drop))
        .route("/v1/fork/export", post(fork_export))
        .route("/v1/policy", get(policy).post(policy_set))
        .route("/v1/fail", post(fail))
        .route("/v1/abandon", post(abandon))
        .route("/v1/hosts", get(async |State(c): Shared| c.hosts().await.map(Json)))
        .route("/v1/host/invite", post(host_invite))
        .route("/v1/host/remove", post(host_remove))
        .route("/metrics", get(metrics))
        .fallback(async || ApiError::not_found("no such request; see docs/api.md"))
        .method_not_allowed_fallback(async || {
            ApiError::usage("wrong method for this request; see docs/api.md")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(control)
}

fn parse<T: DeserializeOwned>(payload: Payload) -> Result<T, ApiError> {
    let bytes = payload.map_err(ApiError::usage)?;
    serde_json::from_slice(&bytes).map_err(|e| ApiError::usage(format!("request body: {e}")))
}

fn query_image(query: ImageQuery) -> Result<Option<String>, ApiError> {
    let Query(parameter) = query.map_err(ApiError::usage)?;
    parameter.image.as_deref().map(image_path).transpose()
}

fn required_image(query: ImageQuery) -> Result<String, ApiError> {
    query_image(query)?.ok_or_else(|| ApiError::usage("the parameter image=PATH is missing"))
}

/// The canonical form of a path inside the mount: no leading slash, no empty, `.` or `..` component.
///
/// # Errors
/// [`super::ErrorCode::Usage`] for anything that cannot be the path of an image.
pub fn image_path(text: &str) -> Result<String, ApiError> {
    let path = text.trim_start_matches('/');
    let bad = |why: &str| {
        let shown: String = text.chars().take(80).collect();
        Err(ApiError::usage(format!("{shown:?} is not the path of an image: {why}")))
    };
    if path.is_empty() {
        return bad("it is empty");
    }
    if path.len() > IMAGE_PATH_BYTES_MAX {
        return bad("it is longer than 4096 bytes");
    }
    for name in path.split('/') {
        match name {
            "" | "." | ".." => return bad("it has an empty, \".\" or \"..\" part"),
            _ if name.len() > NAME_BYTES_MAX => return bad("a name in it is longer than 255 bytes"),
            _ if name.contains('\0') => return bad("it contains a zero byte"),
            _ => {}
        }
    }
    Ok(path.to_owned())
}

async fn image(State(control): Shared, query: ImageQuery) -> Result<Response, ApiError> {
    let image = required_image(query)?;
    Ok(Json(control.info(image).await?).into_response())
}

async fn forks(State(control): Shared, query: ImageQuery) -> Result<Response, ApiError> {
    let image = query_image(query)?;
    Ok(Json(control.forks(image).await?).into_response())
}

async fn policy(State(control): Shared, query: ImageQuery) -> Result<Response, ApiError> {
    let image = required_image(query)?;
    Ok(Json(control.policy(image).await?).into_response())
}

async fn policy_set(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: PolicySetRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(Json(control.policy_set(request).await?).into_response())
}

async fn fail(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: ImageRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(Json(control.fail(request).await?).into_response())
}

async fn abandon(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: AbandonRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(Json(control.abandon(request).await?).into_response())
}

async fn fork_drop(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let request: ForkDropRequest = parse(payload)?;
    Ok(Json(control.fork_drop(request).await?).into_response())
}

async fn fork_export(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let request: ForkExportRequest = parse(payload)?;
    if !Path::new(&request.file).is_absolute() {
        return Err(ApiError::usage(format!("{:?} is no absolute path", request.file)));
    }
    Ok(stream(control, OnDisconnect::Finish, |c, p| Box::pin(async move { c.fork_export(request, p).await })))
}

async fn host_invite(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let request: InviteRequest = parse(payload)?;
    Ok(Json(control.host_invite(request).await?).into_response())
}

async fn host_remove(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let request: HostRemoveRequest = parse(payload)?;
    Ok(Json(control.host_remove(request).await?).into_response())
}

async fn promote(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: PromoteRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    if !request.force && !request.members.is_empty() {
        return Err(ApiError::usage("members are named only with force"));
    }
    Ok(stream(control, OnDisconnect::Finish, |c, p| Box::pin(async move { c.promote(request, p).await })))
}

async fn handover(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: HandoverRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(stream(control, OnDisconnect::Finish, |c, p| Box::pin(async move { c.handover(request, p).await })))
}

async fn replica_add(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: ReplicaAddRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(stream(control, OnDisconnect::Finish, |c, p| Box::pin(async move { c.replica_add(request, p).await })))
}

async fn replica_remove(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: ReplicaRemoveRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(stream(control, OnDisconnect::Finish, |c, p| {
        Box::pin(async move { c.replica_remove(request, p).await })
    }))
}

async fn verify(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: VerifyRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    Ok(stream(control, OnDisconnect::Cancel, |c, p| Box::pin(async move { c.verify(request, p).await })))
}

async fn scrub(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: ScrubRequest = parse(payload)?;
    request.image = request.image.as_deref().map(image_path).transpose()?;
    if request.rate_bytes == Some(0) {
        return Err(ApiError::usage("a rate of 0 would never end"));
    }
    Ok(stream(control, OnDisconnect::Cancel, |c, p| Box::pin(async move { c.scrub(request, p).await })))
}

async fn wait(State(control): Shared, payload: Payload) -> Result<Response, ApiError> {
    let mut request: WaitRequest = parse(payload)?;
    request.image = image_path(&request.image)?;
    let limit = request.timeout_ms.map(Duration::from_millis);
    Ok(stream(control, OnDisconnect::Cancel, move |c, p| {
        Box::pin(async move {
            let image = request.image.clone();
            let what = if request.in_sync { "not in sync" } else { "not there" };
            let waiting = c.wait(request, p);
            match limit {
                None => waiting.await,
                Some(limit) => tokio::time::timeout(limit, waiting).await.unwrap_or_else(|_| {
                    Err(ApiError::failed(format!("{image}: {what} after {:.1} s", limit.as_secs_f64())))
                }),
            }
        })
    }))
}

/// What becomes of work whose client went away.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnDisconnect {
    Cancel,
    Finish,
}

/// Runs `work` and answers with its reports and its result, one JSON document a line.
fn stream<T, W>(control: Arc<dyn Control>, on_disconnect: OnDisconnect, work: W) -> Response
where
    T: Serialize + Send + 'static,
    W: FnOnce(Arc<dyn Control>, Progress) -> Answer<'static, T>,
{
    let (lines, receiver) = mpsc::channel(LINES_MAX);
    let (progress, mut events) = Progress::channel();
    let mut work = work(control, progress);
    tokio::spawn(async move {
        let result = loop {
            tokio::select! {
                result = &mut work => break result,
                Some(event) = events.recv() => {
                    // A client that reads slowly is shown a later report instead.
                    let _ = lines.try_send(line(&StreamLine::<T>::Progress(event)));
                }
                () = lines.closed(), if on_disconnect == OnDisconnect::Cancel => return,
            }
        };
        while let Ok(event) = events.try_recv() {
            let _ = lines.try_send(line(&StreamLine::<T>::Progress(event)));
        }
        let last = match result {
            Ok(done) => StreamLine::Done(done),
            Err(error) => StreamLine::Error(error),
        };
        // Fails when the client is gone: the work is done all the same.
        let _ = lines.send(line(&last)).await;
    });
    ([(header::CONTENT_TYPE, "application/jsonl")], Body::from_stream(Lines(receiver))).into_response()
}

fn line<T: Serialize>(line: &StreamLine<T>) -> Bytes {
    let mut bytes = serde_json::to_vec(line).unwrap_or_else(|e| {
        // Only a map with keys that are no strings ends here; the documents have none.
        format!(r#"{{"error":{{"code":"failed","message":"cannot encode the answer: {e}"}}}}"#).into_bytes()
    });
    bytes.push(b'\n');
    bytes.into()
}

/// The lines as a body.
struct Lines(mpsc::Receiver<Bytes>);

impl futures_core::Stream for Lines {
    type Item = Result<Bytes, std::convert::Infallible>;
    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(cx).map(|line| line.map(Ok))
    }
}

#[cfg(test)]
mod tests;
