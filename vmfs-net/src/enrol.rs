//! Enrolment over the network. What is decided, and what is durable when, is in
//! [`crate::pki::invite`]; here it is carried over QUIC with ALPN `vmfs-enrol/1`, the one thing that a
//! client without a certificate can reach: one request frame, one answer frame (JSON).

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, Connection, Endpoint};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use crate::directory::HostRole;
use crate::error::{NetError, Refusal};
use crate::frame::{self, Kind, PartialBudget, RawReader};
use crate::hub::resolve;
use crate::network::Shared;
use crate::pki::invite::{self, Admission, Invitation, JoinRequest};
use crate::pki::{HostIdentity, PkiError, dns_name};
use crate::session::too_slow;
use crate::tls::{self, PinnedCa};

/// RFC 5705 label of the value that binds a proof to its TLS session.
const EXPORTER: &[u8] = b"EXPORTER-vmfs-enrol-1";
/// Limit on the whole of a join, per address.
const JOIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the enrolling host waits for its answer to be taken.
const FAREWELL: Duration = Duration::from_secs(2);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Answer {
    Admitted(Admission),
    Refused(String),
}

fn binding(connection: &Connection) -> Result<[u8; 32], NetError> {
    let mut out = [0; 32];
    connection
        .export_keying_material(&mut out, EXPORTER, b"")
        .map_err(|_| NetError::Lost("no keying material for the proof".into()))?;
    Ok(out)
}

/// The enrolling host's side of one connection.
pub(crate) async fn serve(shared: &Arc<Shared>, connection: Connection) -> Result<(), NetError> {
    let peer = connection.remote_address().to_string();
    let result = serve_request(shared, &connection).await;
    if let Err(e) = &result {
        let refusal = e.blame().unwrap_or(Refusal::Timeout);
        connection.close(refusal.code().into(), e.to_string().as_bytes());
    }
    result.inspect_err(|e| tracing::debug!("enrolment from {peer}: {e}"))
}

async fn serve_request(shared: &Arc<Shared>, connection: &Connection) -> Result<(), NetError> {
    let peer = connection.remote_address().to_string();
    let binding = binding(connection)?;
    let (mut send, recv) = connection.accept_bi().await.map_err(|e| NetError::from_connection(&peer, &e))?;
    let body = RawReader::new(recv, Arc::new(PartialBudget::default())).expect(Kind::Enrol).await?;
    let request: JoinRequest =
        serde_json::from_slice(&body).map_err(|e| NetError::BadFrame(format!("enrolment: {e}")))?;
    let admitting = Arc::clone(shared);
    let admitted = tokio::task::spawn_blocking(move || {
        let _one_at_a_time = admitting.enrolling.lock();
        invite::admit(admitting.identity.dir(), &admitting.directory, request, &binding)
    });
    let answer = match admitted.await {
        Ok(Ok(admission)) => {
            tracing::info!("enrolled a host from {peer}");
            Answer::Admitted(admission)
        }
        Ok(Err(e)) => {
            shared.note_enrolment(&connection.remote_address().ip().to_string(), &e);
            Answer::Refused(e.to_string())
        }
        Err(e) => return Err(NetError::Lost(e.to_string())),
    };
    let body = serde_json::to_vec(&answer).expect("invariant: plain structs of strings and numbers");
    send.write_chunk(frame::encode(Kind::Enrolled, &body)?).await.map_err(NetError::from_write)?;
    // An error only says that the peer has left.
    let _ = send.finish();
    // Closing the connection now would lose the answer; the peer closes it when it has it.
    let _ = timeout(FAREWELL, connection.closed()).await;
    Ok(())
}

/// Makes this machine a host of the inviting datastore: a key that never leaves `dir`, the
/// certificate, the known hosts. `address` is where this host will listen, as others reach it; an
/// unspecified IP address is replaced by the one that the enrolling host is reached from. On return
/// everything is on stable storage. May be repeated after a failure.
///
/// # Errors
/// What is wrong with the invitation, the directory or the address; [`NetError::Declined`] when the
/// enrolling host refuses; why it cannot be reached.
pub async fn join(
    dir: &Path,
    invitation: &Invitation,
    address: &str,
    roles: &[HostRole],
) -> Result<HostIdentity, NetError> {
    invite::prepare(dir, invitation)?;
    let mut result = Err(NetError::Resolve {
        address: invitation.address().to_owned(),
        why: "the name has no address".into(),
    });
    for server in resolve(invitation.address()).await? {
        let attempt = join_at(dir, invitation, server, address, roles);
        result = timeout(JOIN_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(too_slow(JOIN_TIMEOUT)));
        // An answer is an answer: other addresses lead to the same host.
        if matches!(result, Ok(_) | Err(NetError::Declined(_) | NetError::Pki(_))) {
            break;
        }
    }
    result
}

async fn join_at(
    dir: &Path,
    invitation: &Invitation,
    server: SocketAddr,
    address: &str,
    roles: &[HostRole],
) -> Result<HostIdentity, NetError> {
    let pin = Arc::new(PinnedCa::new(invitation.ca_fingerprint()));
    let config = ClientConfig::new(Arc::new(tls::joiner(Arc::clone(&pin))?));
    let any: SocketAddr = if server.is_ipv6() { ([0_u16; 8], 0).into() } else { ([0_u8; 4], 0).into() };
    let endpoint = Endpoint::client(any).map_err(|source| NetError::Bind { address: any, source })?;
    let peer = format!("enrolling host at {server}");
    let lost = |e| NetError::from_connection(&peer, &e);
    let connecting = endpoint.connect_with(config, server, &dns_name(invitation.inviter()));
    let connecting =
        connecting.map_err(|e| NetError::Resolve { address: server.to_string(), why: e.to_string() })?;
    let connection = connecting.await.map_err(lost)?;
    let address = reachable(address, &connection);
    let (key, request) = invite::request(dir, invitation, &binding(&connection)?, &address, roles)?;
    let body = serde_json::to_vec(&request).expect("invariant: plain structs of strings and numbers");
    let (mut send, recv) = connection.open_bi().await.map_err(lost)?;
    send.write_chunk(frame::encode(Kind::Enrol, &body)?).await.map_err(NetError::from_write)?;
    // An error only says that the peer has left, which the read reports better.
    let _ = send.finish();
    let answer = RawReader::new(recv, Arc::new(PartialBudget::default())).expect(Kind::Enrolled).await?;
    connection.close(Refusal::Shutdown.code().into(), b"done");
    endpoint.wait_idle().await;
    let answer = serde_json::from_slice(&answer).map_err(|e| NetError::BadFrame(format!("answer: {e}")))?;
    match answer {
        Answer::Refused(why) => Err(NetError::Declined(why)),
        Answer::Admitted(admission) => {
            let ca = pin.ca().ok_or_else(|| PkiError::malformed(&peer, "no CA certificate"))?;
            Ok(invite::complete(dir, invitation, &key, ca, admission)?)
        }
    }
}

/// Fills in the IP address of `address` where it says "any".
fn reachable(address: &str, connection: &Connection) -> String {
    match (address.parse::<SocketAddr>(), connection.local_ip()) {
        (Ok(mut socket), Some(ip)) if socket.ip().is_unspecified() => {
            socket.set_ip(ip.to_canonical());
            socket.to_string()
        }
        _ => address.to_owned(),
    }
}
