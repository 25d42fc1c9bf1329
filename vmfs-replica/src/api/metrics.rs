//! `GET /metrics` on a TCP address, for a Prometheus on another host. Nothing else is served there.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::{ApiError, Control};

/// A bound address for metrics.
#[derive(Debug)]
pub struct MetricsServer(TcpListener);

impl MetricsServer {
    /// Binds `address`.
    ///
    /// # Errors
    /// When it cannot be bound, with the address.
    pub async fn bind(address: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await;
        listener.map(Self).map_err(|e| io::Error::new(e.kind(), format!("metrics address {address}: {e}")))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Answers until `shutdown` completes.
    ///
    /// # Errors
    /// When the listener fails for good.
    pub async fn serve<F>(self, control: Arc<dyn Control>, shutdown: F) -> io::Result<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let router = Router::new().route("/metrics", get(metrics)).with_state(control);
        tokio::select! {
            result = axum::serve(self.0, router).into_future() => result,
            () = shutdown => Ok(()),
        }
    }
}

/// The handler, for both servers.
pub(super) async fn metrics(State(control): State<Arc<dyn Control>>) -> Result<Response, ApiError> {
    let text = control.metrics().await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
