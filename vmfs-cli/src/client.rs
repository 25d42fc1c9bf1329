//! Talking to a daemon: HTTP/1 over its control socket.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use vmfs_replica::api::{ApiError, ProgressEvent, StreamLine};

use crate::error::{CliError, CliResult};

/// Longest answer in bytes: a status of some 100,000 images.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A question that waits for nothing is answered within this time, or not at all.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// One daemon, by its socket. Every request is a connection of its own.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    pub(crate) fn new(socket: &Path) -> Self {
        Self { socket: socket.to_owned() }
    }

    /// `GET`, answered with one document.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> CliResult<T> {
        let asked = async { self.document(self.send(Method::GET, path, Bytes::new()).await?).await };
        tokio::time::timeout(ANSWER_MAX, asked).await.unwrap_or_else(|_| Err(self.silent()))
    }

    /// `GET` about an image.
    pub(crate) async fn get_image<T: DeserializeOwned>(&self, path: &str, image: &str) -> CliResult<T> {
        self.get(&format!("{path}?image={}", percent_encode(image))).await
    }

    /// `POST`, answered with one document.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
    ) -> CliResult<T> {
        self.document(self.send(Method::POST, path, self.encode(request)?).await?).await
    }

    /// `POST`, answered with reports on progress and then a document.
    pub(crate) async fn post_streamed<T: DeserializeOwned>(
        &self,
        path: &str,
        request: &impl Serialize,
        mut on_progress: impl FnMut(&ProgressEvent),
    ) -> CliResult<T> {
        let response = self.send(Method::POST, path, self.encode(request)?).await?;
        if !response.status().is_success() {
            return self.document(response).await;
        }
        let mut body = response.into_body();
        let mut pending = Vec::new();
        loop {
            let frame = body.frame().await.transpose().map_err(|e| self.broken(&e))?;
            let ended = frame.is_none();
            if let Some(data) = frame.as_ref().and_then(|f| f.data_ref()) {
                pending.extend_from_slice(data);
            }
            while let Some(line) = next_line(&mut pending, ended) {
                match serde_json::from_slice(&line).map_err(|e| self.broken(&e))? {
                    StreamLine::Progress(event) => on_progress(&event),
                    StreamLine::Done(done) => return Ok(done),
                    StreamLine::Error(error) => return Err(error.into()),
                }
            }
            if ended {
                return Err(self.broken(&"it ended without a result; the daemon may have stopped"));
            }
            if pending.len() > ANSWER_BYTES_MAX {
                return Err(self.broken(&"an endless line"));
            }
        }
    }

    fn encode(&self, request: &impl Serialize) -> CliResult<Bytes> {
        serde_json::to_vec(request).map(Bytes::from).map_err(|e| self.broken(&e))
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> CliResult<Response<Incoming>> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|e| self.unreachable(&e))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        // Its errors are those of the request, which reports them.
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "vmfs");
        let request = request.body(Full::new(body)).map_err(|e| self.broken(&e))?;
        sender.send_request(request).await.map_err(|e| self.broken(&e))
    }

    async fn document<T: DeserializeOwned>(&self, response: Response<Incoming>) -> CliResult<T> {
        let good = response.status().is_success();
        let limited = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let body = limited.collect().await.map_err(|e| self.broken(&e))?.to_bytes();
        if good {
            return serde_json::from_slice(&body).map_err(|e| self.broken(&e));
        }
        Err(serde_json::from_slice::<ApiError>(&body).map_or_else(|e| self.broken(&e), CliError::from))
    }

    fn unreachable(&self, error: &io::Error) -> CliError {
        let socket = self.socket.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CliError::failed(format!(
                "no daemon answers on {socket} (choose one with --socket PATH or VMFS_SOCKET)"
            )),
            _ => CliError::failed(format!("cannot talk to the daemon on {socket}: {error}")),
        }
    }

    fn silent(&self) -> CliError {
        CliError::failed(format!(
            "the daemon on {} does not answer within {} s (is it starting?)",
            self.socket.display(),
            ANSWER_MAX.as_secs()
        ))
    }

    fn broken(&self, error: &impl ToString) -> CliError {
        CliError::failed(format!(
            "bad answer from the daemon on {}: {}",
            self.socket.display(),
            error.to_string()
        ))
    }
}

/// Takes the first line off `pending`; what has no line feed counts as one only at the end.
fn next_line(pending: &mut Vec<u8>, ended: bool) -> Option<Vec<u8>> {
    match pending.iter().position(|b| *b == b'\n') {
        Some(end) => Some(pending.drain(..=end).collect()),
        None if ended && !pending.is_empty() => Some(std::mem::take(pending)),
        None => None,
    }
}

/// `text` for the value of a query parameter.
fn percent_encode(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, b| {
        if b.is_ascii_alphanumeric() || b"-._~/".contains(&b) {
            out.push(char::from(b));
        } else {
            let _ = write!(out, "%{b:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn daemon_that_does_not_answer_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _silent = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let error = Client::new(&socket).get::<String>("/v1/status").await.unwrap_err().to_string();
        assert!(error.ends_with("does not answer within 10 s (is it starting?)"), "{error}");
    }

    #[test]
    fn parameters_are_encoded() {
        assert_eq!(percent_encode("vm/a b&c=é%.img"), "vm/a%20b%26c%3D%C3%A9%25.img");
    }
}
